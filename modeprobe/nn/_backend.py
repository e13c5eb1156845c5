"""A module's own choice of backend, which :func:`modeprobe.swap` sets."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling
from torch.fx import Proxy

from modeprobe.ops.backend import backend, own_backend


def on_own_backend(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run a module's ``forward`` on ``module.backend``; None leaves the choice to the caller.

    Under `torch.fx.symbolic_trace` the module is one call in the graph, as torch's own layers are.

    Signatures are spelled out: ``*args`` and ``**kwargs`` would cost a small tensor 5% of its call.
    """

    def run(self: Any, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        if self.backend is None:
            return forward(self, input)
        with _own(self.backend):
            return forward(self, input)

    def run_with_residual(self: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy):
            return as_leaf(self, input, *(() if residual is None else (residual,)))
        if self.backend is None:
            return forward(self, input, residual)
        with _own(self.backend):
            return forward(self, input, residual)

    takes_residual = "residual" in inspect.signature(forward).parameters
    return functools.wraps(forward)(run_with_residual if takes_residual else run)


def _own(name: str) -> AbstractContextManager[None]:
    """Dynamo, which traces in one thread at a time, guards on the choice of the process."""
    return backend(name) if is_compiling() else own_backend(name)


def as_leaf(module: Any, *args: Any) -> Any:
    """The call of ``module`` in the graph of ``torch.fx.symbolic_trace``."""
    tracer = args[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})

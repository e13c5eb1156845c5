"""A module's own choice of backend, which :func:`modeprobe.swap` sets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from modeprobe.ops.backend import backend


def on_own_backend(forward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Run a module's ``forward(input)`` on ``module.backend``; None leaves the choice to the caller.

    The signature is spelled out: ``*args`` and ``**kwargs`` would cost a small tensor 5% of its call.
    """

    @functools.wraps(forward)
    def run(self: Any, input: Tensor) -> Tensor:
        if self.backend is None:
            return forward(self, input)
        with backend(self.backend):
            return forward(self, input)

    return run

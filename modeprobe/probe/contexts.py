"""Contexts that set the mode for a while, and put every module's flag back exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from modeprobe.probe.events import classify
from modeprobe.probe.instrument import flag_of, set_flag
from modeprobe.probe.report import Report
from modeprobe.probe.silence import silenced

Model = TypeVar("Model", bound=nn.Module)

_DROPOUT = frozenset({"module_dropout", "functional_dropout", "attention_dropout", "stochastic_depth"})


@contextmanager
def _flags(model: nn.Module, wanted: Callable[[str, nn.Module], bool | None]) -> Iterator[None]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    before = [(module, flag_of(module)) for module in model.modules()]
    try:
        for name, module in model.named_modules():
            flag = wanted(name, module)
            if flag is not None:
                set_flag(module, flag)
        yield
    finally:
        for module, flag in before:
            set_flag(module, flag)


@contextmanager
def evaluating(model: Model) -> Iterator[Model]:
    """Every module of `model` in eval mode inside the block.

    Afterwards, also after an exception, each module has the flag it had: a frozen BatchNorm stays frozen. The
    flags are written directly; an overridden `train()` is not called.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    with _flags(model, lambda name, module: False):
        yield model


@contextmanager
def mc_dropout(model: Model, report: Report | None = None) -> Iterator[Model]:
    """Eval mode with dropout on, for Monte-Carlo dropout; flags are put back afterwards.

    Functional and attention dropout is gated by the modules that call it, so these are put in train mode,
    not only `nn.Dropout`; normalisation layers keep their stored statistics.

    Args:
        report: a report of `modeprobe.probe(model, ...)`. With it, exactly the modules that gate dropout are
            switched. Without it, every module but the normalisation layers is, so that other code behind the
            flag (added noise, auxiliary outputs, activation checkpointing) is on as well.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: the report names modules that the model does not have, or no dropout at all.
    """
    gates: set[str] | None = None
    if report is not None:
        gates = {path for site in report.sites if site.cause in _DROPOUT for path in site.owners}
        missing = gates - {name for name, _ in model.named_modules()}
        if missing:
            raise ValueError(f"report is of another model: no module {sorted(missing)[0]!r} in this one")
        if not gates:
            raise ValueError(
                "report names no dropout that train mode turns on, so there is nothing to sample"
            )

    def wanted(name: str, module: nn.Module) -> bool:
        return name in gates if gates is not None else not isinstance(module, _NormBase)

    with _flags(model, wanted):
        yield model


class _NoDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").split(".")[0]
        known = classify(name, args, kwargs)
        if known is not None and known[0] in ("dropout", "attention") and known[1]:
            args, kwargs, _ = silenced(func, name, known[0], args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def no_dropout(model: Model) -> Iterator[Model]:
    """No dropout inside the block, whatever the mode: modules, functional calls and attention alike.

    Everything else that depends on the mode stays as it is: batch statistics, added noise, stochastic depth.
    Calls of dropout functions are intercepted in this thread, of any model, while the block lasts; scripted
    code is out of reach. `nn.Dropout` modules of `model` are in eval mode inside the block only.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """

    def wanted(name: str, module: nn.Module) -> bool | None:
        return False if isinstance(module, _DropoutNd) else None

    with _flags(model, wanted), _NoDropout():
        yield model

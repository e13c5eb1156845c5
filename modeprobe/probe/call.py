"""How the model is called: positional and keyword inputs, or a user's step, with gradients on request."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modeprobe.probe.leaves import children, clone_inputs, drained, map_tensors


@dataclass
class Call:
    """One way to run the model. `step(model)` replaces `model(*args, **kwargs)` when given.

    gradients: also differentiate the sum of the floating outputs (or the output named "loss") with respect to
    the parameters, and count the gradients as outputs.
    """

    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    step: Callable[[nn.Module], Any] | None = None
    gradients: bool = False
    grad_enabled: bool = False
    forwards: int = 0
    limit: int = sys.maxsize

    @property
    def left(self) -> int:
        """How many more passes through the whole model the promised cost allows."""
        return self.limit - self.forwards

    def count(self) -> None:
        """One more pass through the whole model."""
        self.forwards += 1

    def __call__(self, model: nn.Module) -> Any:
        return self._run(model, *clone_inputs((self.args, dict(self.kwargs))))

    def wide(self, model: nn.Module) -> Any:
        """The same run of a model in float64: floating inputs are converted."""
        args, kwargs = map_tensors((self.args, dict(self.kwargs)), _widened)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return self._run(model, args, kwargs)
        finally:
            torch.set_default_dtype(default)

    def _run(self, model: nn.Module, args: tuple, kwargs: dict) -> Any:
        self.count()
        with torch.set_grad_enabled(self.grad_enabled or self.gradients):
            output = drained(self.step(model) if self.step else model(*args, **kwargs))
            return (output, _gradients(model, output)) if self.gradients else output


def _widened(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach().clone()


def _gradients(model: nn.Module, output: Any) -> dict[str, Tensor | None]:
    names, parameters = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            names.append(name)
            parameters.append(parameter)
    loss = _loss(output)
    if loss is None or not parameters:
        return {}
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return dict(zip(names, found, strict=True))


def _loss(output: Any) -> Tensor | None:
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(named, Tensor) and named.requires_grad:
        return named.sum()
    total: Tensor | None = None
    todo = [output]
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            if item.requires_grad and (item.is_floating_point() or item.is_complex()):
                part = item.abs().sum() if item.is_complex() else item.sum()
                total = part if total is None else total + part
        else:
            todo.extend(part for _, part in children(item) or [])
    return total


def without_frames(error: Exception) -> Exception:
    """The same error without the stack frames it was raised in: they hold the model."""
    seen: BaseException | None = error
    while seen is not None and seen.__traceback__ is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return error


def told(error: BaseException) -> str:
    """Type and text of an error, whatever its `__str__` does."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


@dataclass
class Run:
    """Outcome of one run: flattened output, or the error; what the run left behind."""

    mode: bool
    seed: int
    leaves: dict[str, Any] | None = None
    error: BaseException | None = None
    phase: str = ""
    streams: tuple[str, ...] = ()
    toggled: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()

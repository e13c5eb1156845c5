"""What a forward pass does with its mode: reads of `.training`, dropout, statistics, random draws."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep


@dataclass(frozen=True)
class Place:
    """A line of source."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else "?"


@dataclass(frozen=True)
class Event:
    """One call that is random or uses batch statistics.

    kind: "dropout", "attention" (dropout inside scaled-dot-product attention), "statistics", "draw".
    active: whether it does something here (p > 0 and training, batch statistics in use, a value drawn).
    """

    kind: str
    name: str
    path: str
    module_type: type
    active: bool
    p: float | None
    place: Place
    shape: tuple[int, ...] = ()

    @property
    def key(self) -> tuple:
        return (self.kind, self.name, self.path, self.place, self.active)


@dataclass(frozen=True)
class Read:
    """One line that reads the mode of `owner` while `path` executes."""

    owner: str
    path: str
    place: Place


@dataclass
class Trace:
    events: list[Event] = field(default_factory=list)
    reads: Counter[Read] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def active(self) -> Counter[tuple]:
        return Counter(event.key for event in self.events if event.active)


def caller_place() -> Place:
    """The innermost line outside torch and this package."""
    frame = sys._getframe(1)
    inner: Place | None = None
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_HERE):
            if not name.startswith((_TORCH, "<frozen")):
                return Place(name, frame.f_lineno)
            inner = inner or Place(name, frame.f_lineno)
        elif frame.f_code.co_name == "_outermost":
            break
        frame = frame.f_back  # type: ignore[assignment]
    return inner or Place("", 0)


_DROPOUTS = {
    "dropout": True, "dropout_": True, "dropout1d": True, "dropout2d": True, "dropout3d": True,
    "feature_dropout": True, "feature_dropout_": True, "alpha_dropout": False, "alpha_dropout_": False,
    "feature_alpha_dropout": False, "feature_alpha_dropout_": False, "native_dropout": True,
}  # fmt: skip
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def _argument(args: tuple, kwargs: dict, index: int, names: tuple[str, ...], default: Any) -> Any:
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[index] if len(args) > index else default


def classify(name: str, args: tuple, kwargs: dict) -> tuple[str, bool, float | None] | None:
    """(kind, active, p) of a torch function that is known by name, None for any other."""
    if name in _DROPOUTS:
        p = float(_argument(args, kwargs, 1, ("p",), 0.5))
        training = _argument(args, kwargs, 2, ("training", "train"), _DROPOUTS[name])
        return "dropout", bool(training) and p > 0, p
    if name in _RECURRENT:
        index = next((i for i, value in enumerate(args) if isinstance(value, float)), None)
        if index is None:
            return None
        layers = args[index - 1]
        return "dropout", bool(args[index + 1]) and args[index] > 0 and layers > 1, args[index]
    if name == "scaled_dot_product_attention":
        p = float(_argument(args, kwargs, 4, ("dropout_p",), 0.0))
        return "attention", p > 0, p
    if name == "multi_head_attention_forward":
        p = float(_argument(args, kwargs, 9, ("dropout_p",), 0.0))
        active = p > 0 and bool(_argument(args, kwargs, 12, ("training",), True))
        weights = _argument(args, kwargs, 14, ("need_weights",), True)
        return "dropout" if weights else "attention", active, p
    if name == "batch_norm":
        return "statistics", bool(_argument(args, kwargs, 5, ("training",), False)), None
    if name == "instance_norm":
        return "statistics", bool(_argument(args, kwargs, 5, ("use_input_stats",), True)), None
    return None


class _Functions(TorchFunctionMode):
    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return func(*args, **kwargs)
        return self.tracer.call(func, name.split(".")[0], args, kwargs)


class Tracer:
    """Context that records a Trace of the runs inside it.

    Process-wide while active: `nn.Module.training` and `nn.Module.__call__` are replaced; only the thread
    that entered is recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        self.trace = Trace()
        self.model = model
        self.paths = {id(module): name for name, module in model.named_modules()}
        self.stack: list[nn.Module] = []
        self._foreign: list[nn.Module] = []
        self._thread = threading.get_ident()

    def path(self, module: nn.Module | None) -> str:
        if module is None:
            return ""
        if id(module) not in self.paths:
            parent = self.path(self.stack[-1]) if self.stack and self.stack[-1] is not module else ""
            name = f"({type(module).__name__})"
            self.paths[id(module)] = f"{parent}.{name}" if parent else name
            self._foreign.append(module)  # keeps the id from being reused
        return self.paths[id(module)]

    @property
    def current(self) -> nn.Module:
        return self.stack[-1] if self.stack else self.model

    def call(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        known = classify(name, args, kwargs)
        before = torch.get_rng_state() if known is None else None
        result = func(*args, **kwargs)
        if known is not None:
            self.record(name, *known, _shape(args))
        elif before is not None and not torch.equal(before, torch.get_rng_state()):
            self.record(name, "draw", True, None, _shape((result,)))
        return result

    def record(self, name: str, kind: str, active: bool, p: float | None, shape: tuple[int, ...]) -> None:
        module = self.current
        self.trace.events.append(
            Event(kind, name, self.path(module), type(module), active, p, caller_place(), shape)
        )

    def read(self, owner: nn.Module) -> None:
        if threading.get_ident() != self._thread:
            return
        frame = sys._getframe(2)
        file = frame.f_code.co_filename
        if frame.f_code.co_name in ("train", "eval") or file.startswith(_HERE):
            return
        place = caller_place() if file.startswith(_TORCH) else Place(file, frame.f_lineno)
        self.trace.reads[Read(self.path(owner), self.path(self.current), place)] += 1

    @contextmanager
    def active(self) -> Iterator[Trace]:
        with ExitStack() as stack:
            stack.enter_context(_patched_training(self.read))
            stack.enter_context(_patched_call(self))
            stack.enter_context(_Functions(self))
            yield self.trace


def _shape(values: tuple) -> tuple[int, ...]:
    return next((tuple(value.shape) for value in values if isinstance(value, Tensor)), ())


@contextmanager
def _patched_training(on_read: Callable[[nn.Module], None]) -> Iterator[None]:
    def get(module: nn.Module) -> bool:
        on_read(module)
        attributes = module.__dict__
        if "training" in attributes:
            return attributes["training"]
        # a scripted module keeps it outside __dict__
        return bool(type(module).__getattr__(module, "training"))

    def put(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    nn.Module.training = property(get, put)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training


@contextmanager
def _patched_call(tracer: Tracer) -> Iterator[None]:
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != tracer._thread:
            return original(module, *args, **kwargs)
        tracer.stack.append(module)
        tracer.trace.calls[tracer.path(module)] += 1
        try:
            return original(module, *args, **kwargs)
        finally:
            tracer.stack.pop()

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]

"""Traced runs: every event by module and source line; random draws seeded, forced or silenced on request."""

from __future__ import annotations

import hashlib
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from modeprobe.probe.events import (
    _HERE,
    _TORCH,
    DRAWS,
    Event,
    Key,
    Place,
    Read,
    Trace,
    argument,
    call_site,
    caller_place,
    classify,
)
from modeprobe.probe.instrument import flag_of, listening
from modeprobe.probe.randomness import RandomState, seed_everything, stream_position
from modeprobe.probe.silence import silenced


@dataclass
class Control:
    """How events are executed.

    salt: None leaves the random streams alone. An integer gives every event its own seed, made of salt, call
    site and count, so that adding or silencing one event changes no other.
    silent: call sites to silence: dropout passes its input on, statistics come from the running buffers.
    resalt: call sites that draw the values of another salt.
    force: draws are set to their lowest (0) or highest (1) value. single: their first value to the other one.
    draws: names of further functions known to draw, filled while tracing.
    """

    salt: int | None = None
    silent: frozenset[Key] = frozenset()
    resalt: Mapping[Key, int] = field(default_factory=dict)
    force: int | None = None
    forced: frozenset[Key] | None = None
    single: bool = False
    draws: set[str] = field(default_factory=set)


_MASKING = frozenset(
    """bernoulli bernoulli_ floor floor_ round round_ lt le gt ge lt_ le_ gt_ ge_ __lt__ __le__ __gt__ __ge__
    less greater less_equal greater_equal bool""".split()  # noqa: SIM905
)
_SCALING = frozenset(
    "mul mul_ multiply multiply_ __mul__ __rmul__ __imul__".split()  # noqa: SIM905
)
_PICKING = frozenset({"__getitem__", "select", "unbind"})
_PASSING = _PICKING | {"expand", "expand_as", "broadcast_to"}
_STEERING = frozenset("__bool__ item tolist __float__ __int__ __index__".split())  # noqa: SIM905


class Tracer:
    """Context manager that records a Trace of the runs inside it.

    functions: intercept torch functions (an active function mode hides fused fast paths, so some runs go
    without); below: also watch operators below Python, for scripted code.
    """

    def __init__(
        self,
        model: nn.Module,
        control: Control | None = None,
        functions: bool = True,
        below: bool = False,
        like: Tracer | None = None,
    ) -> None:
        self.trace = Trace()
        self.model = model
        self.control = control or Control()
        self.thread = threading.get_ident()
        self.functions = functions
        self.below = below
        self.in_event = 0
        self.counts: Counter[Any] = Counter()
        self.reseeds: tuple = ()
        self.gap = False
        self._position: tuple | None = None
        self.tracked: dict[int, Event] = {}
        self.noise: set[int] = set()  # tracked tensors made of nothing but draws
        self._alive: list[Any] = []
        if like is None:
            self.paths = {id(module): name for name, module in model.named_modules()}
            self._names: Counter[str] = Counter()
            self._foreign: list[nn.Module] = []
            self.stack: list[nn.Module] = []
        else:
            # Copies: modules built inside a forward get the same names in every run.
            self.paths, self._names = dict(like.paths), Counter(like._names)
            self._foreign = list(like._foreign)
            self.stack = list(like.stack)

    def path(self, module: nn.Module) -> str:
        if id(module) not in self.paths:
            parent = next((self.paths[id(m)] for m in reversed(self.stack) if m is not module), "")
            name = f"{parent}." * bool(parent) + f"<{type(module).__name__}>"
            self._names[name] += 1
            count = self._names[name]
            self.paths[id(module)] = name if count == 1 else f"{name}{count}"
            self._foreign.append(module)  # alive, so that its id is not given to another module
        return self.paths[id(module)]

    @contextmanager
    def active(self) -> Iterator[Trace]:
        with ExitStack() as stack:
            stack.enter_context(listening(self))
            if self.functions:
                stack.enter_context(_Functions(self))
            if self.below:
                stack.enter_context(_Operators(self))
            self._position = stream_position() if self.functions else None
            yield self.trace
            self._check_gap()

    # -- what the hooks report ---------------------------------------------------------------------------

    def on_read(self, owner: nn.Module) -> None:
        frame = sys._getframe(2)
        file = frame.f_code.co_filename
        if frame.f_code.co_name in ("train", "eval") or file.startswith(_HERE):
            return
        place = caller_place() if file.startswith(_TORCH) else Place(file, frame.f_lineno)
        path = self.path(self.stack[-1]) if self.stack else None
        self.trace.reads[Read(self.path(owner), path, place)] += 1

    def on_call(self, module: nn.Module, args: tuple, kwargs: dict, run: Callable[..., Any]) -> Any:
        path = self.path(module)
        self.stack.append(module)
        self.trace.calls[path] += 1
        self.trace.rows[path] += next(iter(_shape((*args, *kwargs.values()))), 1)
        self.trace.types[path] = type(module)
        try:
            return run(module, *args, **kwargs)
        finally:
            self.stack.pop()

    def on_reseed(self, name: str, function: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if self.in_event:
            return function(*args, **kwargs)
        key = self._key("reseed", name)
        self.trace.events.append(Event(key, self._type(), True, None))
        fixed = args or kwargs
        self.reseeds = (repr(args) + repr(kwargs),) if fixed else (*self.reseeds, key)
        if self.control.salt is not None and not fixed:
            self.reseeds = (*self.reseeds, self.counts[key])
        self.in_event += 1
        try:
            return function(*args, **kwargs)
        finally:
            self.in_event -= 1
            self._position = stream_position()

    def on_draw(self, name: str, function: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """A draw through Python's or numpy's global generator."""
        if self.in_event:
            return function(*args, **kwargs)
        event = Event(self._key("draw", name), self._type(), True, None)
        with self._seeded(event.key):
            result = function(*args, **kwargs)
        event.shape = tuple(getattr(result, "shape", ()))
        self.trace.events.append(event)
        if self._forces(event):
            value = _range(name, args)[self.control.force or 0]
            if isinstance(result, float):
                return type(result)(value)
            if getattr(getattr(result, "dtype", None), "kind", "") == "f":
                result.fill(value)
        return result

    def on_function(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        if self.in_event:
            return func(*args, **kwargs)
        self._check_gap()
        try:
            return self._intercept(func, name, args, kwargs)
        finally:
            self._position = stream_position()

    def _check_gap(self) -> None:
        """Notice draws that no torch function announced since the last one."""
        if self._position is not None and stream_position() != self._position:
            self.gap = True

    def _intercept(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        known = classify(name, args, kwargs)
        if known is not None:
            kind, active, p = known
            event = Event(self._key(kind, name), self._type(), active, p, _shape(args))
            self.trace.events.append(event)
            if active and event.key in self.control.silent:
                args, kwargs, event.silenced = silenced(func, name, kind, args, kwargs)
            with self._seeded(event.key):
                return func(*args, **kwargs)
        if name in DRAWS or name in self.control.draws:
            return self._draw(func, name, args, kwargs)
        before = stream_position()
        self.in_event += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.in_event -= 1
        if stream_position() != before:
            self.control.draws.add(name)
            self._record_draw(self._key("draw", name), result, _shape((result,)))
        elif self.tracked:
            self._follow(name, args, kwargs, result)
        return result

    def _draw(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        key = self._key("draw", name)
        with self._seeded(key):
            start = stream_position()
            result = func(*args, **kwargs)
            drew = stream_position() != start or kwargs.get("generator") is not None
        if not drew:  # a function that draws only in some modes, such as rrelu
            return result
        event = self._record_draw(key, result, _shape((result,)))
        if (
            isinstance(result, Tensor)
            and self._forces(event)
            and (result.is_floating_point() or event.scalar)
        ):
            with torch.no_grad():
                result.data.fill_(_extreme(result, name, self.control.force))
                if self.control.single:
                    result.data[(0,) * result.ndim] = _extreme(result, name, not self.control.force)
        return result

    def _record_draw(self, key: Key, result: Any, shape: tuple[int, ...]) -> Event:
        event = Event(key, self._type(), True, None, shape, binary=key.name in _MASKING)
        self.trace.events.append(event)
        if isinstance(result, Tensor):
            self._track(result, event)
            self.noise.add(id(result))
        return event

    def _follow(self, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        """Follow drawn values through later functions, to learn what they are used for."""
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        for tensor in tensors:
            event = self.tracked.get(id(tensor))
            if event is None:
                continue
            if name in _STEERING:
                event.steers = True
            if name in _MASKING:
                event.binary = True
            others = [other for other in tensors if other is not tensor]
            if _zeroes(name, tensor, args, kwargs) and self._spreads(event, others, result):
                event.scales, event.axis = True, _axis(tensor, result)
            if isinstance(result, Tensor) and (result.numel() == tensor.numel() or name in _PASSING):
                self._track(result, event)
                if all(id(other) in self.noise for other in tensors):
                    self.noise.add(id(result))
            elif isinstance(result, tuple) and name in _PICKING:
                for part in result:
                    self._track(part, event)

    def _spreads(self, event: Event, others: list[Tensor], result: Any) -> bool:
        """Whether one drawn value acts on many others: not on the rows of a parameter, nor on more noise."""
        if any(isinstance(other, nn.Parameter) and _shape((result,)) == other.shape for other in others):
            return False
        if others and all(id(other) in self.noise for other in others):
            return False
        return event.scalar or any(other.numel() > math.prod(event.shape) for other in others)

    def _track(self, tensor: Tensor, event: Event) -> None:
        if tensor.layout is not torch.strided or tensor.is_nested:
            return
        self.tracked[id(tensor)] = event
        self._alive.append(tensor)

    # -- identity, seeds ---------------------------------------------------------------------------------

    def _key(self, kind: str, name: str) -> Key:
        module = self.stack[-1] if self.stack else self.model
        return Key(kind, name, self.path(module), *call_site())

    def _type(self) -> type:
        return type(self.stack[-1] if self.stack else self.model)

    def _forces(self, event: Event) -> bool:
        control = self.control
        return control.force is not None and (control.forced is None or event.key in control.forced)

    @contextmanager
    def _seeded(self, key: Key) -> Iterator[None]:
        self.in_event += 1
        try:
            if self.control.salt is None:
                yield
                return
            self.counts[key] += 1
            salt = self.control.resalt.get(key, self.control.salt)
            label = (salt, key, self.counts[key], self.reseeds)
            state = RandomState()
            seed_everything(
                int.from_bytes(hashlib.blake2b(repr(label).encode(), digest_size=7).digest(), "big")
            )
            try:
                yield
            finally:
                state.restore()
        finally:
            self.in_event -= 1


class _Functions(TorchFunctionMode):
    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__") or threading.get_ident() != self.tracer.thread:
            return func(*args, **(kwargs or {}))
        return self.tracer.on_function(func, name.split(".")[0], args, kwargs or {})


class _Operators(TorchDispatchMode):
    """Random operators and batch statistics that no torch function announced: scripted code, C++ code."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self.previous = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer, name = self.tracer, func.__name__.split(".")[0]
        unannounced = not tracer.in_event
        known = self._classify(name, args) if unannounced else None
        if known:
            kind, p = known
            event = self._record(kind, "batch_norm" if kind == "statistics" else kind, p, args)
            if event.key in tracer.control.silent:
                func, args, event.silenced = _silenced_operator(func, name, args)
        tracer.in_event += 1  # the operator itself passes through the function mode
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            tracer.in_event -= 1
        if unannounced and not known and torch.Tag.nondeterministic_seeded in func.tags:
            self._record("draw", name, None, (result,))
        self.previous = name
        return result

    def _classify(self, name: str, args: tuple) -> tuple[str, float | None] | None:
        if name in ("native_dropout", "_fused_dropout"):
            return "dropout", float(args[1])
        # at::dropout below Python: empty_like, bernoulli_(1 - p), div_(1 - p), multiply.
        if name == "bernoulli_" and self.previous.startswith("empty"):
            keep = args[1] if len(args) > 1 else 0.5
            return ("dropout", 1 - keep) if isinstance(keep, float) else None
        if "batch_norm" in name and "backward" not in name and len(args) > 5 and args[5] is True:
            return "statistics", None
        return None

    def _record(self, kind: str, name: str, p: float | None, values: tuple) -> Event:
        tracer = self.tracer
        event = Event(tracer._key(kind, name), tracer._type(), True, p, _shape(values))
        tracer.trace.events.append(event)
        return event


def _silenced_operator(func: Any, name: str, args: tuple) -> tuple[Any, tuple, bool]:
    """The same operator as in eval mode, its arguments, and whether there is such."""
    if name == "bernoulli_":
        return lambda mask, keep=0.5, generator=None: mask.fill_(keep), args, True
    if name == "native_dropout":
        return func, (*args[:2], False), True
    if args[3] is None or name == "_fused_dropout":
        return func, args, False
    return func, (*args[:5], False, *args[6:]), True


def _shape(values: tuple) -> tuple[int, ...]:
    dense = (value for value in values if isinstance(value, Tensor) and not value.is_nested)
    return next((tuple(value.shape) for value in dense), ())


# As good as zero, but above it: a layer that runs where `draw > 0` is never skipped.
_LOW = 2**-20


def _zeroes(name: str, mask: Tensor, args: tuple, kwargs: dict) -> bool:
    """Whether this call puts zeros where a mask says so."""
    if name in _SCALING:
        return True
    if name in ("masked_fill", "masked_fill_"):
        return _is_zero(argument(args, kwargs, 2, ("value",), None))
    if name in ("where", "__setitem__"):
        at = 0 if name == "where" else 1
        return len(args) == 3 and args[at] is mask and any(map(_is_zero, args[at + 1 :]))
    return False


def _axis(mask: Tensor, result: Any) -> int | None:
    """The only axis of the result along which a mask varies, 0 for a single value; None for the last axis."""
    ndim = result.ndim if isinstance(result, Tensor) else mask.ndim + 1
    first = ndim - mask.ndim if isinstance(result, Tensor) else 0
    sizes = zip(mask.shape, mask.stride(), strict=True)
    axes = [first + axis for axis, (n, stride) in enumerate(sizes) if n > 1 and stride] or [0]
    return axes[0] if len(axes) == 1 and (axes[0] == 0 or axes[0] < ndim - 1) else None


def _is_zero(value: Any) -> bool:
    return not value.any() if isinstance(value, Tensor) else value == 0


def _extreme(result: Tensor, name: str, force: int | bool | None) -> float:
    if name in ("randn", "normal", "normal_", "randn_like"):
        return 3.0 if force else -3.0
    if result.is_floating_point() and not name.startswith("bernoulli"):
        return 1.0 - 2**-11 if force else _LOW
    return 1.0 if force else 0.0


def _range(name: str, args: tuple) -> tuple[float, float]:
    if name.endswith(".uniform") and len(args) >= 2 and all(isinstance(a, (int, float)) for a in args[:2]):
        return float(args[0]), float(args[1])
    if name.endswith((".random", ".rand", ".random_sample", ".uniform")):
        return _LOW, 1.0 - 2**-11
    return -3.0, 3.0


def flags_of(model: nn.Module) -> dict[str, bool]:
    return {name: flag_of(module) for name, module in model.named_modules()}

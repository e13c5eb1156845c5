"""Process-wide hooks of a traced run: reads of the mode, module calls, random functions outside torch's ops.

They are in place only while a tracer is active, and only its thread is recorded.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from modeprobe.probe.randomness import numpy_random


class Listener(Protocol):
    """What the hooks report to."""

    thread: int

    def on_read(self, module: nn.Module) -> None: ...
    def on_call(self, module: nn.Module, args: tuple, kwargs: dict, run: Callable[..., Any]) -> Any: ...
    def on_draw(self, name: str, function: Callable[..., Any], args: tuple, kwargs: dict) -> Any: ...
    def on_reseed(self, name: str, function: Callable[..., Any], args: tuple, kwargs: dict) -> Any: ...


_listeners: list[Listener] = []
_lock = threading.RLock()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Report to `listener` until the end of the block; the previous listener hears nothing meanwhile."""
    with _lock:
        if not _listeners:
            _install()
        _listeners.append(listener)
        try:
            yield
        finally:
            _listeners.pop()
            if not _listeners:
                _uninstall()


def _current() -> Listener | None:
    listener = _listeners[-1] if _listeners else None
    return listener if listener is not None and listener.thread == threading.get_ident() else None


def _get_training(module: nn.Module) -> bool:
    listener = _current()
    if listener is not None:
        listener.on_read(module)
    return flag_of(module)


def _set_training(module: nn.Module, value: bool) -> None:
    module.__dict__["training"] = value


def flag_of(module: nn.Module) -> bool:
    """The mode of one module without reporting a read."""
    if "training" in module.__dict__:
        return bool(module.__dict__["training"])
    getter = getattr(type(module), "__getattr__", None)  # a scripted module keeps its mode outside __dict__
    try:
        return bool(getter(module, "training")) if getter else False
    except (AttributeError, RuntimeError, KeyError):
        return False


def set_flag(module: nn.Module, value: bool) -> None:
    """Write one module's mode as it is stored, past any overridden `train()`."""
    if "training" in module.__dict__:
        module.__dict__["training"] = value
    elif isinstance(module, torch.jit.ScriptModule):
        module.training = value


_undo: list[Callable[[], None]] = []


def _install() -> None:
    original_call = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        listener = _current()
        if listener is None:
            return original_call(module, *args, **kwargs)
        return listener.on_call(module, args, kwargs, original_call)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    _undo.append(lambda: setattr(nn.Module, "__call__", original_call))
    nn.Module.training = property(_get_training, _set_training)  # type: ignore[assignment]
    _undo.append(lambda: delattr(nn.Module, "training"))
    for name in ("seed", "manual_seed"):
        _replace(torch, name, f"torch.{name}", reseeds=True)
        _replace(torch.random, name, f"torch.{name}", reseeds=True)
    for name in ("manual_seed", "manual_seed_all", "seed", "seed_all"):
        _replace(torch.cuda, name, f"torch.cuda.{name}", reseeds=True)
    for holder, prefix in ((random, "random"), (numpy_random(), "numpy.random")):
        for name in dir(holder) if holder else ():
            if type(getattr(holder, name)).__name__ in ("method", "builtin_function_or_method"):
                if name == "seed":
                    _replace(holder, name, f"{prefix}.{name}", reseeds=True)
                elif not name.startswith("_") and name not in _NO_DRAW:
                    _replace(holder, name, f"{prefix}.{name}", reseeds=False)


_NO_DRAW = frozenset(
    {
        "getstate",
        "setstate",
        "get_state",
        "set_state",
        "get_bit_generator",
        "set_bit_generator",
        "default_rng",
    }
)


def _replace(holder: Any, name: str, label: str, reseeds: bool) -> None:
    original = getattr(holder, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        listener = _current()
        if listener is None:
            return original(*args, **kwargs)
        on = listener.on_reseed if reseeds else listener.on_draw
        return on(label, original, args, kwargs)

    setattr(holder, name, replaced)
    _undo.append(lambda: setattr(holder, name, original))


def _uninstall() -> None:
    while _undo:
        _undo.pop()()

"""Which implementation an operator runs on."""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from modeprobe import _extension

BACKENDS = ("auto", "native", "triton", "reference")

_selected = "auto"


class _Own(threading.local):
    name: str | None = None


_own = _Own()
_owned = False  # whether any layer has ever chosen: asking the thread is felt by a tensor of 16 elements


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Select the implementation of modeprobe's operators inside a ``with`` block.

    Args:
        name: ``"native"``, the compiled CPU and CUDA kernels; ``"triton"``, the Triton kernels;
            ``"reference"``, plain torch on any device; ``"auto"``, the first of these that the
            tensor's device can use.

    The choice holds for the whole process, like torch's own backend flags. A backward pass runs on
    the backend of its forward pass.

    Raises:
        ValueError: ``name`` is not one of the four.

    Example:
        >>> with mp.backend("reference"):
        ...     y = mp.functional.dropout(x, 0.1)
    """
    global _selected
    if name not in BACKENDS:
        raise ValueError(f"backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    previous, _selected = _selected, name
    try:
        yield
    finally:
        _selected = previous


@contextmanager
def own_backend(name: str) -> Iterator[None]:
    """:func:`backend` for this thread alone: nn.DataParallel runs the layers of its replicas at once."""
    global _owned
    _owned = True
    previous, _own.name = _own.name, name
    try:
        yield
    finally:
        _own.name = previous


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot run on ``device_type``; None if it can."""
    if name == "native":
        return _extension.why_not(device_type)
    if name == "triton":
        if not triton_installed():
            return "Triton is not installed; run: pip install 'modeprobe[triton]'"
        if device_type != "cuda" and not _interpreting():
            return (
                "Triton kernels run on CUDA tensors (or, with TRITON_INTERPRET=1, on the CPU), "
                f"not on {device_type!r}"
            )
    return None


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


_on_cpu, _on_cuda = _extension.built_for("cpu"), _extension.built_for("cuda")


def is_native(x: Tensor) -> bool:
    """Whether the backend in force for ``x`` is "native", in the fewest steps; not for compilers."""
    return ((x.is_cuda and _on_cuda) or (x.is_cpu and _on_cpu)) and ((_owned and _own.name) or _selected) in (
        "auto",
        "native",
    )


@functools.cache
def _automatic(device_type: str) -> str:
    if _extension.built_for(device_type):
        return "native"
    if device_type == "cuda" and triton_installed():
        return "triton"
    return "reference"


def _resolve(selected: str, device_type: str) -> str:
    if selected == "auto":
        return _automatic(device_type)
    reason = why_not(selected, device_type)
    if reason is not None:
        raise RuntimeError(f"backend {selected!r} cannot be used on {device_type!r} tensors: {reason}")
    return selected


# What torch.compiler.assume_constant_result does, without importing torch._dynamo for it.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(device_type: str) -> str:
    """The backend in force for tensors on ``device_type``: "native", "triton" or "reference".

    Raises:
        RuntimeError: the backend asked for cannot run there; the message says why and what to do.
    """
    if torch.compiler.is_compiling():
        # Dynamo guards on `_selected`, read here, and need not look into the rest.
        return _resolve(_selected, device_type)
    automatic = _automatic(device_type)
    selected = (_own.name or _selected) if _owned else _selected
    if selected == "auto" or selected == automatic:
        return automatic  # asking why not costs a tensor of 64 elements a quarter of its call
    return _resolve(selected, device_type)

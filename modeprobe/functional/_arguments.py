"""What the dropout functions share: errors that name the argument, what came, what is expected."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from modeprobe import mask
from modeprobe.ops.dropout import DTYPES, transforming

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def overridable(function: _Function) -> _Function:
    """``function`` as torch's are: subclasses of Tensor, function modes and ``torch.fx`` are asked first."""

    @functools.wraps(function)
    def asked(*args: object, **kwargs: object) -> Tensor:
        everything = (*args, *kwargs.values())
        if has_torch_function(everything):
            return handle_torch_function(asked, everything, *args, **kwargs)
        return function(*args, **kwargs)

    return asked  # type: ignore[return-value]


def probability(p: float | Tensor, device: torch.device, who: str) -> tuple[float, Tensor | None]:
    """``p`` as the pair that operators take: a float, or a float64 tensor with one element on ``device``."""
    if isinstance(p, Tensor):
        if p.numel() != 1 or p.is_complex():
            raise ValueError(
                f"{who}: p must be a float or a real tensor with one element, "
                f"got {p.dtype} of shape {tuple(p.shape)}"
            )
        p = p.detach().reshape(())
        if _readable(p) and not 0.0 <= p.item() <= 1.0:
            raise ValueError(f"{who}: p must be in [0, 1], got {p.item()}")
        return 0.0, p.to(device, torch.float64)
    try:
        value = float(p) if 0.0 <= p <= 1.0 else None
    except (TypeError, ValueError):
        raise TypeError(f"{who}: p must be a float or a tensor, got {type(p).__name__}") from None
    if value is None:
        raise ValueError(f"{who}: p must be in [0, 1], got {p}")
    return value, None


def _readable(p: Tensor) -> bool:
    """Whether ``p`` has a value now that takes no waiting: none while something traces or transforms."""
    if not p.is_cpu or is_compiling() or transforming():
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and type(p) is Tensor


def signed_offset(offset: int, who: str) -> int:
    """The uint64 ``offset`` as the int64 that operators take."""
    if not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"{who}: offset must be an int, got {type(offset).__name__}")
    if not 0 <= offset < 1 << 64:
        raise ValueError(f"{who}: offset must be in [0, 2**64), got {offset}")
    return offset - (1 << 64) if offset >= 1 << 63 else offset


def check_data(x: Tensor, who: str, name: str = "input") -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{who}: {name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.is_nested or x.layout is not torch.strided:
        kind = "a nested tensor of" if x.is_nested else "one of"
        raise TypeError(f"{who}: {name} must be a dense tensor, got {kind} layout {x.layout}")
    if type(x) is not Tensor and hasattr(x, "device_mesh"):
        raise TypeError(
            f"{who}: {name} must be a local tensor, got a {type(x).__name__}; call it on to_local(), "
            "with key= and offset= where ranks are to share one mask"
        )


def key_for(key: Tensor | None, device: torch.device, who: str) -> Tensor:
    """The caller's key, checked, or a fresh one."""
    if key is None:
        return mask.new_key(device)
    mask.check_key(key, who)
    if key.device != device:
        raise ValueError(f"{who}: key must be on the input's device, {device}, got {key.device}")
    return key


def inverted(scaling: str, who: str) -> bool:
    if scaling not in ("inverted", "classic"):
        raise ValueError(f'{who}: scaling must be "inverted" or "classic", got {scaling!r}')
    return scaling == "inverted"


def shared_dims(mask_shape: Sequence[int], shape: Sequence[int], who: str) -> list[int]:
    """The dimensions of ``shape`` along which a mask of ``mask_shape``, aligned at the end, is one."""
    missing = len(shape) - len(mask_shape)
    aligned = (1,) * missing + tuple(mask_shape)
    if missing < 0 or any(m not in (1, s) for m, s in zip(aligned, shape, strict=True)):
        raise ValueError(
            f"{who}: mask_shape must be broadcastable to the input's shape {tuple(shape)}, "
            f"got {tuple(mask_shape)}"
        )
    return [d for d, size in enumerate(aligned) if size == 1]

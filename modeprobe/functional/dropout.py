"""Dropout functions: arguments checked here, kernels chosen in :mod:`modeprobe.ops.dropout`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from modeprobe import mask
from modeprobe.ops import backend
from modeprobe.ops import dropout as ops


def _probability(p: float | Tensor, device: torch.device, who: str) -> tuple[float, Tensor | None]:
    """``p`` as the pair that operators take: a float, or a float64 tensor with one element on ``device``."""
    if isinstance(p, Tensor):
        if p.numel() != 1 or not (p.is_floating_point() or p.device.type == "cpu"):
            raise ValueError(
                f"{who}: p must be a float or a floating point tensor with one element, "
                f"got {p.dtype} of shape {tuple(p.shape)}"
            )
        return 0.0, p.detach().reshape(()).to(device, torch.float64)
    try:
        inside = 0.0 <= p <= 1.0
    except TypeError:
        raise TypeError(f"{who}: p must be a float or a tensor, got {type(p).__name__}") from None
    if not inside:
        raise ValueError(f"{who}: p must be in [0, 1], got {p}")
    return float(p), None


def _offset(offset: int, who: str) -> int:
    """The uint64 ``offset`` as the int64 that operators take."""
    if not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"{who}: offset must be an int, got {type(offset).__name__}")
    if not 0 <= offset < 1 << 64:
        raise ValueError(f"{who}: offset must be in [0, 2**64), got {offset}")
    return offset - (1 << 64) if offset >> 63 else offset


def _data(x: Tensor, who: str) -> None:
    if x.dtype not in ops.DTYPES:
        raise TypeError(f"{who}: input must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _key(key: Tensor, device: torch.device, who: str) -> Tensor:
    mask.check_key(key, who)
    if key.device != device:
        raise ValueError(f"{who}: key must be on the input's device, {device}, got {key.device}")
    return key


def _scaled(scaling: str, who: str) -> bool:
    if scaling not in ("inverted", "classic"):
        raise ValueError(f'{who}: scaling must be "inverted" or "classic", got {scaling!r}')
    return scaling == "inverted"


def dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    offset: int = 0,
    scaling: str = "inverted",
) -> Tensor:
    """Set each element to zero with probability ``p`` and scale the others by ``1 / (1 - p)``.

    Like :func:`torch.nn.functional.dropout`, under the mask contract: which elements are dropped depends on
    the key, their position and ``p`` only, not on device, dtype or number of threads. Nothing but the key, 16
    bytes, is saved for the backward pass. A dropped NaN or infinity becomes zero.

    Args:
        input: float16, bfloat16, float32 or float64, any shape. Positions count in memory order if the tensor
            is dense (contiguous, channels_last, transposed), else row-major.
        p: drop probability in [0, 1]. A tensor with one element on the input's device is read by the kernel,
            so nothing waits for the device and a new value does not recompile; on a GPU it is clamped to
            [0, 1] instead of checked. ``p`` gets no gradient.
        training: False returns ``input``, with classic scaling ``(1 - p) * input``.
        inplace: write the result into ``input``.
        key: int64 tensor of shape (2,) on the input's device, see :func:`modeprobe.mask.key`. By default a
            fresh one from torch's generator of that device.
        offset: index of the first element in the mask, in [0, 2^64). Shards of a tensor that share a key pass
            the number of elements before them and get their slice of the whole tensor's mask.
        scaling: "inverted", or "classic": no scaling in training, ``1 - p`` in evaluation.

    Returns:
        A tensor of the input's shape, dtype and, if it is dense, strides; else contiguous. With ``p=0`` or
        without ``training``, ``input`` itself.

    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the selected backend cannot run on this device.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            dropout, (input,), input, p, training, inplace, key=key, offset=offset, scaling=scaling
        )
    p_tensor = None
    if type(p) is not float or not 0.0 <= p <= 1.0:
        p, p_tensor = _probability(p, input.device, "dropout")
    scaled = scaling == "inverted" or _scaled(scaling, "dropout")
    if not training:
        if scaled:
            return input
        rest = 1.0 - (p if p_tensor is None else p_tensor.to(input.dtype))
        return input.mul_(rest) if inplace else input * rest
    if p_tensor is None and p == 0.0:
        return input
    if input.dtype not in ops.DTYPES:
        _data(input, "dropout")
    device = input.device
    if key is None:
        key = mask.new_key(device)
    else:
        _key(key, device, "dropout")
    if offset != 0:
        offset = _offset(offset, "dropout")
    run = ops.dropout_ if inplace else ops.dropout
    return run(input, key, p, offset, scaled, p_tensor, backend.resolve(device.type))


def dropout_mask(shape: Sequence[int] | int, p: float | Tensor, key: Tensor, offset: int = 0) -> Tensor:
    """The mask that :func:`dropout` would apply to a contiguous tensor.

    Args:
        shape: the tensor's shape.
        p: drop probability in [0, 1]; a float or a tensor with one element on the key's device.
        key: int64 tensor of shape (2,), see :func:`modeprobe.mask.key`.
        offset: index of the first element, in [0, 2^64).

    Returns:
        bool tensor of ``shape`` on the key's device; True where an element is kept.

    Raises:
        ValueError, TypeError: an argument is not as above.
    """
    mask.check_key(key, "dropout_mask")
    p, p_tensor = _probability(p, key.device, "dropout_mask")
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"dropout_mask: shape must not have negative sizes, got {sizes}")
    flat = ops.dropout_mask(key, math.prod(sizes), p, _offset(offset, "dropout_mask"), p_tensor)
    return flat.view(sizes)

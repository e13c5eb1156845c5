"""The dropout operators in plain torch, on any device: signatures and results of the compiled ones."""

from __future__ import annotations

import torch
from torch import Tensor

from modeprobe import mask


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one block of memory, each place once, in whatever order of dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def empty_output(x: Tensor) -> Tensor:
    """What dropout of ``x`` returns, uninitialised: the strides of ``x`` if it is dense, else contiguous."""
    return torch.empty_like(x) if is_dense(x) else torch.empty_like(x, memory_format=torch.contiguous_format)


def in_memory_order(mask_: Tensor, x: Tensor) -> Tensor:
    """A flat mask in the shape of ``x``, following its memory if it is dense."""
    return mask_.as_strided(x.shape, x.stride()) if is_dense(x) else mask_.view(x.shape)


def accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _apply(x: Tensor, kept: Tensor, p: float | Tensor, scaled: bool) -> Tensor:
    scale = mask.keep_scale(p, x.dtype) if scaled else 1.0
    y = torch.where(kept, x.to(accumulate_dtype(x)) * scale, 0.0).to(x.dtype)
    return empty_output(x).copy_(y)


def dropout(
    x: Tensor,
    key: Tensor,
    p: float,
    offset: int = 0,
    scaled: bool = True,
    p_tensor: Tensor | None = None,
) -> Tensor:
    rate = p if p_tensor is None else p_tensor.reshape(())
    kept = in_memory_order(mask.keep_mask((x.numel(),), rate, key, offset), x)
    return _apply(x, kept, rate, scaled)


def dropout_(
    x: Tensor,
    key: Tensor,
    p: float,
    offset: int = 0,
    scaled: bool = True,
    p_tensor: Tensor | None = None,
) -> None:
    x.copy_(dropout(x, key, p, offset, scaled, p_tensor))


def dropout_mask(
    key: Tensor, numel: int, p: float, offset: int = 0, p_tensor: Tensor | None = None
) -> Tensor:
    return mask.keep_mask((numel,), p if p_tensor is None else p_tensor.reshape(()), key, offset)

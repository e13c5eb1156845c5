"""The dropout operators in plain torch, on any device: signatures and results of the compiled ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modeprobe import mask
from modeprobe.reference import accumulate_dtype

ALPHA = -1.7580993408473766  # what SELU tends to: -scale * alpha


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


def _laid_out(x: Tensor, value: Tensor) -> Tensor:
    """``value`` in the dtype and, if that is dense, the strides of ``x``."""
    y = empty_output(x).copy_(value)
    # Dynamo of torch 2.11 loses the gradient of an output that an in-place operation returned.
    return y.clone() if torch.compiler.is_compiling() else y


def _rate(p: float, p_tensor: Tensor | None) -> float | Tensor:
    return p if p_tensor is None else p_tensor.reshape(())


def _flat_mask(x: Tensor, key: Tensor, p: float | Tensor, offset: int) -> Tensor:
    """A mask in the shape of ``x``, following its memory if it is dense."""
    kept = mask.keep_mask((x.numel(),), p, key, offset)
    return kept.as_strided(x.shape, x.stride()) if is_dense(x) else kept.view(x.shape)


def _shared_mask(
    x: Tensor, key: Tensor, p: float | Tensor, shared_dims: Sequence[int], offset: int
) -> Tensor:
    shape = [1 if d in shared_dims else size for d, size in enumerate(x.shape)]
    return mask.keep_mask(shape, p, key, offset)


def _drop(x: Tensor, kept: Tensor, p: float | Tensor, scaled: bool = True) -> Tensor:
    """``x`` scaled or +0, in the accumulate type."""
    scale = mask.keep_scale(p, x.dtype) if scaled else 1.0
    return torch.where(kept, x.to(accumulate_dtype(x)) * scale, 0.0)


def dropout(
    x: Tensor,
    key: Tensor,
    p: float,
    offset: int = 0,
    scaled: bool = True,
    p_tensor: Tensor | None = None,
) -> Tensor:
    rate = _rate(p, p_tensor)
    return _laid_out(x, _drop(x, _flat_mask(x, key, rate, offset), rate, scaled))


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
    return mask.keep_mask((numel,), _rate(p, p_tensor), key, offset)


def structured_dropout(
    x: Tensor,
    key: Tensor,
    p: float,
    shared_dims: Sequence[int],
    offset: int = 0,
    scaled: bool = True,
    p_tensor: Tensor | None = None,
) -> Tensor:
    rate = _rate(p, p_tensor)
    return _laid_out(x, _drop(x, _shared_mask(x, key, rate, shared_dims, offset), rate, scaled))


def alpha_parameters(
    p: float | Tensor, device: torch.device, dtype: torch.dtype, linear: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and shift of kept elements, and the value of dropped ones (Klambauer et al. 2017)."""
    rate = torch.as_tensor(p, dtype=torch.float64, device=device).clamp(0, 1)
    live = rate < 1
    a = torch.where(live, ((1 - rate) * (1 + rate * ALPHA**2)).rsqrt(), 0.0)
    shift = torch.zeros_like(a) if linear else -a * ALPHA * rate
    fill = torch.zeros_like(a) if linear else a * ALPHA + shift
    return a.to(dtype), shift.to(dtype), fill.to(dtype)


def alpha_dropout(
    x: Tensor,
    key: Tensor,
    p: float,
    shared_dims: Sequence[int],
    linear: bool = False,
    offset: int = 0,
    p_tensor: Tensor | None = None,
) -> Tensor:
    rate, acc = _rate(p, p_tensor), accumulate_dtype(x)
    if shared_dims:
        kept = _shared_mask(x, key, rate, shared_dims, offset)
    else:
        kept = _flat_mask(x, key, rate, offset)
    a, shift, fill = alpha_parameters(rate, x.device, acc, linear)
    return _laid_out(x, torch.where(kept, x.to(acc) * a + shift, fill))


def bias_dropout_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    key: Tensor,
    p: float,
    offset: int = 0,
    p_tensor: Tensor | None = None,
) -> Tensor:
    rate, acc = _rate(p, p_tensor), accumulate_dtype(x)
    summed = x.to(acc) if bias is None else x.to(acc) + bias.to(acc)
    kept = mask.keep_mask(x.shape, rate, key, offset)
    y = _drop(summed, kept, rate) + residual.to(acc)
    return y.to(x.dtype).contiguous()


def bias_dropout_add_backward(
    grad_output: Tensor, key: Tensor, p: float, offset: int = 0, p_tensor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    rate = _rate(p, p_tensor)
    kept = mask.keep_mask(grad_output.shape, rate, key, offset)
    grad = _drop(grad_output, kept, rate)
    total = grad.sum_to_size(grad.shape[-1:])
    return grad.to(grad_output.dtype).contiguous(), total.to(grad_output.dtype)


def softmax(scores: Tensor, mask_: Tensor | None) -> Tensor:
    """Softmax over the last dimension in the accumulate type; zeros where nothing takes part."""
    s = scores.to(accumulate_dtype(scores))
    if mask_ is not None:
        s = s.masked_fill(~mask_, -math.inf) if mask_.dtype == torch.bool else s + mask_.to(s.dtype)
    empty = (s == -math.inf).all(-1, keepdim=True)
    return s.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def softmax_dropout(
    scores: Tensor,
    mask_: Tensor | None,
    key: Tensor,
    p: float,
    save: bool,
    offset: int = 0,
    p_tensor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rate, probabilities = _rate(p, p_tensor), softmax(scores, mask_)
    kept = mask.keep_mask(scores.shape, rate, key, offset)
    saved = probabilities.to(scores.dtype).contiguous() if save else scores.new_empty(0)
    return _drop(probabilities, kept, rate).to(scores.dtype).contiguous(), saved


def softmax_dropout_backward(
    grad_output: Tensor,
    probabilities: Tensor,
    key: Tensor,
    p: float,
    offset: int = 0,
    p_tensor: Tensor | None = None,
) -> Tensor:
    rate = _rate(p, p_tensor)
    kept = mask.keep_mask(grad_output.shape, rate, key, offset)
    grad = _drop(grad_output, kept, rate)
    saved = probabilities.to(grad.dtype)
    grad = saved * (grad - (grad * saved).sum(-1, keepdim=True))
    return grad.to(grad_output.dtype).contiguous()

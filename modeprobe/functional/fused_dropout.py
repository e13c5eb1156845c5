"""Dropout in one pass with what stands before and after it."""

from __future__ import annotations

import torch
from torch import Tensor

from modeprobe.functional._arguments import check_data, key_for, overridable, probability, signed_offset
from modeprobe.ops import backend
from modeprobe.ops import dropout as ops


def _key(key: Tensor | None, p: float, p_tensor: Tensor | None, device: torch.device, who: str) -> Tensor:
    if key is None and p == 0.0 and p_tensor is None:
        # Nothing will be drawn, so the generator's state must not move either.
        return torch.zeros(2, dtype=torch.int64, device=device)
    return key_for(key, device, who)


def _autocast(a: Tensor, b: Tensor | None) -> bool:
    """Whether autocast is there to reconcile two floating point dtypes."""
    if b is None or a.dtype == b.dtype or a.dtype not in ops.DTYPES or b.dtype not in ops.DTYPES:
        return False
    kind = a.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


@overridable
def bias_dropout_add(
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    *,
    key: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """``residual + dropout(input + bias)`` in one pass, rounded once.

    The gradient of ``bias`` is summed in the pass that computes the gradient of ``input``; that of
    ``residual`` is the incoming gradient itself. 16 bytes are saved for it.

    Args:
        input: float16, bfloat16, float32 or float64, shape (*, C). Positions in the mask count row-major.
        bias: shape (C,), the input's dtype; or None.
        residual: the input's shape and dtype. Under autocast the three dtypes may differ, and are promoted as
            ``residual + (input + bias)`` promotes them.
        p: drop probability, as in :func:`modeprobe.functional.dropout`.
        training: False drops nothing.
        key, offset: as in :func:`modeprobe.functional.dropout`.

    Returns:
        The input's shape and (promoted) dtype, contiguous.

    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the selected backend cannot run on this device.
    """
    who = "bias_dropout_add"
    p, p_tensor = probability(p, input.device, who)
    if not training:
        p, p_tensor = 0.0, None
    check_data(input, who)
    if _autocast(input, bias) or _autocast(input, residual):
        dtype = torch.promote_types(input.dtype, residual.dtype)
        if bias is not None:
            dtype = torch.promote_types(dtype, bias.dtype)
            bias = bias.to(dtype)
        input, residual = input.to(dtype), residual.to(dtype)
    for name, tensor, shape in (("bias", bias, input.shape[-1:]), ("residual", residual, input.shape)):
        if tensor is not None and (
            tensor.shape != shape or tensor.dtype != input.dtype or tensor.device != input.device
        ):
            raise ValueError(
                f"{who}: {name} must be {input.dtype} of shape {tuple(shape)} on {input.device}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
            )
    if bias is not None and input.dim() == 0:
        raise ValueError(f"{who}: input must have at least one dimension, got shape ()")
    offset = signed_offset(offset, who)
    key = _key(key, p, p_tensor, input.device, who)
    name = backend.resolve(input.device.type)
    return ops.bias_dropout_add(input, bias, residual, key, p_tensor, p, offset, name)


@overridable
def softmax_dropout(
    scores: Tensor,
    p: float | Tensor = 0.5,
    mask: Tensor | None = None,
    training: bool = True,
    *,
    key: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """``dropout(softmax(scores + mask, dim=-1))``, as attention uses it, in one pass.

    Saved for the backward pass are the probabilities before dropout, one tensor, and the key.

    Args:
        scores: float16, bfloat16, float32 or float64, shape (*, L). Positions in the mask of dropout count
            row-major.
        p: drop probability, as in :func:`modeprobe.functional.dropout`.
        mask: which scores take part, as in :func:`torch.nn.functional.scaled_dot_product_attention`: a bool
            tensor that is True for those that do, or a tensor of the scores' dtype that is added to them;
            under autocast it is converted to that dtype, as there. It broadcasts to the scores' shape. A row
            in which nothing takes part gives zeros.
        training: False drops nothing.
        key, offset: as in :func:`modeprobe.functional.dropout`.

    Returns:
        The scores' shape and dtype, contiguous.

    Raises:
        ValueError, TypeError: an argument is not as above.
        RuntimeError: the selected backend cannot run on this device.
    """
    who = "softmax_dropout"
    p, p_tensor = probability(p, scores.device, who)
    if not training:
        p, p_tensor = 0.0, None
    check_data(scores, who, "scores")
    if scores.dim() == 0:
        raise ValueError(f"{who}: scores must have at least one dimension, got shape ()")
    if mask is not None:
        if _autocast(scores, mask):
            mask = mask.to(scores.dtype)
        if mask.dtype not in (torch.bool, scores.dtype) or mask.device != scores.device:
            raise ValueError(
                f"{who}: mask must be torch.bool or {scores.dtype} on {scores.device}, "
                f"got {mask.dtype} on {mask.device}"
            )
        missing = scores.dim() - mask.dim()
        if missing < 0 or any(
            m not in (1, s) for m, s in zip(mask.shape, scores.shape[missing:], strict=True)
        ):
            raise ValueError(
                f"{who}: mask must be broadcastable to the scores' shape {tuple(scores.shape)}, "
                f"got shape {tuple(mask.shape)}"
            )
        mask = mask.reshape((1,) * missing + tuple(mask.shape))
    offset = signed_offset(offset, who)
    key = _key(key, p, p_tensor, scores.device, who)
    return ops.softmax_dropout(scores, mask, key, p_tensor, p, offset, backend.resolve(scores.device.type))

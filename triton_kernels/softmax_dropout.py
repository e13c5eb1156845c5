"""dropout(softmax(scores + mask)) over the last dimension, and its backward: one program per row."""

import torch
import triton
import triton.language as tl

from ._mask import _keep, _load_key
from ._parameters import _factor, _threshold, accumulate_dtype, parameters, triton_acc
from .dropout import check_key, vector_width

# A row of at most so many elements stays in registers; a longer one is read twice.
MOST_IN_REGISTERS = 16384

_SCALARS = (
    "hi",
    "lo",
    "scale",
    "offset",
    "length",
    "size_1",
    "size_2",
    "stride_0",
    "stride_1",
    "stride_2",
    "stride_3",
)


@triton.jit
def _load_scores(
    scores_ptr, mask_ptr, position, mask_position, inside, ACC: tl.constexpr, BOOLEAN: tl.constexpr
):
    s = tl.load(scores_ptr + position, mask=inside, other=0.0).to(ACC)
    if mask_ptr is not None:
        if BOOLEAN:
            s = tl.where(tl.load(mask_ptr + mask_position, mask=inside, other=0) != 0, s, float("-inf"))
        else:
            s += tl.load(mask_ptr + mask_position, mask=inside, other=0.0).to(ACC)
    return tl.where(inside, s, float("-inf"))


@triton.jit
def _reduce_max(x):
    return tl.max(tl.max(x, axis=1), axis=0)


@triton.jit
def _reduce_sum(x):
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit(do_not_specialize=_SCALARS)
def _softmax_dropout_kernel(
    scores_ptr,  # (rows, length)
    mask_ptr,  # uint8 (BOOLEAN) or as scores, of four dimensions with the strides below, or None
    y_ptr,
    probabilities_ptr,  # as scores, or None
    key_ptr,
    parameters_ptr,
    hi,
    lo,
    scale,
    offset: tl.int64,  # element index of scores[0], a multiple of VEC
    length,
    size_1,
    size_2,
    stride_0: tl.int64,
    stride_1: tl.int64,
    stride_2: tl.int64,
    stride_3: tl.int64,
    BOOLEAN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK >= length
):
    row = tl.program_id(0).to(tl.int64)
    vector = tl.arange(0, BLOCK // VEC)[:, None]
    lane = tl.arange(0, VEC)[None, :]
    position = vector * VEC + lane
    scores_ptr += row * length
    if mask_ptr is not None:
        mask_ptr += row // size_2 // size_1 * stride_0 + row // size_2 % size_1 * stride_1
        mask_ptr += row % size_2 * stride_2
    units = length // VEC
    if WHOLE:
        inside = tl.broadcast_to(vector < units, (BLOCK // VEC, VEC))
        s = _load_scores(scores_ptr, mask_ptr, position, position * stride_3, inside, ACC, BOOLEAN)
        top = _reduce_max(s)
        top = tl.where(top == float("-inf"), 0.0, top)
        e = tl.exp(s - top)
        total = _reduce_sum(e)
    else:
        top = tl.full((), float("-inf"), ACC)
        total = tl.zeros((), ACC)
        done = tl.zeros((), tl.int32)
        while done < units:
            inside = tl.broadcast_to(done + vector < units, (BLOCK // VEC, VEC))
            at = done * VEC + position
            s = _load_scores(scores_ptr, mask_ptr, at, at * stride_3, inside, ACC, BOOLEAN)
            higher = tl.maximum(top, _reduce_max(s))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - safe) + _reduce_sum(tl.exp(s - safe))
            top = higher
            done += BLOCK // VEC
        top = tl.where(top == float("-inf"), 0.0, top)
    share = tl.where(total == 0.0, 0.0, 1.0 / total)  # nothing takes part: zeros
    key = _load_key(key_ptr)
    hi, lo = _threshold(parameters_ptr, hi, lo)
    factor = _factor(parameters_ptr, scale, 2, ACC)
    first = offset + row * length
    done = tl.zeros((), tl.int32)
    while done < units:
        inside = tl.broadcast_to(done + vector < units, (BLOCK // VEC, VEC))
        at = done * VEC + position
        if WHOLE:
            p = e * share
        else:
            s = _load_scores(scores_ptr, mask_ptr, at, at * stride_3, inside, ACC, BOOLEAN)
            p = tl.exp(s - top) * share
        if probabilities_ptr is not None:
            out = probabilities_ptr + row * length + at
            tl.store(out, p.to(probabilities_ptr.dtype.element_ty), mask=inside)
        keep = _keep(key, first + (done + vector) * VEC, lane, hi, lo, VEC)
        y = tl.where(keep, p, 0.0) * factor
        tl.store(y_ptr + row * length + at, y.to(y_ptr.dtype.element_ty), mask=inside)
        done += BLOCK // VEC


@triton.jit(do_not_specialize=_SCALARS)
def _softmax_dropout_backward_kernel(
    dy_ptr,  # (rows, length)
    probabilities_ptr,
    dx_ptr,
    key_ptr,
    parameters_ptr,
    hi,
    lo,
    scale,
    offset: tl.int64,
    length,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    vector = tl.arange(0, BLOCK // VEC)[:, None]
    lane = tl.arange(0, VEC)[None, :]
    position = vector * VEC + lane
    units = length // VEC
    key = _load_key(key_ptr)
    hi, lo = _threshold(parameters_ptr, hi, lo)
    factor = _factor(parameters_ptr, scale, 2, ACC)
    first = offset + row * length
    dot = tl.zeros((), ACC)
    done = tl.zeros((), tl.int32)
    d = tl.zeros((BLOCK // VEC, VEC), ACC)
    p = tl.zeros((BLOCK // VEC, VEC), ACC)
    while done < units:
        inside = tl.broadcast_to(done + vector < units, (BLOCK // VEC, VEC))
        at = row * length + (done * VEC + position)
        p = tl.load(probabilities_ptr + at, mask=inside, other=0.0).to(ACC)
        d = tl.load(dy_ptr + at, mask=inside, other=0.0).to(ACC)
        d = tl.where(_keep(key, first + (done + vector) * VEC, lane, hi, lo, VEC), d, 0.0) * factor
        dot += _reduce_sum(d * p)
        done += BLOCK // VEC
    done = tl.zeros((), tl.int32)
    while done < units:
        inside = tl.broadcast_to(done + vector < units, (BLOCK // VEC, VEC))
        at = row * length + (done * VEC + position)
        if not WHOLE:
            p = tl.load(probabilities_ptr + at, mask=inside, other=0.0).to(ACC)
            d = tl.load(dy_ptr + at, mask=inside, other=0.0).to(ACC)
            d = tl.where(_keep(key, first + (done + vector) * VEC, lane, hi, lo, VEC), d, 0.0) * factor
        dx = p * (d - dot)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        done += BLOCK // VEC


def _block(length: int) -> tuple[int, int]:
    """(elements of a row handled at once, warps)."""
    block = min(max(256, triton.next_power_of_2(length)), MOST_IN_REGISTERS)
    return block, min(16, max(1, block // 1024))


def _four_dimensions(mask: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, list[int], list[int]]:
    """The mask as four dimensions: (tensor, sizes of the middle two, strides)."""
    mask = mask.expand(shape)
    if mask.dim() > 4:
        mask = mask.reshape(-1, *shape[-3:])
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return mask, list(mask.shape[1:3]), list(mask.stride())


def launch_softmax_dropout(
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    key: torch.Tensor,
    p: float | torch.Tensor,
    save: bool,
    offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dropout(softmax(scores + mask, -1)), the probabilities before dropout, in scores' dtype, if ``save``).

    Args:
        scores: floating point; the mask's index is the row-major position.
        mask: None, bool (False takes no part) or of scores' dtype (added); broadcast to scores' shape.
        key, p, offset: as of :func:`launch_dropout_forward`.

    A row in which nothing takes part gives zeros.
    """
    check_key(key, scores.device)
    x = scores.contiguous()
    y = torch.empty_like(x)
    saved = torch.empty_like(x) if save else x.new_empty(0)
    if not x.numel():
        return y, saved
    values = parameters(p, x.device, accumulate_dtype(x.dtype))
    length = x.shape[-1]
    vector = vector_width(x.element_size(), length, offset)
    block, warps = _block(length)
    sizes, strides = [1, 1], [0, 0, 0, 0]
    boolean = mask is not None and mask.dtype == torch.bool
    if mask is not None:
        mask, sizes, strides = _four_dimensions(mask.view(torch.uint8) if boolean else mask, x.shape)
    _softmax_dropout_kernel[(x.numel() // length,)](
        x,
        mask,
        y,
        saved if save else None,
        key,
        *values[:4],
        offset,
        length,
        *sizes,
        *strides,
        boolean,
        triton_acc(x.dtype),
        block,
        vector,
        block >= length,
        num_warps=warps,
    )
    return y, saved


def launch_softmax_dropout_backward(
    grad_output: torch.Tensor,
    probabilities: torch.Tensor,
    key: torch.Tensor,
    p: float | torch.Tensor,
    offset: int = 0,
) -> torch.Tensor:
    """P * (d - sum(d * P, -1)) with d = dropout(grad_output) and P the saved probabilities."""
    check_key(key, grad_output.device)
    dy = grad_output.contiguous()
    dx = torch.empty_like(dy)
    if not dy.numel():
        return dx
    values = parameters(p, dy.device, accumulate_dtype(dy.dtype))
    length = dy.shape[-1]
    vector = vector_width(dy.element_size(), length, offset)
    block, warps = _block(length)
    _softmax_dropout_backward_kernel[(dy.numel() // length,)](
        dy,
        probabilities.contiguous(),
        dx,
        key,
        *values[:4],
        offset,
        length,
        triton_acc(dy.dtype),
        block,
        vector,
        block >= length,
        num_warps=warps,
    )
    return dx

"""dropout(softmax(scores + mask)) over the last dimension, and its backward: one program per row."""

import torch
import triton
import triton.language as tl

from ._mask import _keep, _load_key
from ._parameters import _factor, _threshold, accumulate_dtype, parameters, triton_acc
from ._sizes import next_power_of_2
from .dropout import check_key, vector_width

# A row of at most so many elements stays in registers; a longer one is read twice.
MOST_IN_REGISTERS = 16384

_SCALARS = (
    "hi",
    "lo",
    "scale",
    "offset",
    "units",
    "size_1",
    "size_2",
    "stride_0",
    "stride_1",
    "stride_2",
    "stride_3",
)


@triton.jit
def _load_scores(
    scores_ptr,
    mask_ptr,
    vector,
    lane,
    column,
    units,
    ACC: tl.constexpr,
    BOOLEAN: tl.constexpr,
    VEC: tl.constexpr,
):
    """A row's scores with its mask, -inf outside."""
    inside = tl.broadcast_to(vector < units, (vector.shape[0], VEC))
    position = vector * VEC + lane
    s = tl.load(scores_ptr + position, mask=inside, other=0.0).to(ACC)
    if mask_ptr is not None:
        if BOOLEAN:
            takes_part = tl.load(mask_ptr + position * column, mask=inside, other=0) != 0
            s = tl.where(takes_part, s, float("-inf"))
        else:
            s += tl.load(mask_ptr + position * column, mask=inside, other=0.0).to(ACC)
    return tl.where(inside, s, float("-inf"))


@triton.jit
def _store_dropped(
    y_ptr, probabilities_ptr, p, vector, lane, units, key, first, hi, lo, factor, VEC: tl.constexpr
):
    inside = tl.broadcast_to(vector < units, (vector.shape[0], VEC))
    if probabilities_ptr is not None:
        saved = p.to(probabilities_ptr.dtype.element_ty)
        tl.store(probabilities_ptr + (vector * VEC + lane), saved, mask=inside)
    y = tl.where(_keep(key, first + vector * VEC, lane, hi, lo, VEC), p, 0.0) * factor
    tl.store(y_ptr + (vector * VEC + lane), y.to(y_ptr.dtype.element_ty), mask=inside)


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
    units,  # vectors in a row
    size_1,
    size_2,
    stride_0: tl.int64,
    stride_1: tl.int64,
    stride_2: tl.int64,
    stride_3: tl.int64,
    BOOLEAN: tl.constexpr,
    MASK_VECTORS: tl.constexpr,  # stride_3 is 1 and the other strides count vectors
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK >= a row
):
    row = tl.program_id(0).to(tl.int64)
    vector = tl.arange(0, BLOCK // VEC)[:, None]
    lane = tl.arange(0, VEC)[None, :]
    scores_ptr += row * units * VEC
    y_ptr += row * units * VEC
    if probabilities_ptr is not None:
        probabilities_ptr += row * units * VEC
    if mask_ptr is not None:
        start = (
            row // size_2 // size_1 * stride_0 + row // size_2 % size_1 * stride_1 + row % size_2 * stride_2
        )
        if MASK_VECTORS:
            start = start * VEC
        mask_ptr += start
    column = stride_3
    if MASK_VECTORS:
        column = 1
    if WHOLE:
        s = _load_scores(scores_ptr, mask_ptr, vector, lane, column, units, ACC, BOOLEAN, VEC)
        top = _reduce_max(s)
        top = tl.where(top == float("-inf"), 0.0, top)
        e = tl.exp(s - top)
        total = _reduce_sum(e)
    else:
        top = tl.full((), float("-inf"), ACC)
        total = tl.zeros((), ACC)
        done = tl.zeros((), tl.int32)
        while done < units:
            s = _load_scores(scores_ptr, mask_ptr, done + vector, lane, column, units, ACC, BOOLEAN, VEC)
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
    first = offset + row * units * VEC
    if WHOLE:
        _store_dropped(
            y_ptr, probabilities_ptr, e * share, vector, lane, units, key, first, hi, lo, factor, VEC
        )
    else:
        done = tl.zeros((), tl.int32)
        while done < units:
            at = done + vector
            s = _load_scores(scores_ptr, mask_ptr, at, lane, column, units, ACC, BOOLEAN, VEC)
            p = tl.exp(s - top) * share
            _store_dropped(y_ptr, probabilities_ptr, p, at, lane, units, key, first, hi, lo, factor, VEC)
            done += BLOCK // VEC


@triton.jit
def _load_gradient(
    dy_ptr,
    probabilities_ptr,
    vector,
    lane,
    units,
    key,
    first,
    hi,
    lo,
    factor,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
):
    inside = tl.broadcast_to(vector < units, (vector.shape[0], VEC))
    p = tl.load(probabilities_ptr + (vector * VEC + lane), mask=inside, other=0.0).to(ACC)
    d = tl.load(dy_ptr + (vector * VEC + lane), mask=inside, other=0.0).to(ACC)
    return tl.where(_keep(key, first + vector * VEC, lane, hi, lo, VEC), d, 0.0) * factor, p


@triton.jit
def _store_gradient(dx_ptr, p, d, dot, vector, lane, units, VEC: tl.constexpr):
    inside = tl.broadcast_to(vector < units, (vector.shape[0], VEC))
    dx = p * (d - dot)
    tl.store(dx_ptr + (vector * VEC + lane), dx.to(dx_ptr.dtype.element_ty), mask=inside)


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
    units,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    vector = tl.arange(0, BLOCK // VEC)[:, None]
    lane = tl.arange(0, VEC)[None, :]
    dy_ptr += row * units * VEC
    probabilities_ptr += row * units * VEC
    dx_ptr += row * units * VEC
    key = _load_key(key_ptr)
    hi, lo = _threshold(parameters_ptr, hi, lo)
    factor = _factor(parameters_ptr, scale, 2, ACC)
    first = offset + row * units * VEC
    if WHOLE:
        d, p = _load_gradient(
            dy_ptr, probabilities_ptr, vector, lane, units, key, first, hi, lo, factor, ACC, VEC
        )
        _store_gradient(dx_ptr, p, d, _reduce_sum(d * p), vector, lane, units, VEC)
    else:
        dot = tl.zeros((), ACC)
        done = tl.zeros((), tl.int32)
        while done < units:
            d, p = _load_gradient(
                dy_ptr, probabilities_ptr, done + vector, lane, units, key, first, hi, lo, factor, ACC, VEC
            )
            dot += _reduce_sum(d * p)
            done += BLOCK // VEC
        done = tl.zeros((), tl.int32)
        while done < units:
            d, p = _load_gradient(
                dy_ptr, probabilities_ptr, done + vector, lane, units, key, first, hi, lo, factor, ACC, VEC
            )
            _store_gradient(dx_ptr, p, d, dot, done + vector, lane, units, VEC)
            done += BLOCK // VEC


def _block(length: int) -> tuple[int, int]:
    """(elements of a row handled at once, warps): 16 elements a thread, 32 in the longest rows."""
    block = min(max(256, next_power_of_2(length)), MOST_IN_REGISTERS)
    if length > block:
        block = 4096
    return block, min(16, max(1, block // 512))


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
    in_vectors = strides[3] == 1 and not any(stride % vector for stride in strides[:3])
    if in_vectors:
        strides = [stride // vector for stride in strides]
    _softmax_dropout_kernel[(x.numel() // length,)](
        x,
        mask,
        y,
        saved if save else None,
        key,
        *values[:4],
        offset,
        length // vector,
        *sizes,
        *strides,
        boolean,
        in_vectors,
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
        length // vector,
        triton_acc(dy.dtype),
        block,
        vector,
        block >= length,
        num_warps=warps,
    )
    return dx

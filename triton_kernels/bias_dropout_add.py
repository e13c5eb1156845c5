"""residual + dropout(x + bias) in one pass, and its backward with the bias gradient in the same pass."""

import torch
import triton
import triton.language as tl

from ._layout import Layout, channel_tile
from ._mask import _keep, _load_key
from ._parameters import _factor, _threshold, accumulate_dtype, parameters, triton_acc
from ._sizes import cdiv, next_power_of_2
from .batch_norm_backward import _sum_splits_kernel
from .batch_norm_statistics import slices, unroll_for
from .dropout import check_key, vector_width

_SCALARS = ("hi", "lo", "scale", "vectors", "rows", "offset", "width", "per_split")


@triton.jit(do_not_specialize=_SCALARS)
def _bias_dropout_add_kernel(
    x_ptr,  # (rows, width * VEC)
    bias_ptr,  # (width * VEC) or None
    residual_ptr,  # as x
    y_ptr,
    key_ptr,
    parameters_ptr,  # int64 (5) or None: then hi, lo and scale count
    hi,
    lo,
    scale,  # the bits of ACC
    vectors: tl.int64,
    offset: tl.int64,  # element index of x[0], a multiple of VEC
    width,  # in vectors
    ACC: tl.constexpr,
    VECTORS: tl.constexpr,
    VEC: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * VECTORS
    vector = tl.arange(0, VECTORS)[:, None]
    lane = tl.arange(0, VEC)[None, :]
    known = vector < tl.minimum(vectors - start, VECTORS).to(tl.int32)
    inside = tl.broadcast_to(known, (VECTORS, VEC))
    position = vector * VEC + lane
    x = tl.load(x_ptr + start * VEC + position, mask=inside, other=0.0).to(ACC)
    residual = tl.load(residual_ptr + start * VEC + position, mask=inside, other=0.0).to(ACC)
    if bias_ptr is not None:
        column = ((start % width).to(tl.int32) + vector) % width
        x += tl.load(bias_ptr + (column * VEC + lane), mask=inside, other=0.0).to(ACC)
    hi, lo = _threshold(parameters_ptr, hi, lo)
    keep = _keep(_load_key(key_ptr), offset + (start + vector) * VEC, lane, hi, lo, VEC)
    y = residual + tl.where(keep, x, 0.0) * _factor(parameters_ptr, scale, 2, ACC)
    tl.store(y_ptr + start * VEC + position, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SCALARS)
def _bias_dropout_add_backward_kernel(
    dy_ptr,  # (rows, width * VEC)
    dx_ptr,
    sums_ptr,  # ACC (splits, width * VEC)
    key_ptr,
    parameters_ptr,
    hi,
    lo,
    scale,
    rows: tl.int64,
    offset: tl.int64,
    width,
    per_split,  # rows in one split, a multiple of UNROLL * ROWS
    ACC: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Tiles have shape (COLUMNS, ROWS, VEC): Triton spreads threads over the last axis, then the first."""
    start = tl.program_id(1).to(tl.int64) * per_split
    left = tl.minimum(rows - start, per_split).to(tl.int32)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    lane = tl.arange(0, VEC)[None, None, :]
    key = _load_key(key_ptr)
    hi, lo = _threshold(parameters_ptr, hi, lo)
    scale = _factor(parameters_ptr, scale, 2, ACC)
    total = tl.zeros((COLUMNS, ROWS, VEC), ACC)
    done = tl.zeros((), tl.int32)
    while done < left:
        for part in tl.static_range(UNROLL):
            base = (start + done + part * ROWS) * width
            vector = row * width + column
            inside = (done + part * ROWS + row < left) & (column < width)
            inside = tl.broadcast_to(inside, (COLUMNS, ROWS, VEC))
            dy = tl.load(dy_ptr + base * VEC + (vector * VEC + lane), mask=inside, other=0.0).to(ACC)
            keep = _keep(key, offset + (base + vector) * VEC, lane, hi, lo, VEC)
            dx = tl.where(keep, dy, 0.0) * scale
            tl.store(dx_ptr + base * VEC + (vector * VEC + lane), dx.to(dx_ptr.dtype.element_ty), mask=inside)
            total += dx
        done += UNROLL * ROWS
    element = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    known = tl.broadcast_to(element < width, (COLUMNS, VEC))
    element = element * VEC + tl.arange(0, VEC)[None, :]
    tl.store(sums_ptr + tl.program_id(1) * (width * VEC) + element, tl.sum(total, axis=1), mask=known)


def launch_bias_dropout_add(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    key: torch.Tensor,
    p: float | torch.Tensor,
    offset: int = 0,
) -> torch.Tensor:
    """residual + dropout(x + bias), rounded once; the mask's index is the row-major position.

    Args:
        x, residual: of one shape and floating dtype. bias: (x.size(-1)) or None.
        key, p, offset: as of :func:`launch_dropout_forward`.
    """
    check_key(key, x.device)
    x, residual = x.contiguous(), residual.contiguous()
    y = torch.empty_like(x)
    if not x.numel():
        return y
    values = parameters(p, x.device, accumulate_dtype(x.dtype))
    width = x.numel() if bias is None else x.shape[-1]
    vector = vector_width(x.element_size(), width, offset)
    vectors = x.numel() // vector
    block = 256 if vectors >= 1 << 17 else 128
    _bias_dropout_add_kernel[(cdiv(vectors, block),)](
        x,
        None if bias is None else bias.contiguous(),
        residual,
        y,
        key,
        *values[:4],
        vectors,
        offset,
        width // vector,
        triton_acc(x.dtype),
        block,
        vector,
        num_warps=4,
    )
    return y


def launch_bias_dropout_add_backward(
    grad_output: torch.Tensor, key: torch.Tensor, p: float | torch.Tensor, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_input = dropout(grad_output), grad_bias = its sum over all but the last dimension, in a fixed
    order)."""
    check_key(key, grad_output.device)
    dy = grad_output.contiguous()
    dx = torch.empty_like(dy)
    width = dy.shape[-1]
    if not dy.numel():
        return dx, dy.new_zeros(width)
    acc = accumulate_dtype(dy.dtype)
    values = parameters(p, dy.device, acc)
    rows = dy.numel() // width
    vector = vector_width(dy.element_size(), width, offset)
    tile_rows, columns = channel_tile(Layout(rows, width, 1, True, vector))
    unroll = unroll_for(rows, tile_rows, 2)
    groups = cdiv(width // vector, columns)
    per_split, splits = slices(rows, unroll * tile_rows, groups)
    parts = torch.empty((splits, width), dtype=acc, device=dy.device)
    _bias_dropout_add_backward_kernel[(groups, splits)](
        dy,
        dx,
        parts,
        key,
        *values[:4],
        rows,
        offset,
        width // vector,
        per_split,
        triton_acc(dy.dtype),
        unroll,
        tile_rows,
        columns,
        vector,
        num_warps=4,
    )
    if splits == 1:
        return dx, parts[0].to(dy.dtype)
    total = torch.empty(width, dtype=acc, device=dy.device)
    block = min(64, next_power_of_2(width))
    _sum_splits_kernel[(cdiv(width, block),)](
        parts, total, splits, width, min(32, next_power_of_2(splits)), block, num_warps=4
    )
    return dx, total.to(dy.dtype)

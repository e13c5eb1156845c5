"""Gradients of batch normalisation and its epilogue: two sums per channel, then one pass for the input."""

import torch
import triton
import triton.language as tl

from ._epilogue import _gradient_tile, _key_of, _load_vectors, _scalars, _store_vectors
from ._launch import launch
from ._layout import Layout, _advance, _walk, channel_tile
from ._parameters import _from_bits, accumulate_dtype, bits_of, parameters, triton_acc
from ._sizes import cdiv, next_power_of_2
from .batch_norm_forward import _channel_of, _load_affine, vectors_per_program
from .batch_norm_statistics import slices, unroll_for

_SCALARS = (
    "vectors",
    "rows",
    "batch",
    "channels",
    "spatial",
    "per_split",
    "share",
    "slope",
    "hi",
    "lo",
    "scale",
)


@triton.jit(do_not_specialize=_SCALARS)
def _batch_norm_backward_reduce_kernel(
    dy_ptr,  # (batch, channels, spatial * VEC)
    x_ptr,
    sums_ptr,  # ACC (splits, 2, channels): sum(dz), sum(dz * (x - mean) * invstd)
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    signs_ptr,
    key_ptr,
    batch,
    channels,
    spatial,  # in vectors
    per_split,  # vectors of a channel in one split, a multiple of UNROLL * ROWS
    slope,
    hi,
    lo,
    scale,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
):
    channel = tl.program_id(0).to(INDEX)
    split = tl.program_id(1).to(INDEX)
    start = split * per_split
    stop = tl.minimum(start + per_split, batch.to(INDEX) * spatial)
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, VEC)[None, :]
    mean, invstd, factor, bias = _load_affine(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, True, 0.0, ACC, False
    )
    slope, hi, lo, scale = _scalars(slope, hi, lo, scale, ACC)
    epilogue = (residual_ptr, signs_ptr, key_ptr, _key_of(key_ptr), slope, hi, lo, scale)
    sum_dz = tl.zeros((ROWS, VEC), ACC)
    sum_dz_x = tl.zeros((ROWS, VEC), ACC)
    inner, offset, turn, step, jump = _walk(start, row, channel, channels, spatial, ROWS)
    base = start
    while base < stop:
        for part in tl.static_range(UNROLL):
            inside = tl.broadcast_to(base + part * ROWS + row < stop, (ROWS, VEC))
            place = (tl.zeros((), tl.int64), offset, lane, inside)
            x = _load_vectors(x_ptr, place, ACC, VEC)
            dz = _gradient_tile(dy_ptr, x, (mean, factor, bias), epilogue, place, ACTIVATION, ACC, VEC)
            sum_dz += dz
            sum_dz_x += tl.where(inside, dz * (x - mean), 0.0)
            inner, offset = _advance(inner, offset, turn, step, jump, spatial)
        base += UNROLL * ROWS
    sums_ptr += split * (2 * channels)
    tl.store(sums_ptr + channel, tl.sum(tl.sum(sum_dz, axis=1), axis=0))
    tl.store(sums_ptr + channels + channel, tl.sum(tl.sum(sum_dz_x, axis=1), axis=0) * invstd)


@triton.jit(do_not_specialize=_SCALARS)
def _batch_norm_backward_reduce_channels_last_kernel(
    dy_ptr,  # (batch, channels * VEC)
    x_ptr,
    sums_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    signs_ptr,
    key_ptr,
    batch: tl.int64,
    channels,  # in vectors
    per_split,  # rows in one split, a multiple of UNROLL * ROWS
    slope,
    hi,
    lo,
    scale,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    split = tl.program_id(1).to(tl.int64)
    start = split * per_split
    left = tl.minimum(batch - start, per_split).to(tl.int32)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)[None, :, None]
    lane = tl.arange(0, VEC)
    channel = column[:, None] * VEC + lane[None, :]
    known = tl.broadcast_to((column < channels)[:, None], (COLUMNS, VEC))
    mean, invstd, factor, bias = _load_affine(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, known, 0.0, ACC, False
    )
    affine = (mean[:, None, :], factor[:, None, :], bias[:, None, :])
    slope, hi, lo, scale = _scalars(slope, hi, lo, scale, ACC)
    epilogue = (residual_ptr, signs_ptr, key_ptr, _key_of(key_ptr), slope, hi, lo, scale)
    sum_dz = tl.zeros((COLUMNS, ROWS, VEC), ACC)
    sum_dz_x = tl.zeros((COLUMNS, ROWS, VEC), ACC)
    done = tl.zeros((), tl.int32)
    while done < left:
        for part in tl.static_range(UNROLL):
            base = (start + done + part * ROWS) * channels
            offset = row * channels + column[:, None, None]
            inside = (done + part * ROWS + row < left) & (column < channels)[:, None, None]
            inside = tl.broadcast_to(inside, (COLUMNS, ROWS, VEC))
            place = (base, offset, lane[None, None, :], inside)
            x = _load_vectors(x_ptr, place, ACC, VEC)
            dz = _gradient_tile(dy_ptr, x, affine, epilogue, place, ACTIVATION, ACC, VEC)
            sum_dz += dz
            sum_dz_x += tl.where(inside, dz * (x - affine[0]), 0.0)
        done += UNROLL * ROWS
    sums_ptr += split * (2 * channels * VEC)
    tl.store(sums_ptr + channel, tl.sum(sum_dz, axis=1), mask=known)
    tl.store(sums_ptr + channels * VEC + channel, tl.sum(sum_dz_x, axis=1) * invstd, mask=known)


@triton.jit(do_not_specialize=("splits", "width"))
def _sum_splits_kernel(parts_ptr, sums_ptr, splits, width, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """(splits, width) -> (width), in a fixed order."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), parts_ptr.dtype.element_ty)
    base = tl.zeros((), tl.int32)
    while base < splits:
        split = base + tl.arange(0, SPLITS)[:, None]
        inside = (split < splits) & (column < width)[None, :]
        part = tl.load(parts_ptr + split.to(tl.int64) * width + column[None, :], mask=inside, other=0.0)
        total += tl.sum(part, axis=0)
        base += SPLITS
    tl.store(sums_ptr + column, total, mask=column < width)


@triton.jit
def _store_gradients(
    dx_ptr,
    dresidual_ptr,
    place,
    x,
    dz,
    affine,
    invstd,
    mean_dz,
    mean_dz_x,  # of dz * xhat
    BATCH: tl.constexpr,
    VEC: tl.constexpr,
):
    if dresidual_ptr is not None:
        _store_vectors(dresidual_ptr, place, dz, VEC)
    if dx_ptr is not None:
        mean, factor, _bias = affine
        dx = dz
        if BATCH:
            dx = dz - mean_dz - (x - mean) * invstd * mean_dz_x
        _store_vectors(dx_ptr, place, dx * factor, VEC)


@triton.jit(do_not_specialize=_SCALARS)
def _batch_norm_backward_input_kernel(
    dy_ptr,  # (batch, channels, spatial * VEC)
    x_ptr,  # or None: neither BATCH nor an activation to recompute
    dx_ptr,  # or None
    dresidual_ptr,  # or None
    sums_ptr,  # ACC (2, channels), times `share`: means of dz and of dz * xhat; None unless BATCH
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    signs_ptr,
    key_ptr,
    vectors: tl.int64,
    channels,
    spatial,  # in vectors
    share,
    slope,
    hi,
    lo,
    scale,
    BATCH: tl.constexpr,  # the statistics depend on x
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    VECTORS: tl.constexpr,
    LONG: tl.constexpr,
    VEC: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * VECTORS
    offset = tl.arange(0, VECTORS)[:, None]
    lane = tl.arange(0, VEC)[None, :]
    known = offset < tl.minimum(vectors - start, VECTORS).to(tl.int32)
    inside = tl.broadcast_to(known, (VECTORS, VEC))
    channel = _channel_of(start, spatial, channels, VECTORS, LONG)
    mean, invstd, factor, bias = _load_affine(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, known, 0.0, ACC, False
    )
    slope, hi, lo, scale = _scalars(slope, hi, lo, scale, ACC)
    epilogue = (residual_ptr, signs_ptr, key_ptr, _key_of(key_ptr), slope, hi, lo, scale)
    affine = (mean, factor, bias)
    place = (start, offset, lane, inside)
    x = None
    if x_ptr is not None:
        x = _load_vectors(x_ptr, place, ACC, VEC)
    mean_dz = None
    mean_dz_x = None
    if BATCH:
        mean_dz = tl.load(sums_ptr + channel, mask=known, other=0.0) * _from_bits(share, ACC)
        mean_dz_x = tl.load(sums_ptr + channels + channel, mask=known, other=0.0) * _from_bits(share, ACC)
    dz = _gradient_tile(dy_ptr, x, affine, epilogue, place, ACTIVATION, ACC, VEC)
    _store_gradients(dx_ptr, dresidual_ptr, place, x, dz, affine, invstd, mean_dz, mean_dz_x, BATCH, VEC)


@triton.jit(do_not_specialize=_SCALARS)
def _batch_norm_backward_input_channels_last_kernel(
    dy_ptr,  # (rows, channels * VEC)
    x_ptr,
    dx_ptr,
    dresidual_ptr,
    sums_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    signs_ptr,
    key_ptr,
    rows: tl.int64,
    channels,  # in vectors
    share,
    slope,
    hi,
    lo,
    scale,
    BATCH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * (TILES * ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, VEC)
    channel = column[:, None] * VEC + lane[None, :]
    known = tl.broadcast_to((column < channels)[:, None], (COLUMNS, VEC))
    mean, invstd, factor, bias = _load_affine(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, known, 0.0, ACC, False
    )
    affine = (mean[:, None, :], factor[:, None, :], bias[:, None, :])
    slope, hi, lo, scale = _scalars(slope, hi, lo, scale, ACC)
    epilogue = (residual_ptr, signs_ptr, key_ptr, _key_of(key_ptr), slope, hi, lo, scale)
    mean_dz = None
    mean_dz_x = None
    if BATCH:
        width = channels * VEC
        mean_dz = tl.load(sums_ptr + channel, mask=known, other=0.0)[:, None, :] * _from_bits(share, ACC)
        mean_dz_x = tl.load(sums_ptr + width + channel, mask=known, other=0.0)
        mean_dz_x = mean_dz_x[:, None, :] * _from_bits(share, ACC)
    row = tl.arange(0, ROWS)[None, :, None]
    left = tl.minimum(rows - start, TILES * ROWS).to(tl.int32)
    for tile in tl.static_range(TILES):
        inside = (tile * ROWS + row < left) & (column < channels)[:, None, None]
        inside = tl.broadcast_to(inside, (COLUMNS, ROWS, VEC))
        base = start * channels
        offset = (tile * ROWS + row) * channels + column[:, None, None]
        place = (base, offset, lane[None, None, :], inside)
        x = None
        if x_ptr is not None:
            x = _load_vectors(x_ptr, place, ACC, VEC)
        dz = _gradient_tile(dy_ptr, x, affine, epilogue, place, ACTIVATION, ACC, VEC)
        _store_gradients(
            dx_ptr, dresidual_ptr, place, x, dz, affine, invstd[:, None, :], mean_dz, mean_dz_x, BATCH, VEC
        )


def launch_batch_norm_sums(
    dy: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    slope: float = 0.01,
    key: torch.Tensor | None = None,
    p: float = 0.0,
    sign_bits: torch.Tensor | None = None,
) -> torch.Tensor:
    """acc (2, C): sum(dz) and sum(dz * (x - mean) * invstd), the gradients of bias and weight.

    dy, x and residual lie in memory as ``layout`` says.
    """
    acc = accumulate_dtype(x.dtype)
    if not x.numel():
        return x.new_zeros((2, layout.channels), dtype=acc)
    values = parameters(p, x.device, acc)
    tensors = (statistics[0], statistics[1], weight, bias, residual, sign_bits, key)
    scalars = (bits_of(slope, acc), values.hi, values.lo, values.scale, activation, triton_acc(x.dtype))
    if layout.channels_last:
        rows, columns = channel_tile(layout)
        unroll = unroll_for(layout.batch, rows, 2 if key is not None else 4)
        channels = layout.channels // layout.vector
        groups = cdiv(channels, columns)
        per_split, splits = slices(layout.batch, unroll * rows, groups)
        parts = x.new_empty((splits, 2, layout.channels), dtype=acc)
        launch(
            _batch_norm_backward_reduce_channels_last_kernel,
            (groups, splits),
            4,
            dy,
            x,
            parts,
            *tensors,
            layout.batch,
            channels,
            per_split,
            *scalars,
            unroll,
            rows,
            columns,
            layout.vector,
        )
    else:
        vectors = layout.batch * layout.spatial // layout.vector
        rows = min(128, max(32, next_power_of_2(vectors)))
        unroll = unroll_for(vectors, rows, 2 if key is not None else 4)
        per_split, splits = slices(vectors, unroll * rows, layout.channels)
        parts = x.new_empty((splits, 2, layout.channels), dtype=acc)
        index = tl.int64 if x.numel() + (1 << 16) > 2**31 else tl.int32
        launch(
            _batch_norm_backward_reduce_kernel,
            (layout.channels, splits),
            rows // 32,
            dy,
            x,
            parts,
            *tensors,
            layout.batch,
            layout.channels,
            layout.spatial // layout.vector,
            per_split,
            *scalars,
            index,
            unroll,
            rows,
            layout.vector,
        )
    if splits == 1:
        return parts[0]
    sums = torch.empty_like(parts[0])
    width = 2 * layout.channels
    columns = min(64, next_power_of_2(width))
    launch(
        _sum_splits_kernel,
        (cdiv(width, columns),),
        4,
        parts,
        sums,
        splits,
        width,
        min(32, next_power_of_2(splits)),
        columns,
    )
    return sums


def launch_batch_norm_input_gradient(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    layout: Layout,
    statistics: torch.Tensor,
    sums: torch.Tensor | None,
    share: float,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    need_input: bool,
    need_residual: bool,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    slope: float = 0.01,
    key: torch.Tensor | None = None,
    p: float = 0.0,
    sign_bits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_input, grad_residual), empty where not needed; ``share * sums`` are the means of dz and of
    dz * xhat, None for given statistics."""
    dx = torch.empty_like(dy) if need_input else dy.new_empty(0)
    dresidual = torch.empty_like(dy) if need_residual else dy.new_empty(0)
    if not dy.numel() or not (need_input or need_residual):
        return dx, dresidual
    acc = accumulate_dtype(dy.dtype)
    values = parameters(p, dy.device, acc)
    tensors = (
        dy,
        x,
        dx if need_input else None,
        dresidual if need_residual else None,
        sums,
        statistics[0],
        statistics[1],
        weight,
        bias,
        residual,
        sign_bits,
        key,
    )
    scalars = (
        bits_of(share, acc),
        bits_of(slope, acc),
        values.hi,
        values.lo,
        values.scale,
        sums is not None,
        activation,
        triton_acc(dy.dtype),
    )
    if layout.channels_last:
        rows, columns = channel_tile(layout)
        channels = layout.channels // layout.vector
        tiles = 4 if layout.batch * channels >= 1 << 17 else 1
        grid = (cdiv(layout.batch, tiles * rows), cdiv(channels, columns))
        launch(
            _batch_norm_backward_input_channels_last_kernel,
            grid,
            4,
            *tensors,
            layout.batch,
            channels,
            *scalars,
            tiles,
            rows,
            columns,
            layout.vector,
        )
    else:
        spatial = layout.spatial // layout.vector
        vectors = dy.numel() // layout.vector
        block = min(256, vectors_per_program(vectors))
        launch(
            _batch_norm_backward_input_kernel,
            (cdiv(vectors, block),),
            4,
            *tensors,
            vectors,
            layout.channels,
            spatial,
            *scalars,
            block,
            spatial >= block,
            layout.vector,
        )
    return dx, dresidual

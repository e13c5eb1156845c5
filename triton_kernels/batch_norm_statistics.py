"""Batch statistics: partial moments over slices of the batch, merged in a fixed order by a second kernel,
which also updates the running buffers."""

import torch
import triton
import triton.language as tl

from ._launch import launch
from ._layout import Layout, _advance, _vector_of, _walk, channel_tile, layout_of
from ._moments import _finite_or_zero, _join_count, _merge, _merge_axis, _split_count
from ._parameters import _from_bits, accumulate_dtype, bits_of, triton_acc
from ._sizes import cdiv, next_power_of_2

_INTEGERS = ("batch", "channels", "spatial", "per_split")


@triton.jit(do_not_specialize=_INTEGERS)
def _batch_norm_moments_kernel(
    x_ptr,  # (batch, channels, spatial * VEC)
    moments_ptr,  # ACC (splits, 2 * channels + 2): mean, M2, count % 2^24, count / 2^24
    batch,
    channels,
    spatial,  # in vectors
    per_split,  # vectors of a channel in one split, a multiple of UNROLL * ROWS
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    VEC: tl.constexpr,
):
    """One channel and one slice of it: each thread takes the moments of UNROLL vectors in registers, in two
    passes over them, and merges those."""
    channel = tl.program_id(0).to(INDEX)
    split = tl.program_id(1).to(INDEX)
    vectors = batch.to(INDEX) * spatial
    start = split * per_split
    stop = tl.minimum(start + per_split, vectors)
    # Triton spreads threads over the last axis, then the first: the middle one stays in a thread's registers.
    row = tl.arange(0, ROWS)[:, None, None] + tl.arange(0, UNROLL)[None, :, None] * ROWS
    lane = tl.arange(0, VEC)[None, None, :]
    # Moments of x - pivot: a constant channel has variance 0 exactly, and a large mean does not cancel.
    pivot = tl.load(x_ptr + _vector_of(start, channel, channels, spatial) * VEC)
    outside = _finite_or_zero(pivot.to(ACC)).to(pivot.dtype)
    pivot = outside.to(ACC)
    inner, position, turn, step, jump = _walk(start, row, channel, channels, spatial, UNROLL * ROWS)
    n = tl.zeros((ROWS,), ACC)
    mean = tl.zeros((ROWS,), ACC)
    m2 = tl.zeros((ROWS,), ACC)
    base = start
    while base < stop:
        known = base + row < stop
        inside = tl.broadcast_to(known, (ROWS, UNROLL, VEC))
        x = tl.load(x_ptr + (position * VEC + lane), mask=inside, other=outside).to(ACC) - pivot
        tile_n = tl.sum(tl.sum(known.to(ACC), axis=2), axis=1) * VEC
        tile_mean = tl.sum(tl.sum(x, axis=2), axis=1) / tl.maximum(tile_n, 1)
        x -= tile_mean[:, None, None]
        if base + UNROLL * ROWS > stop:
            x = tl.where(inside, x, 0.0)
        n, mean, m2 = _merge(n, mean, m2, tile_n, tile_mean, tl.sum(tl.sum(x * x, axis=2), axis=1))
        inner, position = _advance(inner, position, turn, step, jump, spatial)
        base += UNROLL * ROWS
    n, mean, m2 = _merge_axis(n, mean, m2)
    moments_ptr += split * (2 * channels + 2)
    tl.store(moments_ptr + channel, mean + pivot)
    tl.store(moments_ptr + channels + channel, m2)
    if channel == 0:
        low, high = _split_count((stop - start).to(tl.int64) * VEC, ACC)
        tl.store(moments_ptr + 2 * channels, low)
        tl.store(moments_ptr + 2 * channels + 1, high)


@triton.jit(do_not_specialize=_INTEGERS)
def _batch_norm_moments_channels_last_kernel(
    x_ptr,  # (batch, channels * VEC)
    moments_ptr,
    batch,
    channels,  # in vectors
    per_split,  # rows in one split, a multiple of UNROLL * ROWS
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # in elements
    VEC: tl.constexpr,
):
    """A group of neighbouring channels and one slice of the rows: each thread holds VEC channels."""
    split = tl.program_id(1).to(INDEX)
    width = channels.to(INDEX) * VEC
    start = split * per_split
    stop = tl.minimum(start + per_split, batch)
    # Triton spreads threads over the last axis, then the first: the middle one stays in a thread's registers.
    row = tl.arange(0, ROWS)[:, None, None] + tl.arange(0, UNROLL)[None, :, None] * ROWS
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < channels * VEC
    pivot = tl.load(x_ptr + start * width + column, mask=known, other=0.0)
    outside = _finite_or_zero(pivot.to(ACC)).to(pivot.dtype)
    pivot = outside.to(ACC)
    outside = tl.broadcast_to(outside[None, None, :], (ROWS, UNROLL, COLUMNS))
    n = tl.zeros((ROWS, 1), ACC)
    mean = tl.zeros((ROWS, COLUMNS), ACC)
    m2 = tl.zeros((ROWS, COLUMNS), ACC)
    base = start
    while base < stop:
        inside = ((base + row) < stop) & known[None, None, :]
        position = (base + row) * width + column[None, None, :]
        x = tl.load(x_ptr + position, mask=inside, other=outside).to(ACC) - pivot[None, None, :]
        tile_n = tl.sum((base + row < stop).to(ACC), axis=1)
        tile_mean = tl.sum(x, axis=1) / tl.maximum(tile_n, 1)
        x -= tile_mean[:, None, :]
        if base + UNROLL * ROWS > stop:
            x = tl.where(inside, x, 0.0)
        n, mean, m2 = _merge(n, mean, m2, tile_n, tile_mean, tl.sum(x * x, axis=1))
        base += UNROLL * ROWS
    n, mean, m2 = _merge_axis(n, mean, m2)
    moments_ptr += split * (2 * width + 2)
    tl.store(moments_ptr + column, mean + pivot, mask=known)
    tl.store(moments_ptr + width + column, m2, mask=known)
    if tl.program_id(0) == 0:
        low, high = _split_count((stop - start).to(tl.int64), ACC)
        tl.store(moments_ptr + 2 * width, low)
        tl.store(moments_ptr + 2 * width + 1, high)


@triton.jit
def _merge_splits(moments_ptr, splits, channels, column, known, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Moments of COLUMNS channels over all splits, and their count (int64)."""
    ACC: tl.constexpr = moments_ptr.dtype.element_ty
    width = 2 * channels + 2
    n = tl.zeros((COLUMNS,), ACC)
    mean = tl.zeros((COLUMNS,), ACC)
    m2 = tl.zeros((COLUMNS,), ACC)
    count = tl.zeros((), tl.int64)
    # Relative to the first, so that splits of equal means have equal means exactly.
    pivot = _finite_or_zero(tl.load(moments_ptr + column, mask=known, other=0.0))
    base = tl.zeros((), tl.int32)
    while base < splits:
        split = base + tl.arange(0, SPLITS)
        row = moments_ptr + split.to(tl.int64) * width
        low = tl.load(row + 2 * channels, mask=split < splits, other=0.0)
        high = tl.load(row + 2 * channels + 1, mask=split < splits, other=0.0)
        counts = _join_count(low, high)
        count += tl.sum(counts, axis=0)
        inside = (split < splits)[:, None] & known[None, :]
        part_mean = tl.load(row[:, None] + column[None, :], mask=inside, other=0.0)
        part_mean = tl.where(inside, part_mean - pivot[None, :], 0.0)
        part_m2 = tl.load(row[:, None] + (channels + column)[None, :], mask=inside, other=0.0)
        part_n = tl.broadcast_to(counts.to(ACC)[:, None], (SPLITS, COLUMNS))
        part_n, part_mean, part_m2 = _merge_axis(part_n, part_mean, part_m2)
        n, mean, m2 = _merge(n, mean, m2, part_n, part_mean, part_m2)
        base += SPLITS
    return count, mean + pivot, m2


@triton.jit
def _fold(running_ptr, channel, folded, factor, value):
    """Folds a batch's values into a running buffer, or None; a factor of 1 assigns, so that it heals NaN."""
    if running_ptr is not None:
        old = tl.load(running_ptr + channel, mask=folded, other=0.0).to(value.dtype)
        new = tl.where(factor == 1.0, value, (1.0 - factor) * old + factor * value)
        tl.store(running_ptr + channel, new.to(running_ptr.dtype.element_ty), mask=folded)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit(do_not_specialize=("splits", "channels", "momentum", "eps"))
def _batch_norm_merge_kernel(
    moments_ptr,  # ACC (splits, 2 * channels + 2)
    mean_ptr,  # ACC (channels)
    second_ptr,  # ACC (channels): see SECOND
    count_ptr,  # ACC (1), two digits where SECOND is "m2", or None
    running_mean_ptr,  # (channels) or None
    running_var_ptr,
    tracked_ptr,  # int64, one element, or None: batches that the running buffers have seen
    skipped_ptr,  # int64, one element, or None: batches left out because not finite
    splits,
    channels,
    momentum,  # bits of ACC
    eps,  # bits of ACC
    CUMULATIVE: tl.constexpr,  # momentum is 1 / batches
    SECOND: tl.constexpr,  # "invstd", "variance" or "m2"
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merges the moments and folds them into the running buffers.

    One program where CUMULATIVE or skipped_ptr makes a channel depend on what all see; else any number.
    """
    ACC: tl.constexpr = moments_ptr.dtype.element_ty
    first = tl.program_id(0) * COLUMNS
    stride = tl.num_programs(0) * COLUMNS
    update = True
    if skipped_ptr is not None:
        bad = tl.zeros((), tl.int32)
        base = first
        while base < channels:
            column = base + tl.arange(0, COLUMNS)
            known = column < channels
            count, mean, m2 = _merge_splits(moments_ptr, splits, channels, column, known, SPLITS, COLUMNS)
            bad += tl.sum((known & ((_finite(mean) & _finite(m2)) == 0)).to(tl.int32), axis=0)
            base += stride
        update = bad == 0
        if bad != 0:
            tl.store(skipped_ptr, tl.load(skipped_ptr) + 1)
    factor = _from_bits(momentum, ACC)
    if tracked_ptr is not None:
        tracked = tl.load(tracked_ptr) + 1
        if CUMULATIVE:
            factor = 1.0 / tracked.to(ACC)
            tl.debug_barrier()  # read by all threads before one writes
        if update & (first == 0):
            tl.store(tracked_ptr, tracked)
    base = first
    while base < channels:
        column = base + tl.arange(0, COLUMNS)
        known = column < channels
        count, mean, m2 = _merge_splits(moments_ptr, splits, channels, column, known, SPLITS, COLUMNS)
        total = count.to(ACC)
        if SECOND == "m2":
            second = m2
        elif SECOND == "variance":
            second = m2 / tl.maximum(total, 1.0)
        else:
            second = 1.0 / tl.sqrt(m2 / tl.maximum(total, 1.0) + _from_bits(eps, ACC))
        tl.store(mean_ptr + column, mean, mask=known)
        tl.store(second_ptr + column, second, mask=known)
        folded = known & update & (count > 1)  # one value has no unbiased variance
        _fold(running_mean_ptr, column, folded, factor, mean)
        _fold(running_var_ptr, column, folded, factor, m2 / (count - 1).to(ACC))
        if count_ptr is not None and SECOND == "m2":
            low, high = _split_count(count, ACC)
            tl.store(count_ptr, low)
            tl.store(count_ptr + 1, high)
        elif count_ptr is not None:
            tl.store(count_ptr, total)
        base += stride


def _partial_moments(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """x in memory as ``layout`` says -> (splits, 2 * C + 2)."""
    acc = accumulate_dtype(x.dtype)
    index = tl.int64 if x.numel() + (1 << 16) > 2**31 else tl.int32
    if layout.channels_last:
        rows, columns = channel_tile(layout)
        unroll = unroll_for(layout.batch, rows, 4)
        groups = cdiv(layout.channels, columns * layout.vector)
        per_split, splits = slices(layout.batch, unroll * rows, groups)
        moments = x.new_empty((splits, 2 * layout.channels + 2), dtype=acc)
        launch(
            _batch_norm_moments_channels_last_kernel,
            (groups, splits),
            4,
            x,
            moments,
            layout.batch,
            layout.channels // layout.vector,
            per_split,
            triton_acc(x.dtype),
            index,
            unroll,
            rows,
            columns * layout.vector,
            layout.vector,
        )
        return moments
    vectors = layout.batch * layout.spatial // layout.vector
    rows = min(128, max(32, next_power_of_2(vectors)))
    unroll = unroll_for(vectors, rows, 4)
    per_split, splits = slices(vectors, unroll * rows, layout.channels)
    moments = x.new_empty((splits, 2 * layout.channels + 2), dtype=acc)
    launch(
        _batch_norm_moments_kernel,
        (layout.channels, splits),
        rows // 32,
        x,
        moments,
        layout.batch,
        layout.channels,
        layout.spatial // layout.vector,
        per_split,
        triton_acc(x.dtype),
        index,
        unroll,
        rows,
        layout.vector,
    )
    return moments


def unroll_for(total: int, rows: int, most: int) -> int:
    """How many groups of ``rows`` a loop takes at once, a power of two: no more than there are."""
    return min(most, next_power_of_2(cdiv(total, rows)))


def slices(total: int, step: int, others: int, programs: int = 2048) -> tuple[int, int]:
    """(size of a slice, a multiple of ``step``; number of slices) for about ``programs`` programs in all."""
    slices = max(1, min(cdiv(total, step), programs // max(others, 1)))
    size = cdiv(cdiv(total, slices), step) * step
    return size, cdiv(total, size)


def _launch_merge(
    moments: torch.Tensor,
    mean: torch.Tensor,
    second: torch.Tensor,
    count: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
    skipped_batches: torch.Tensor | None,
    momentum: float | None,
    eps: float,
    kind: str,
) -> None:
    splits, channels = moments.shape[0], (moments.shape[1] - 2) // 2
    columns = min(64, next_power_of_2(max(channels, 1)))
    cumulative = momentum is None
    alone = skipped_batches is not None or (cumulative and num_batches_tracked is not None)
    launch(
        _batch_norm_merge_kernel,
        (1 if alone else max(1, cdiv(channels, columns)),),
        4,
        moments,
        mean,
        second,
        count,
        running_mean,
        running_var,
        num_batches_tracked,
        skipped_batches,
        splits,
        channels,
        bits_of(momentum or 0.0, moments.dtype),
        bits_of(eps, moments.dtype),
        cumulative,
        kind,
        min(32, next_power_of_2(splits)),
        columns,
    )


def launch_batch_norm_moments(x: torch.Tensor) -> torch.Tensor:
    """(N, C, *) -> acc (2 * C + 2): mean, M2 = sum((x - mean)^2), n mod 2^24, n div 2^24; zeros if n = 0."""
    x, layout = layout_of(x)
    channels = layout.channels
    if not x.numel():
        return x.new_zeros(2 * channels + 2, dtype=accumulate_dtype(x.dtype))
    parts = _partial_moments(x, layout)
    if parts.shape[0] == 1:
        return parts[0]
    out = torch.empty_like(parts[0])
    _launch_merge(parts, out, out[channels:], out[2 * channels :], None, None, None, None, 0.0, 0.0, "m2")
    return out


def launch_batch_norm_merge(
    moments: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
    skipped_batches: torch.Tensor | None,
    momentum: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moments (K, 2 * C + 2) merged -> mean (C), biased variance (C), count (1), all in the moments' dtype;
    buffers are updated as in :func:`launch_batch_norm_statistics`."""
    channels = (moments.shape[1] - 2) // 2
    mean, variance = moments.new_empty(channels), moments.new_empty(channels)
    count = moments.new_empty(1)
    _launch_merge(
        moments.contiguous(),
        mean,
        variance,
        count,
        running_mean,
        running_var,
        num_batches_tracked,
        skipped_batches,
        momentum,
        0.0,
        "variance",
    )
    return mean, variance, count


def launch_batch_norm_statistics(
    x: torch.Tensor,
    layout: Layout,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
    skipped_batches: torch.Tensor | None,
    momentum: float | None,
    eps: float,
) -> torch.Tensor:
    """acc (2, C): mean and 1 / sqrt(biased variance + eps).

    Where given, ``num_batches_tracked`` is counted up and the buffers become
    ``(1 - f) * running + f * batch``, f = momentum or, where that is None, 1 / num_batches_tracked; the
    variance is unbiased; f = 1 assigns. With ``skipped_batches``, a batch with a non-finite mean or variance
    in any channel changes only that count. A batch of fewer than two values per channel is only counted.
    """
    acc = accumulate_dtype(x.dtype)
    if x.numel():
        moments = _partial_moments(x, layout)
    else:
        moments = x.new_zeros((1, 2 * layout.channels + 2), dtype=acc)
    statistics = torch.empty((2, layout.channels), dtype=acc, device=x.device)
    _launch_merge(
        moments,
        statistics[0],
        statistics[1],
        None,
        running_mean,
        running_var,
        num_batches_tracked,
        skipped_batches,
        momentum,
        eps,
        "invstd",
    )
    return statistics

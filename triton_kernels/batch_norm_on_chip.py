"""Batch normalisation of a small layer in one launch: a program holds all data of its channels in registers.

x (and dy) is read once, and no second kernel waits for the first. There is no ticket by which the last
program of a larger layer could finalise: tickets start at zero, and zeroing them is a launch, too.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._epilogue import _forward_tile, _gradient_tile, _key_of, _load_vectors, _scalars
from ._launch import launch
from ._layout import Layout
from ._moments import _finite_or_zero
from ._parameters import _from_bits, accumulate_dtype, bits_of, parameters, triton_acc
from ._sizes import cdiv, next_power_of_2
from .batch_norm_backward import _store_gradients
from .batch_norm_forward import SignBits, _load_affine, _load_channel
from .batch_norm_statistics import _fold

_SCALARS = ("rows", "channels", "spatial", "momentum", "eps", "share", "slope", "hi", "lo", "scale")
_BYTES = 32 << 10  # of the accumulate type per program: 32 registers a thread of eight warps
_SECTOR = 32  # bytes: programs side by side read no shorter pieces of a row
_PROGRAMS = 128  # as many keep a GPU busy


class Tile(NamedTuple):
    """How a layer is cut: ``programs`` of (columns, rows) vectors. Contiguous: one channel each; channels
    last: neighbouring vectors of channels."""

    programs: int
    rows: int
    columns: int
    warps: int


def on_chip_tile(x: torch.Tensor, layout: Layout) -> Tile | None:
    """None where the data of the channels that a program would own do not fit into its registers."""
    vectors = layout.batch * layout.spatial // (1 if layout.channels_last else layout.vector)
    rows, columns = next_power_of_2(max(vectors, 1)), 1
    most = _BYTES // accumulate_dtype(x.dtype).itemsize // layout.vector
    groups = layout.channels
    if layout.channels_last:
        groups //= layout.vector
        least = min(next_power_of_2(groups), max(1, _SECTOR // (layout.vector * x.element_size())))
        columns = max(least, min(8, next_power_of_2(groups)))
        while columns > least and (columns * rows > most or groups < _PROGRAMS * columns):
            columns //= 2
    if not x.numel() or columns * rows > most or x.numel() >= 1 << 31:
        return None
    warps = min(8, max(1, columns * rows * layout.vector // 512))
    return Tile(cdiv(groups, columns), rows, columns, warps)


@triton.jit
def _tile(
    rows,
    channels,
    spatial,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    """(channel, known, first, place): the program's channels, of shape (COLUMNS, 1, VEC) or, contiguous,
    (1, 1, 1); which of them there are; their first elements in memory; the place of (COLUMNS, ROWS, VEC)."""
    row = tl.arange(0, ROWS)[None, :, None]
    lane = tl.arange(0, VEC)[None, None, :]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[:, None, None]
    if CHANNELS_LAST:
        offset = row * channels + column
        channel = column * VEC + lane
        first = channel
    else:
        image = row // spatial
        offset = (image * channels + column) * spatial + (row - image * spatial)
        channel = column
        first = column * spatial * VEC
    inside = tl.broadcast_to((column < channels) & (row < rows), (COLUMNS, ROWS, VEC))
    known = tl.broadcast_to(column < channels, channel.shape)
    return channel, known, first, (tl.zeros((), tl.int64), offset, lane, inside)


@triton.jit
def _per_channel(tile, CHANNELS_LAST: tl.constexpr):
    """Sums over the elements of each channel."""
    total = tl.sum(tile, axis=1, keep_dims=True)
    if not CHANNELS_LAST:
        total = tl.sum(total, axis=2, keep_dims=True)
    return total


@triton.jit(do_not_specialize=_SCALARS)
def _batch_norm_on_chip_forward_kernel(
    x_ptr,
    y_ptr,
    mean_ptr,  # ACC (channels), an output, as invstd_ptr
    invstd_ptr,
    weight_ptr,  # (channels) or None
    bias_ptr,
    running_mean_ptr,  # (channels) or None
    running_var_ptr,
    tracked_ptr,  # int64, one element, or None
    residual_ptr,  # as x, or None
    signs_ptr,  # uint8, or None
    key_ptr,  # int64 (2), or None: no dropout
    rows,  # vectors of a channel; CHANNELS_LAST: pixels
    channels,  # CHANNELS_LAST: in vectors
    spatial,  # in vectors
    momentum,  # bits of ACC, as eps, slope and scale
    eps,
    slope,
    hi,
    lo,
    scale,
    CHANNELS_LAST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    channel, known, first, place = _tile(rows, channels, spatial, CHANNELS_LAST, ROWS, COLUMNS, VEC)
    inside = place[3]
    x = _load_vectors(x_ptr, place, ACC, VEC)
    count = rows
    if not CHANNELS_LAST:
        count = rows * VEC
    # Relative to the first element: a constant channel has variance 0, and a large mean does not cancel.
    pivot = _finite_or_zero(tl.load(x_ptr + first, mask=known, other=0.0).to(ACC))
    relative = tl.where(inside, x - pivot, 0.0)
    center = _per_channel(relative, CHANNELS_LAST) / count.to(ACC)
    relative = tl.where(inside, relative - center, 0.0)
    m2 = _per_channel(relative * relative, CHANNELS_LAST)
    mean = pivot + center
    invstd = 1.0 / tl.sqrt(m2 / count.to(ACC) + _from_bits(eps, ACC))
    tl.store(mean_ptr + channel, mean, mask=known)
    tl.store(invstd_ptr + channel, invstd, mask=known)
    factor = _from_bits(momentum, ACC)
    _fold(running_mean_ptr, channel, known, factor, mean)
    _fold(running_var_ptr, channel, known, factor, m2 / (count - 1).to(ACC))
    if tracked_ptr is not None:
        tracked = tl.load(tracked_ptr, mask=tl.program_id(0) == 0, other=0)
        tl.store(tracked_ptr, tracked + 1, mask=tl.program_id(0) == 0)
    bias = _load_channel(bias_ptr, channel, known, 0.0, ACC)
    affine = (mean, invstd * _load_channel(weight_ptr, channel, known, 1.0, ACC), bias)
    slope, hi, lo, scale = _scalars(slope, hi, lo, scale, ACC)
    epilogue = (residual_ptr, signs_ptr, key_ptr, _key_of(key_ptr), slope, hi, lo, scale)
    _forward_tile(x, y_ptr, affine, epilogue, place, ACTIVATION, VEC)


@triton.jit(do_not_specialize=_SCALARS)
def _batch_norm_on_chip_backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    dresidual_ptr,  # or None
    dweight_ptr,  # (channels) or None
    dbias_ptr,
    mean_ptr,
    invstd_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    signs_ptr,
    key_ptr,
    rows,
    channels,
    spatial,
    share,  # 1 / elements of a channel, in bits
    slope,
    hi,
    lo,
    scale,
    CHANNELS_LAST: tl.constexpr,
    BATCH: tl.constexpr,  # the statistics depend on x
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    channel, known, _first, place = _tile(rows, channels, spatial, CHANNELS_LAST, ROWS, COLUMNS, VEC)
    mean, invstd, factor, bias = _load_affine(
        mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channel, known, 0.0, ACC, False
    )
    affine = (mean, factor, bias)
    slope, hi, lo, scale = _scalars(slope, hi, lo, scale, ACC)
    epilogue = (residual_ptr, signs_ptr, key_ptr, _key_of(key_ptr), slope, hi, lo, scale)
    x = _load_vectors(x_ptr, place, ACC, VEC)
    dz = _gradient_tile(dy_ptr, x, affine, epilogue, place, ACTIVATION, ACC, VEC)
    sum_dz = _per_channel(dz, CHANNELS_LAST)
    sum_dz_x = _per_channel(tl.where(place[3], dz * (x - mean), 0.0), CHANNELS_LAST) * invstd
    if dbias_ptr is not None:
        tl.store(dbias_ptr + channel, sum_dz.to(dbias_ptr.dtype.element_ty), mask=known)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + channel, sum_dz_x.to(dweight_ptr.dtype.element_ty), mask=known)
    share = _from_bits(share, ACC)
    _store_gradients(
        dx_ptr,
        dresidual_ptr,
        place,
        x,
        dz,
        affine,
        invstd,
        sum_dz * share,
        sum_dz_x * share,
        BATCH,
        VEC,
    )


def _sizes(layout: Layout) -> tuple[int, int, int]:
    """rows, channels and spatial as the kernels take them."""
    if layout.channels_last:
        return layout.batch, layout.channels // layout.vector, 1
    spatial = layout.spatial // layout.vector
    return layout.batch * spatial, layout.channels, spatial


def launch_batch_norm_on_chip_train(
    x: torch.Tensor,
    layout: Layout,
    tile: Tile,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
    momentum: float,
    eps: float,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    slope: float = 0.01,
    key: torch.Tensor | None = None,
    p: float = 0.0,
    save_sign_bits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, statistics, sign bits) of x, which lies in memory as ``layout`` says; residual: as x."""
    acc = accumulate_dtype(x.dtype)
    y = torch.empty_like(x)
    statistics = torch.empty((2, layout.channels), dtype=acc, device=x.device)
    signs = SignBits(save_sign_bits, x, layout)
    values = parameters(p, x.device, acc)
    launch(
        _batch_norm_on_chip_forward_kernel,
        (tile.programs,),
        tile.warps,
        x,
        y,
        statistics[0],
        statistics[1],
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        residual,
        signs.out,
        key,
        *_sizes(layout),
        bits_of(momentum, acc),
        bits_of(eps, acc),
        bits_of(slope, acc),
        values.hi,
        values.lo,
        values.scale,
        layout.channels_last,
        activation,
        triton_acc(x.dtype),
        tile.rows,
        tile.columns,
        layout.vector,
    )
    return y, statistics, signs.finish()


def launch_batch_norm_on_chip_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    layout: Layout,
    tile: Tile,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    batch_statistics: bool,
    need_affine: bool,
    need_residual: bool,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    slope: float = 0.01,
    key: torch.Tensor | None = None,
    p: float = 0.0,
    sign_bits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad_input, grad_weight, grad_bias, grad_residual), empty where not needed; dy, x and residual lie in
    memory as ``layout`` says."""
    acc = accumulate_dtype(x.dtype)
    dx = torch.empty_like(dy)
    dresidual = torch.empty_like(dy) if need_residual else dy.new_empty(0)
    dtype = acc if weight is None else weight.dtype
    dweight, dbias = (dy.new_empty(layout.channels if need_affine else 0, dtype=dtype) for _ in range(2))
    values = parameters(p, x.device, acc)
    launch(
        _batch_norm_on_chip_backward_kernel,
        (tile.programs,),
        tile.warps,
        dy,
        x,
        dx,
        dresidual if need_residual else None,
        dweight if need_affine else None,
        dbias if need_affine else None,
        statistics[0],
        statistics[1],
        weight,
        bias,
        residual,
        sign_bits,
        key,
        *_sizes(layout),
        bits_of(1.0 / (layout.batch * layout.spatial), acc),
        bits_of(slope, acc),
        values.hi,
        values.lo,
        values.scale,
        layout.channels_last,
        batch_statistics,
        activation,
        triton_acc(x.dtype),
        tile.rows,
        tile.columns,
        layout.vector,
    )
    return dx, dweight, dbias, dresidual

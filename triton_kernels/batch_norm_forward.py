"""Normalisation with given statistics and its epilogue, in one pass over both layouts."""

import torch
import triton
import triton.language as tl

from ._epilogue import _forward_tile, _key_of, _load_vectors, _scalars
from ._launch import launch
from ._layout import Layout, channel_tile, same_memory
from ._parameters import _from_bits, accumulate_dtype, bits_of, parameters, triton_acc
from ._sizes import cdiv

_SCALARS = ("vectors", "rows", "channels", "spatial", "eps", "slope", "hi", "lo", "scale")


@triton.jit
def _load_channel(ptr, channel, known, default, ACC: tl.constexpr):
    if ptr is None:
        value = tl.full(channel.shape, default, ACC)
    else:
        value = tl.load(ptr + channel, mask=known, other=default).to(ACC)
    return value


@triton.jit
def _load_affine(
    mean_ptr, second_ptr, weight_ptr, bias_ptr, channel, known, eps, ACC: tl.constexpr, VARIANCE: tl.constexpr
):
    """mean, invstd, weight * invstd and bias of channels; second_ptr: invstd or, VARIANCE, variances."""
    mean = _load_channel(mean_ptr, channel, known, 0.0, ACC)
    invstd = _load_channel(second_ptr, channel, known, 1.0, ACC)
    if VARIANCE:
        invstd = 1.0 / tl.sqrt(invstd + eps)
    factor = invstd * _load_channel(weight_ptr, channel, known, 1.0, ACC)
    return mean, invstd, factor, _load_channel(bias_ptr, channel, known, 0.0, ACC)


@triton.jit
def _channel_of(start, spatial, channels, VECTORS: tl.constexpr, LONG: tl.constexpr):
    """The channels (VECTORS, 1) of the vectors from `start` on, of (batch, channels, spatial) vectors.

    One 64-bit division per program; LONG, spatial >= VECTORS, needs no other.
    """
    row = start // spatial
    inner = (start - row * spatial).to(tl.int32) + tl.arange(0, VECTORS)[:, None]
    channel = (row % channels).to(tl.int32)
    if LONG:
        channel = channel + (inner >= spatial).to(tl.int32)
        channel = tl.where(channel == channels, 0, channel)
    else:
        channel = (channel + inner // spatial) % channels
    return channel


@triton.jit(do_not_specialize=_SCALARS)
def _batch_norm_forward_kernel(
    x_ptr,  # (batch, channels, spatial * VEC)
    y_ptr,
    mean_ptr,  # (channels)
    second_ptr,  # (channels): invstd or, VARIANCE, the variance
    weight_ptr,  # (channels) or None
    bias_ptr,
    residual_ptr,  # as x, or None
    signs_ptr,  # uint8, or None
    key_ptr,  # int64 (2), or None: no dropout
    vectors: tl.int64,  # in all
    channels,
    spatial,  # in vectors
    eps,  # bits of ACC, as slope and scale
    slope,
    hi,
    lo,
    scale,
    VARIANCE: tl.constexpr,
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
    channel = _channel_of(start, spatial, channels, VECTORS, LONG)
    mean, _, factor, bias = _load_affine(
        mean_ptr, second_ptr, weight_ptr, bias_ptr, channel, known, _from_bits(eps, ACC), ACC, VARIANCE
    )
    slope, hi, lo, scale = _scalars(slope, hi, lo, scale, ACC)
    epilogue = (residual_ptr, signs_ptr, key_ptr, _key_of(key_ptr), slope, hi, lo, scale)
    place = (start, offset, lane, tl.broadcast_to(known, (VECTORS, VEC)))
    x = _load_vectors(x_ptr, place, ACC, VEC)
    _forward_tile(x, y_ptr, (mean, factor, bias), epilogue, place, ACTIVATION, VEC)


@triton.jit(do_not_specialize=_SCALARS)
def _batch_norm_forward_channels_last_kernel(
    x_ptr,  # (rows, channels * VEC)
    y_ptr,
    mean_ptr,
    second_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    signs_ptr,
    key_ptr,
    rows: tl.int64,
    channels,  # in vectors
    eps,
    slope,
    hi,
    lo,
    scale,
    VARIANCE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    """TILES tiles of ROWS rows by COLUMNS vectors, whose channels are loaded once.

    Tiles have shape (COLUMNS, ROWS, VEC): Triton spreads threads over the last axis, then over the first.
    """
    start = tl.program_id(0).to(tl.int64) * (TILES * ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, VEC)
    mean, _, factor, bias = _load_affine(
        mean_ptr,
        second_ptr,
        weight_ptr,
        bias_ptr,
        column[:, None] * VEC + lane[None, :],
        tl.broadcast_to((column < channels)[:, None], (COLUMNS, VEC)),
        _from_bits(eps, ACC),
        ACC,
        VARIANCE,
    )
    affine = (mean[:, None, :], factor[:, None, :], bias[:, None, :])
    slope, hi, lo, scale = _scalars(slope, hi, lo, scale, ACC)
    epilogue = (residual_ptr, signs_ptr, key_ptr, _key_of(key_ptr), slope, hi, lo, scale)
    row = tl.arange(0, ROWS)[None, :, None]
    left = tl.minimum(rows - start, TILES * ROWS).to(tl.int32)
    for tile in tl.static_range(TILES):
        known = (tile * ROWS + row < left) & (column < channels)[:, None, None]
        offset = (tile * ROWS + row) * channels + column[:, None, None]
        inside = tl.broadcast_to(known, (COLUMNS, ROWS, VEC))
        place = (start * channels, offset, lane[None, None, :], inside)
        x = _load_vectors(x_ptr, place, ACC, VEC)
        _forward_tile(x, y_ptr, affine, epilogue, place, ACTIVATION, VEC)


@triton.jit(do_not_specialize=("numel",))
def _pack_signs_kernel(bytes_ptr, bits_ptr, numel: tl.int64, BLOCK: tl.constexpr):
    """Eight bytes, 0 or 1 each, into one."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    lane = tl.arange(0, 8)[None, :]
    element = byte * 8 + lane
    one = tl.load(bytes_ptr + element, mask=element < numel, other=0).to(tl.int32)
    packed = tl.sum(one << lane, axis=1, keep_dims=True)
    tl.store(bits_ptr + byte, packed.to(tl.uint8), mask=byte * 8 < numel)


class SignBits:
    """The signs of a forward pass, eight to a byte. ``out``: where kernels write them, None if not wanted;
    where no vector fills a byte, that holds a byte each, to be packed by :meth:`finish`."""

    def __init__(self, wanted: bool, x: torch.Tensor, layout: Layout):
        self.packed = torch.empty((x.numel() + 7) // 8 if wanted else 0, dtype=torch.uint8, device=x.device)
        self.out = self.packed if wanted else None
        if wanted and layout.vector != 8:
            self.out = torch.empty(x.numel(), dtype=torch.uint8, device=x.device)

    def finish(self) -> torch.Tensor:
        if self.out is not None and self.out is not self.packed:
            grid = (cdiv(self.packed.numel(), 512),)
            launch(_pack_signs_kernel, grid, 4, self.out, self.packed, self.out.numel(), 512)
        return self.packed


def vectors_per_program(vectors: int) -> int:
    """Of four warps: four vectors a thread, or one where the tensor is small."""
    return 512 if vectors >= 1 << 17 else 128


def launch_batch_norm_normalize(
    x: torch.Tensor,
    layout: Layout,
    mean: torch.Tensor,
    second: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float | None,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    slope: float = 0.01,
    key: torch.Tensor | None = None,
    p: float = 0.0,
    save_sign_bits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, sign bits) of x, which lies in memory as ``layout`` says, given mean (C) and invstd (C) or,
    where ``eps`` is given, variance (C). residual: as x, in the same layout."""
    y = torch.empty_like(x)
    signs = SignBits(save_sign_bits, x, layout)
    if not x.numel():
        return y, signs.packed
    assert residual is None or same_memory(residual, x)
    acc = accumulate_dtype(x.dtype)
    values = parameters(p, x.device, acc)
    tensors = (
        x,
        y,
        mean,
        second,
        weight,
        bias,
        residual,
        signs.out,
        key,
    )
    scalars = (
        bits_of(eps or 0.0, acc),
        bits_of(slope, acc),
        values.hi,
        values.lo,
        values.scale,
        eps is not None,
        activation,
        triton_acc(x.dtype),
    )
    if layout.channels_last:
        rows, columns = channel_tile(layout)
        tiles = 4 if layout.batch * layout.channels // layout.vector >= 1 << 17 else 1
        channels = layout.channels // layout.vector
        grid = (cdiv(layout.batch, tiles * rows), cdiv(channels, columns))
        launch(
            _batch_norm_forward_channels_last_kernel,
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
        vectors = x.numel() // layout.vector
        block = vectors_per_program(vectors)
        launch(
            _batch_norm_forward_kernel,
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
    return y, signs.finish()

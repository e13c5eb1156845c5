"""How a (N, C, *) tensor lies in memory, as the BatchNorm kernels see it, and how they tile it."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._sizes import next_power_of_2


class Layout(NamedTuple):
    """Contiguous: memory is (batch, channels, spatial). channels_last: (batch, channels) and spatial is 1."""

    batch: int
    channels: int
    spatial: int
    channels_last: bool
    vector: int  # elements moved together: divides spatial, or channels where these are innermost


@triton.jit
def _vector_of(vector, channel, channels, spatial):
    """Where vector `vector` of a channel of (batch, channels, spatial) vectors is in memory."""
    image = vector // spatial
    return (image * channels + channel) * spatial + (vector - image * spatial)


@triton.jit
def _walk(start, row, channel, channels, spatial, STEP: tl.constexpr):
    """A walk over a channel in strides of STEP vectors from start + row, with no division after the first:
    (position in its image, position in memory, and what a stride adds to both and to the next image)."""
    vector = start + row
    images = STEP // spatial
    turn = STEP - images * spatial
    step = images * channels * spatial + turn
    jump = (channels - 1) * spatial
    return vector % spatial, _vector_of(vector, channel, channels, spatial), turn, step, jump


@triton.jit
def _advance(inner, position, turn, step, jump, spatial):
    inner += turn
    wrapped = inner >= spatial
    return tl.where(wrapped, inner - spatial, inner), position + tl.where(wrapped, step + jump, step)


def _channels_innermost(x: torch.Tensor) -> bool:
    if x.dim() == 2:
        return x.is_contiguous()
    return x.movedim(1, -1).is_contiguous()


def same_memory(x: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the strides agree wherever they are used."""
    return all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), other.stride(), strict=True))


def layout_of(x: torch.Tensor, whole_bytes: bool = False) -> tuple[torch.Tensor, Layout]:
    """x, made contiguous if it is neither that nor has its channels innermost, and its layout.

    Vectors have at most 16 bytes and at most eight elements; whole_bytes: eight, whose sign bits fill a byte.
    """
    batch, channels = x.shape[:2]
    spatial = math.prod(x.shape[2:])
    innermost = not x.is_contiguous() and _channels_innermost(x)
    if not innermost:
        x = x.contiguous()
    most = 8 if whole_bytes else min(8, 16 // x.element_size())
    if innermost or spatial == 1:
        return x, Layout(batch * spatial, channels, 1, True, math.gcd(most, channels))
    return x, Layout(batch, channels, spatial, False, math.gcd(most, spatial))


def as_layout(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """x with the strides of ``like``, which layout_of returned."""
    if same_memory(x, like):
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def channel_tile(layout: Layout) -> tuple[int, int]:
    """(rows, vectors per row) of a tile of 128 vectors, eight vectors (128 bytes of a row) wide at most."""
    columns = min(8, next_power_of_2(layout.channels // layout.vector))
    return 128 // columns, columns

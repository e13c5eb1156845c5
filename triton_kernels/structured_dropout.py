"""One decision for all elements that differ only in shared dimensions: channel dropout, stochastic depth."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._mask import _keep, _load_key
from ._parameters import Parameters, _factor, _threshold, accumulate_dtype, parameters, triton_acc
from ._sizes import cdiv
from .dropout import check_key, is_dense, vector_width

_SCALARS = ("hi", "lo", "scale", "shift", "fill", "vectors", "offset", "period", "inner")


@triton.jit(do_not_specialize=_SCALARS)
def _structured_dropout_kernel(
    x_ptr,  # (outer, shared, inner) in memory; the mask is (outer, 1, inner)
    y_ptr,
    key_ptr,  # int64 (2)
    parameters_ptr,  # int64 (5) or None: then the next five count
    hi,
    lo,
    scale,  # the bits of ACC
    shift,
    fill,
    vectors: tl.int64,  # in all
    offset: tl.int64,  # index of the mask's first element, a multiple of VEC unless ROWS
    period,  # shared * inner, in vectors
    inner,  # in vectors
    ROWS: tl.constexpr,  # inner is 1 element: a vector has one decision, and is not read where dropped
    ACC: tl.constexpr,
    VECTORS: tl.constexpr,
    VEC: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * VECTORS
    vector = tl.arange(0, VECTORS)[:, None]
    lane = tl.arange(0, VEC)[None, :]
    known = vector < tl.minimum(vectors - start, VECTORS).to(tl.int32)
    row = start // period
    within = (start - row * period).to(tl.int32) + vector
    outer = row + within // period
    key = _load_key(key_ptr)
    hi, lo = _threshold(parameters_ptr, hi, lo)
    if ROWS:
        keep = _keep(key, offset + outer, tl.zeros((1, 1), tl.int32), hi, lo, 1)
        read = tl.broadcast_to(known & keep, (VECTORS, VEC))
    else:
        keep = _keep(key, offset + (outer * inner + within % inner) * VEC, lane, hi, lo, VEC)
        read = tl.broadcast_to(known, (VECTORS, VEC))
    x = tl.load(x_ptr + start * VEC + (vector * VEC + lane), mask=read, other=0.0).to(ACC)
    y = x * _factor(parameters_ptr, scale, 2, ACC) + _factor(parameters_ptr, shift, 3, ACC)
    y = tl.where(keep, y, _factor(parameters_ptr, fill, 4, ACC))
    inside = tl.broadcast_to(known, (VECTORS, VEC))
    tl.store(y_ptr + start * VEC + (vector * VEC + lane), y.to(y_ptr.dtype.element_ty), mask=inside)


class _Pattern(NamedTuple):
    outer: int
    shared: int
    inner: int


def _pattern(x: torch.Tensor, shared_dims: Sequence[int]) -> _Pattern | None:
    """How the dense x lies in memory, if as (outer, shared, inner) with the mask's order that of memory."""
    dims = [d for d in range(x.dim()) if x.shape[d] != 1]
    memory = sorted(dims, key=lambda d: -x.stride(d))
    own = [d for d in memory if d not in shared_dims]
    if own != sorted(own):
        return None
    sizes: list[tuple[bool, int]] = []
    for d in memory:
        shared = d in shared_dims
        if sizes and sizes[-1][0] == shared:
            sizes[-1] = (shared, sizes[-1][1] * x.shape[d])
        else:
            sizes.append((shared, x.shape[d]))
    if not sizes or not sizes[0][0]:
        sizes = sizes or [(False, 1)]
    else:
        sizes.insert(0, (False, 1))
    if len(sizes) > 3:
        return None
    outer, shared, inner = (*(size for _, size in sizes), 1, 1)[:3]
    # Without a shared dimension every element has its own decision.
    return _Pattern(1, 1, outer) if shared == 1 and inner == 1 else _Pattern(outer, shared, inner)


def _launch_dense(
    x: torch.Tensor, pattern: _Pattern, key: torch.Tensor, values: Parameters, offset: int
) -> torch.Tensor:
    y = torch.empty_like(x)
    if not x.numel():
        return y
    rows = pattern.inner == 1
    if rows:
        vector = vector_width(x.element_size(), pattern.shared)
        period, inner = pattern.shared // vector, 1
    else:
        vector = vector_width(x.element_size(), pattern.inner, offset)
        inner = pattern.inner // vector
        period = pattern.shared * inner
    vectors = x.numel() // vector
    block = 512 if vectors >= 1 << 17 else 128
    _structured_dropout_kernel[(cdiv(vectors, block),)](
        x,
        y,
        key,
        *values,
        vectors,
        offset,
        period,
        inner,
        rows,
        triton_acc(x.dtype),
        block,
        vector,
        num_warps=4,
    )
    return y


def _launch(
    x: torch.Tensor, shared_dims: Sequence[int], key: torch.Tensor, values: Parameters, offset: int
) -> torch.Tensor:
    check_key(key, x.device)
    if not is_dense(x):
        x = x.contiguous()
    pattern = _pattern(x, shared_dims)
    if pattern is not None:
        return _launch_dense(x, pattern, key, values, offset)
    # Moved so that shared dimensions are the innermost, which any order of the others allows.
    own = [d for d in range(x.dim()) if d not in shared_dims]
    moved = x.permute(*own, *shared_dims).contiguous()
    outer = math.prod(x.shape[d] for d in own)
    y = _launch_dense(moved, _Pattern(outer, moved.numel() // max(outer, 1), 1), key, values, offset)
    order = [*own, *shared_dims]
    return torch.empty_like(x).copy_(y.permute([order.index(d) for d in range(x.dim())]))


def launch_structured_dropout(
    x: torch.Tensor,
    key: torch.Tensor,
    p: float | torch.Tensor,
    shared_dims: Sequence[int],
    offset: int = 0,
    scaled: bool = True,
) -> torch.Tensor:
    """Dropout with a mask of x's shape but 1 in ``shared_dims``; its index is the row-major position in the
    mask, whatever the strides of x. Arguments as of :func:`launch_dropout_forward`."""
    values = parameters(p, x.device, accumulate_dtype(x.dtype), scaled=scaled)
    return _launch(x, shared_dims, key, values, offset)


def launch_feature_alpha_dropout(
    x: torch.Tensor,
    key: torch.Tensor,
    p: float | torch.Tensor,
    shared_dims: Sequence[int],
    linear: bool = False,
    offset: int = 0,
) -> torch.Tensor:
    """:func:`launch_alpha_dropout` with such a mask."""
    values = parameters(p, x.device, accumulate_dtype(x.dtype), alpha=True, linear=linear)
    return _launch(x, shared_dims, key, values, offset)

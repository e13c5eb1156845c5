"""Dropout and alpha dropout with a mask of the input's size, the mask itself, and keys derived from keys."""

import math

import torch
import triton
import triton.language as tl

from ._launch import launch
from ._mask import _keep, _load_key
from ._parameters import Parameters, _factor, _threshold, accumulate_dtype, parameters, triton_acc
from ._philox import _philox
from ._sizes import cdiv

_SCALARS = ("numel", "offset", "hi", "lo", "scale", "shift", "fill")


@triton.jit
def _dropout_vectors(
    x_ptr, y_ptr, vector, lane, inside, key, first, rule, AFFINE: tl.constexpr, VEC: tl.constexpr
):
    """Loads, drops and stores the vectors at `vector`; where `inside` is uniform over a vector, accesses
    keep their width."""
    hi, lo, scale, shift, fill = rule
    x = tl.load(x_ptr + vector + lane, mask=inside)
    keep = _keep(key, first + vector, lane, hi, lo, VEC)
    if AFFINE:
        y = tl.where(keep, x.to(scale.dtype) * scale + shift, fill)
    else:  # selecting first spares the packing and unpacking of half results
        y = tl.where(keep, x.to(scale.dtype), 0.0) * scale
    tl.store(y_ptr + vector + lane, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SCALARS)
def _dropout_forward_kernel(
    x_ptr,  # dense memory, numel elements
    y_ptr,  # the same; may be x_ptr
    key_ptr,  # int64 (2)
    parameters_ptr,  # int64 (5) or None: then the next five count
    hi,
    lo,
    scale,  # the bits of ACC
    shift,
    fill,
    numel: tl.int64,
    offset: tl.int64,  # element index of x[0], a multiple of VEC
    AFFINE: tl.constexpr,  # y = scale * x + shift, fill where dropped
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(numel - start, BLOCK).to(tl.int32)
    whole = left // VEC * VEC
    x_ptr += start
    y_ptr += start
    first = offset + start
    key = _load_key(key_ptr)
    hi, lo = _threshold(parameters_ptr, hi, lo)
    rule = (
        hi,
        lo,
        _factor(parameters_ptr, scale, 2, ACC),
        _factor(parameters_ptr, shift, 3, ACC),
        _factor(parameters_ptr, fill, 4, ACC),
    )

    vector = tl.arange(0, BLOCK // VEC)[:, None] * VEC
    lane = tl.arange(0, VEC)[None, :]
    inside = tl.broadcast_to(vector < whole, (BLOCK // VEC, VEC))
    _dropout_vectors(x_ptr, y_ptr, vector, lane, inside, key, first, rule, AFFINE, VEC)
    if whole != left:  # the tensor ends inside a vector
        last = tl.zeros((1, 1), tl.int32) + whole
        _dropout_vectors(x_ptr, y_ptr, last, lane, last + lane < left, key, first, rule, AFFINE, VEC)


@triton.jit(do_not_specialize=("hi", "lo", "numel", "offset"))
def _dropout_mask_kernel(
    mask_ptr,  # uint8 (numel)
    key_ptr,
    parameters_ptr,
    hi,
    lo,
    numel: tl.int64,
    offset: tl.int64,  # a multiple of VEC
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    hi, lo = _threshold(parameters_ptr, hi, lo)
    vector = tl.arange(0, BLOCK // VEC)[:, None] * VEC
    lane = tl.arange(0, VEC)[None, :]
    position = vector + lane
    keep = _keep(_load_key(key_ptr), offset + start + vector, lane, hi, lo, VEC)
    tl.store(mask_ptr + start + position, keep.to(tl.uint8), mask=start + position < numel)


@triton.jit
def _join(low, high):
    return (low.to(tl.uint64) | high.to(tl.uint64) << 32).to(tl.int64, bitcast=True)


@triton.jit(do_not_specialize=("n",))
def _fold_in_kernel(key_ptr, out_ptr, n_ptr, n: tl.int64):
    if n_ptr is not None:
        n = tl.load(n_ptr)
    n = n.to(tl.int64).to(tl.uint64, bitcast=True)
    key = _load_key(key_ptr)
    # Bit 62 keeps these counters apart from those of masks.
    n_hi = (n >> 32).to(tl.uint32) & 0x3FFFFFFF | 0x40000000
    w0, w1, w2, w3 = _philox(key[0], key[1], key[2], key[3], n.to(tl.uint32), n_hi)
    tl.store(out_ptr, _join(w0, w1))
    tl.store(out_ptr + 1, _join(w2, w3))


def is_dense(x: torch.Tensor) -> bool:
    """Whether x fills its memory: no gaps, no overlaps, strides in any order."""
    expected = 1
    for stride, size in sorted((st, si) for si, st in zip(x.shape, x.stride(), strict=True) if si != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def vector_width(itemsize: int, *multiples: int) -> int:
    """Elements in 16 bytes, at most a chunk of 8, reduced to a divisor of each of ``multiples``."""
    return math.gcd(min(8, 16 // itemsize), *multiples)


def block_size(vector: int, numel: int) -> int:
    """Elements per program of four warps: four vectors a thread, or one where the tensor is small."""
    return 128 * vector * (4 if numel >= 1 << 20 else 1)


def check_key(key: torch.Tensor, device: torch.device) -> None:
    if key.dtype != torch.int64 or key.shape != (2,) or key.device != device:
        raise ValueError(
            f"key must be an int64 tensor of shape (2,) on {device}, "
            f"got {key.dtype} of shape {tuple(key.shape)} on {key.device}"
        )


def _launch(
    x: torch.Tensor,
    key: torch.Tensor,
    values: Parameters,
    offset: int,
    out: torch.Tensor | None,
    affine: bool,
) -> torch.Tensor:
    check_key(key, x.device)
    target = out
    if not is_dense(x) or (out is not None and out.stride() != x.stride()):
        x = x.contiguous()
        target = None
    y = torch.empty_like(x) if target is None else target
    numel = x.numel()
    if numel:
        vector = vector_width(x.element_size(), offset)
        block = block_size(vector, numel)
        launch(
            _dropout_forward_kernel,
            (cdiv(numel, block),),
            4,
            x,
            y,
            key,
            *values,
            numel,
            offset,
            affine,
            triton_acc(x.dtype),
            block,
            vector,
        )
    if out is None:
        return y
    return out if y is out else out.copy_(y)


def launch_dropout_forward(
    x: torch.Tensor,
    key: torch.Tensor,
    p: float | torch.Tensor,
    offset: int = 0,
    scaled: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``keep(offset + i) ? scale * x : +0``; also its own backward.

    Args:
        x: floating point, any strides; ``i`` counts in memory order where x is dense, else row-major.
        key: int64 (2), read as uint64 (seed, stream), on x's device.
        p: probability of dropping; a tensor of one element on x's device is not read by the host.
        offset: index of the first element, read as uint64.
        scaled: scale = 1 / (1 - p), else 1.
        out: where the result goes (x itself: in place); by default a new tensor, dense if x is, else
            contiguous.
    """
    values = parameters(p, x.device, accumulate_dtype(x.dtype), scaled=scaled)
    return _launch(x, key, values, offset, out, affine=False)


def launch_alpha_dropout(
    x: torch.Tensor, key: torch.Tensor, p: float | torch.Tensor, offset: int = 0, linear: bool = False
) -> torch.Tensor:
    """``keep ? a * x + b : a * alpha' + b`` (Klambauer et al. 2017); linear: b = fill = 0, the derivative."""
    values = parameters(p, x.device, accumulate_dtype(x.dtype), alpha=True, linear=linear)
    return _launch(x, key, values, offset, None, affine=not linear)


def launch_dropout_mask(
    key: torch.Tensor, numel: int, p: float | torch.Tensor, offset: int = 0
) -> torch.Tensor:
    """The decisions keep(offset + i), i < numel, as a bool tensor (numel) on key's device."""
    check_key(key, key.device)
    values = parameters(p, key.device, torch.float32)
    mask = torch.empty(numel, dtype=torch.bool, device=key.device)
    if numel:
        vector = vector_width(1, offset)
        block = block_size(vector, numel)
        _dropout_mask_kernel[(cdiv(numel, block),)](
            mask.view(torch.uint8),
            key,
            values.pointer,
            values.hi,
            values.lo,
            numel,
            offset,
            block,
            vector,
            num_warps=4,
        )
    return mask


def launch_fold_in(key: torch.Tensor, n: int | torch.Tensor) -> torch.Tensor:
    """A key that depends on ``key`` and ``n`` (an int, or an int64 tensor of one element) only."""
    check_key(key, key.device)
    out = torch.empty_like(key)
    tensor = isinstance(n, torch.Tensor)
    _fold_in_kernel[(1,)](key, out, n if tensor else None, 0 if tensor else n, num_warps=1)
    return out

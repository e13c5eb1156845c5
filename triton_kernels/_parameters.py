"""What p means: the threshold T and the factors, from a number or, on the device, from a tensor."""

import functools
import math
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl

ALPHA_PRIME = -1.7580993408473766  # -alpha * lambda of SELU (Klambauer et al. 2017)


class Parameters(NamedTuple):
    """Kernel arguments. Factors travel as the bits of the accumulate type: a Python float argument would be
    float32 when launched from Python, float64 when launched from torch.compile."""

    pointer: torch.Tensor | None  # int64 (5): the five below, where p is a tensor
    hi: int
    lo: int
    scale: int
    shift: int
    fill: int


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_TRITON_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}


def triton_acc(dtype: torch.dtype) -> tl.dtype:
    return _TRITON_ACC[accumulate_dtype(dtype)]


_INT32, _INT64, _FLOAT32, _FLOAT64 = (struct.Struct(f"<{code}") for code in "iqfd")


def bits_of(value: float, acc: torch.dtype) -> int:
    """The bits of ``value`` as float32 or float64, as a signed integer."""
    if acc == torch.float64:
        return _INT64.unpack(_FLOAT64.pack(value))[0]
    return _INT32.unpack(_FLOAT32.pack(value))[0]


def parameters(
    p: float | torch.Tensor,
    device: torch.device,
    acc: torch.dtype,
    *,
    scaled: bool = True,
    alpha: bool = False,
    linear: bool = False,
) -> Parameters:
    """Kept elements become ``scale * x + shift``, dropped ones ``fill``.

    Args:
        p: probability of dropping, in [0, 1]; a tensor of one element on ``device`` is read there, not by
            the host, and clamped.
        acc: float32 or float64, the type of the factors.
        scaled: scale = 1 / (1 - p), else 1.
        alpha: the factors of alpha dropout. linear: without its shift and fill.

    Raises:
        ValueError: p outside [0, 1], or a tensor of more than one element or on another device.
    """
    if isinstance(p, torch.Tensor):
        if p.numel() != 1 or p.device != device:
            raise ValueError(f"p must have one element on {device}, got shape {tuple(p.shape)} on {p.device}")
        out = torch.empty(5, dtype=torch.int64, device=device)
        _dropout_parameters_kernel[(1,)](
            p.to(torch.float64), out, scaled, alpha, linear, acc == torch.float64, ALPHA_PRIME, num_warps=1
        )
        return Parameters(out, 0, 0, 0, 0, 0)
    return _from_number(p, acc, scaled, alpha, linear)


@functools.lru_cache(maxsize=256)
def _from_number(p: float, acc: torch.dtype, scaled: bool, alpha: bool, linear: bool) -> Parameters:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be in [0, 1], got {p}")
    threshold = round((1.0 - p) * 2.0**32)
    hi = min(threshold >> 16, 0xFFFF)
    scale, shift, fill = (1.0 / (1.0 - p) if scaled and p < 1.0 else 1.0), 0.0, 0.0
    if alpha:
        scale = 1.0 / math.sqrt((1.0 - p) * (1.0 + p * ALPHA_PRIME**2)) if p < 1.0 else 0.0
        if not linear:
            shift = scale * -ALPHA_PRIME * p
            fill = shift + scale * ALPHA_PRIME  # +0 at p = 1
    return Parameters(
        None, hi, threshold - (hi << 16), *(bits_of(value, acc) for value in (scale, shift, fill))
    )


@triton.jit
def _to_bits(value, WIDE: tl.constexpr):
    if WIDE:
        bits = value.to(tl.int64, bitcast=True)
    else:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
    return bits


@triton.jit
def _dropout_parameters_kernel(
    p_ptr,  # float64, one element
    out_ptr,  # int64 (5): hi, lo and the bits of scale, shift, fill
    SCALED: tl.constexpr,
    ALPHA: tl.constexpr,
    LINEAR: tl.constexpr,
    WIDE: tl.constexpr,  # bits of float64, else of float32
    ALPHA_PRIME: tl.constexpr,
):
    """The one kernel with float64 arithmetic: a dozen scalar operations, so that T is that of the host."""
    p = tl.load(p_ptr)
    p = tl.minimum(tl.maximum(p, 0.0), 1.0)
    one = tl.full((), 1.0, tl.float64)
    magic = tl.full((), 4503599627370496.0, tl.float64)  # 2^52: adding it rounds to an integer, ties to even
    threshold = ((one - p) * 4294967296.0 + magic) - magic
    threshold = threshold.to(tl.int64)
    hi = tl.minimum(threshold >> 16, 0xFFFF)
    kept = tl.where(p < 1.0, one - p, one)
    scale = one
    shift = tl.zeros_like(one)
    fill = tl.zeros_like(one)
    if ALPHA:
        prime = tl.full((), ALPHA_PRIME, tl.float64)
        scale = tl.where(p < 1.0, one / tl.sqrt(kept * (one + p * (prime * prime))), 0.0)
        if not LINEAR:
            shift = scale * -prime * p
            fill = shift + scale * prime
    elif SCALED:
        scale = one / kept
    tl.store(out_ptr, hi)
    tl.store(out_ptr + 1, threshold - (hi << 16))
    tl.store(out_ptr + 2, _to_bits(scale, WIDE))
    tl.store(out_ptr + 3, _to_bits(shift, WIDE))
    tl.store(out_ptr + 4, _to_bits(fill, WIDE))


@triton.jit
def _from_bits(bits, ACC: tl.constexpr):
    if ACC == tl.float64:
        factor = bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        factor = bits.to(tl.int32).to(tl.float32, bitcast=True)
    return factor


@triton.jit
def _threshold(parameters_ptr, hi, lo):
    if parameters_ptr is not None:
        hi = tl.load(parameters_ptr)
        lo = tl.load(parameters_ptr + 1)
    return hi.to(tl.uint32), lo.to(tl.uint32)


@triton.jit
def _factor(parameters_ptr, bits, INDEX: tl.constexpr, ACC: tl.constexpr):
    """The factor at INDEX of parameters_ptr where given, else `bits`, as ACC."""
    if parameters_ptr is not None:
        bits = tl.load(parameters_ptr + INDEX)
    return _from_bits(bits, ACC)

"""One tile of vectors, of either layout: z = normalised x (+ residual), y = dropout(activation(z)), and back.

Tiles have shape (..., VEC). A vector is addressed by `base` (int64 scalar) plus `offset` (int32 tensor of
shape (..., 1)), counted in vectors from the start of memory; times VEC, that is the mask's index.
"""

import triton
import triton.language as tl

from ._activation import LEAKY_RELU, _activate, _activation_gradient
from ._mask import _keep


@triton.jit
def _load_vectors(ptr, base, offset, lane, inside, ACC: tl.constexpr, VEC: tl.constexpr):
    return tl.load(ptr + base * VEC + (offset * VEC + lane), mask=inside, other=0.0).to(ACC)


@triton.jit
def _store_vectors(ptr, base, offset, lane, inside, value, VEC: tl.constexpr):
    tl.store(ptr + base * VEC + (offset * VEC + lane), value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _drop(value, key, base, offset, lane, hi, lo, scale, VEC: tl.constexpr):
    keep = _keep(key, (base + offset) * VEC, lane, hi, lo, VEC)
    return tl.where(keep, value, 0.0) * scale


@triton.jit
def _preactivation(x, mean, factor, bias, residual_ptr, base, offset, lane, inside, VEC: tl.constexpr):
    z = (x - mean) * factor + bias
    if residual_ptr is not None:
        z += _load_vectors(residual_ptr, base, offset, lane, inside, z.dtype, VEC)
    return z


@triton.jit
def _store_signs(signs_ptr, base, offset, lane, inside, z, VEC: tl.constexpr):
    """Whether z > 0: a bit each where a vector fills a byte, else a byte each."""
    positive = z > 0
    if VEC == 8:
        byte = tl.sum(positive.to(tl.int32) << lane, axis=len(z.shape) - 1, keep_dims=True)
        # inside is uniform over a vector
        known = tl.max(inside.to(tl.int32), axis=len(z.shape) - 1, keep_dims=True) != 0
        tl.store(signs_ptr + base + offset, byte.to(tl.uint8), mask=known)
    else:
        tl.store(signs_ptr + base * VEC + (offset * VEC + lane), positive.to(tl.uint8), mask=inside)


@triton.jit
def _forward_tile(
    x_ptr,
    y_ptr,
    residual_ptr,
    signs_ptr,
    key,  # of _load_key, or None: no dropout
    base,
    offset,
    lane,
    inside,
    mean,
    factor,
    bias,
    slope,
    hi,
    lo,
    scale,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
):
    x = _load_vectors(x_ptr, base, offset, lane, inside, ACC, VEC)
    z = _preactivation(x, mean, factor, bias, residual_ptr, base, offset, lane, inside, VEC)
    if signs_ptr is not None:
        _store_signs(signs_ptr, base, offset, lane, inside, z, VEC)
    y = _activate(z, slope, ACTIVATION)
    if key is not None:
        y = _drop(y, key, base, offset, lane, hi, lo, scale, VEC)
    _store_vectors(y_ptr, base, offset, lane, inside, y, VEC)


@triton.jit
def _gradient_tile(
    dy_ptr,
    x,
    residual_ptr,
    signs_ptr,  # packed bits, or None
    key,
    base,
    offset,
    lane,
    inside,
    mean,
    factor,
    bias,
    slope,
    hi,
    lo,
    scale,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
):
    """The gradient with respect to z; 0 outside."""
    g = _load_vectors(dy_ptr, base, offset, lane, inside, ACC, VEC)
    if key is not None:
        g = _drop(g, key, base, offset, lane, hi, lo, scale, VEC)
    if ACTIVATION != 0:
        if signs_ptr is not None:
            element = (base + offset) * VEC
            known = tl.max(inside.to(tl.int32), axis=len(g.shape) - 1, keep_dims=True) != 0
            byte = tl.load(signs_ptr + (element >> 3), mask=known, other=0).to(tl.int32)
            positive = (byte >> ((element & 7).to(tl.int32) + lane)) & 1
            if ACTIVATION == LEAKY_RELU:
                g = tl.where(positive != 0, g, g * slope)
            else:
                g = tl.where(positive != 0, g, 0.0)
        else:
            z = _preactivation(x, mean, factor, bias, residual_ptr, base, offset, lane, inside, VEC)
            g = _activation_gradient(g, z, slope, ACTIVATION)
    return g

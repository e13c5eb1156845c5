"""One tile of vectors, of either layout: z = normalised x (+ residual), y = dropout(activation(z)), and back.

Tiles have shape (..., VEC). What belongs together travels as a tuple:

place: (base, offset, lane, inside). A vector is addressed by ``base`` (int64 scalar) plus ``offset``
    (int32, shape (..., 1)), counted in vectors from the start of memory; times VEC, that is the mask's index.
affine: (mean, factor, bias), z = (x - mean) * factor + bias.
epilogue: (residual_ptr, signs_ptr, key_ptr, key, slope, hi, lo, scale); a pointer that is None leaves its
    part out, and then ``key``, which is _key_of(key_ptr), is not looked at.
"""

import triton
import triton.language as tl

from ._activation import LEAKY_RELU, _activate, _activation_gradient
from ._mask import _keep, _load_key
from ._parameters import _from_bits, _threshold


@triton.jit
def _scalars(slope, hi, lo, scale, ACC: tl.constexpr):
    """The numbers of an epilogue from a kernel's arguments."""
    hi, lo = _threshold(None, hi, lo)
    return _from_bits(slope, ACC), hi, lo, _from_bits(scale, ACC)


@triton.jit
def _key_of(key_ptr):
    """What _load_key says, or zeros: a tuple can hold no None that is not an argument."""
    if key_ptr is None:
        zero = tl.zeros((), tl.uint32)
        key = (zero, zero, zero, zero)
    else:
        key = _load_key(key_ptr)
    return key


@triton.jit
def _load_vectors(ptr, place, ACC: tl.constexpr, VEC: tl.constexpr):
    base, offset, lane, inside = place
    return tl.load(ptr + base * VEC + (offset * VEC + lane), mask=inside, other=0.0).to(ACC)


@triton.jit
def _store_vectors(ptr, place, value, VEC: tl.constexpr):
    base, offset, lane, inside = place
    tl.store(ptr + base * VEC + (offset * VEC + lane), value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _drop(value, epilogue, place, VEC: tl.constexpr):
    base, offset, lane, _inside = place
    keep = _keep(epilogue[3], (base + offset) * VEC, lane, epilogue[5], epilogue[6], VEC)
    return tl.where(keep, value, 0.0) * epilogue[7]


@triton.jit
def _preactivation(x, affine, epilogue, place, VEC: tl.constexpr):
    mean, factor, bias = affine
    z = (x - mean) * factor + bias
    residual_ptr = epilogue[0]
    if residual_ptr is not None:
        z += _load_vectors(residual_ptr, place, z.dtype, VEC)
    return z


@triton.jit
def _known(inside):
    """Which vectors are inside: all of their lanes are, or none."""
    return tl.max(inside.to(tl.int32), axis=len(inside.shape) - 1, keep_dims=True) != 0


@triton.jit
def _store_signs(signs_ptr, place, z, VEC: tl.constexpr):
    """Whether z > 0: a bit each where a vector fills a byte, else a byte each."""
    base, offset, lane, inside = place
    positive = z > 0
    if VEC == 8:
        byte = tl.sum(positive.to(tl.int32) << lane, axis=len(z.shape) - 1, keep_dims=True)
        tl.store(signs_ptr + base + offset, byte.to(tl.uint8), mask=_known(inside))
    else:
        tl.store(signs_ptr + base * VEC + (offset * VEC + lane), positive.to(tl.uint8), mask=inside)


@triton.jit
def _forward_tile(x, y_ptr, affine, epilogue, place, ACTIVATION: tl.constexpr, VEC: tl.constexpr):
    """x -> y, stored; and the signs where wanted."""
    z = _preactivation(x, affine, epilogue, place, VEC)
    signs_ptr = epilogue[1]
    if signs_ptr is not None:
        _store_signs(signs_ptr, place, z, VEC)
    y = _activate(z, epilogue[4], ACTIVATION)
    key_ptr = epilogue[2]
    if key_ptr is not None:
        y = _drop(y, epilogue, place, VEC)
    _store_vectors(y_ptr, place, y, VEC)


@triton.jit
def _gradient_tile(
    dy_ptr,
    x,  # None where no activation needs it
    affine,
    epilogue,  # signs_ptr: packed bits
    place,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    VEC: tl.constexpr,
):
    """The gradient with respect to z; 0 outside."""
    g = _load_vectors(dy_ptr, place, ACC, VEC)
    key_ptr = epilogue[2]
    if key_ptr is not None:
        g = _drop(g, epilogue, place, VEC)
    if ACTIVATION != 0:
        signs_ptr = epilogue[1]
        slope = epilogue[4]
        if signs_ptr is not None:
            base, offset, lane, inside = place
            element = (base + offset) * VEC
            byte = tl.load(signs_ptr + (element >> 3), mask=_known(inside), other=0).to(tl.int32)
            positive = (byte >> ((element & 7).to(tl.int32) + lane)) & 1
            if ACTIVATION == LEAKY_RELU:
                g = tl.where(positive != 0, g, g * slope)
            else:
                g = tl.where(positive != 0, g, 0.0)
        else:
            z = _preactivation(x, affine, epilogue, place, VEC)
            g = _activation_gradient(g, z, slope, ACTIVATION)
    return g

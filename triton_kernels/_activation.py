"""Activations by number: 0 none, 1 relu, 2 leaky_relu, 3 silu, 4 gelu (erf), 5 gelu (tanh)."""

import triton
import triton.language as tl

NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
SILU = tl.constexpr(3)
GELU_ERF = tl.constexpr(4)
GELU_TANH = tl.constexpr(5)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _activate(z, slope, ACTIVATION: tl.constexpr):
    """NaN passes through all of them."""
    if ACTIVATION == RELU:
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == LEAKY_RELU:
        z = tl.where(z <= 0, z * slope, z)
    elif ACTIVATION == SILU:
        z = z * _sigmoid(z)
    elif ACTIVATION == GELU_ERF:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        z = z * _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return z


@triton.jit
def _activation_gradient(g, z, slope, ACTIVATION: tl.constexpr):
    """g * activation'(z); 0 at z = 0 for relu, as in torch."""
    if ACTIVATION == RELU:
        g = tl.where(z <= 0, 0.0, g)
    elif ACTIVATION == LEAKY_RELU:
        g = tl.where(z <= 0, g * slope, g)
    elif ACTIVATION == SILU:
        s = _sigmoid(z)
        g = g * (s * (1.0 + z * (1.0 - s)))
    elif ACTIVATION == GELU_ERF:
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        g = g * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density)
    elif ACTIVATION == GELU_TANH:
        s = _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        g = g * (s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z))
    return g

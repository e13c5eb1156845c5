"""Moments of a set of values, (n, mean, M2) with M2 = sum((x - mean)^2), and their merge.

Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979),
eq. 2.1. Inside a program the count is a float: rounded past 2^24, it changes a weight by 2^-24. Between
programs it is two exact digits.
"""

import triton
import triton.language as tl

COUNT_BASE = tl.constexpr(1 << 24)


@triton.jit
def _merge(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """The moments of both sets together; an empty set is neutral."""
    n = n_a + n_b
    delta = mean_b - mean_a
    share = n_b / tl.maximum(n, 1)
    return n, mean_a + delta * share, m2_a + m2_b + delta * delta * (n_a * share)


@triton.jit
def _merge_axis(n, mean, m2):
    """The moments of all sets along axis 0 together: sums, where a tuple reduction would divide at each step.

    Exact for equal means only if these are 0, so means should be given relative to a value near all of them.
    """
    total = tl.sum(n, axis=0)
    center = tl.sum(n * mean, axis=0) / tl.maximum(total, 1)
    delta = mean - center[None]
    return total, center, tl.sum(m2, axis=0) + tl.sum(n * (delta * delta), axis=0)


@triton.jit
def _finite_or_zero(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _split_count(n, ACC: tl.constexpr):
    """An int64 count as two digits of base 2^24 that ACC holds exactly."""
    return (n % COUNT_BASE).to(ACC), (n // COUNT_BASE).to(ACC)


@triton.jit
def _join_count(low, high):
    return high.to(tl.int64) * COUNT_BASE + low.to(tl.int64)

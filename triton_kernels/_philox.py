"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)."""

import triton
import triton.language as tl


@triton.jit
def _philox(k0, k1, c0, c1, c2, c3):
    """Four uint32 words from a key of two and a counter of four.

    The products are 64 bits wide because ``tl.philox`` asks for their halves separately, which costs two
    multiplications where ``mul.wide.u32`` costs one.
    """
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (b >> 32).to(tl.uint32) ^ c1 ^ k0,
            b.to(tl.uint32),
            (a >> 32).to(tl.uint32) ^ c3 ^ k1,
            a.to(tl.uint32),
        )
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3

"""The mask contract: keep or drop as a pure function of (seed, stream, element index, p).

Elements are handled in vectors of VEC, a power of two of at most 8, whose first index is a multiple of VEC:
a vector lies inside one chunk of eight, so it needs one Philox call. Tensors "of vectors" have shape
(..., 1), tensors of elements (..., VEC); one thread then holds whole vectors, and nothing moves
between threads.
"""

import triton
import triton.language as tl

from ._philox import _philox


@triton.jit
def _load_key(key_ptr):
    """int64 (2) -> the four uint32 (seed_lo, seed_hi, stream_lo, stream_hi)."""
    seed = tl.load(key_ptr).to(tl.uint64, bitcast=True)
    stream = tl.load(key_ptr + 1).to(tl.uint64, bitcast=True)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32), stream.to(tl.uint32), (stream >> 32).to(tl.uint32)


@triton.jit
def _chunk_words(key, chunk, TIE: tl.constexpr):
    """The words that decide elements [8 * chunk, 8 * chunk + 8); TIE = 1: those that break ties."""
    c2 = chunk.to(tl.uint32)
    c3 = (chunk >> 32).to(tl.uint32) | TIE << 31
    zero = tl.zeros_like(c2)
    return _philox(key[0], key[1], zero + key[2], zero + key[3], c2, c3)


@triton.jit
def _equal_halves(w, hi):
    """Non-zero iff a 16-bit half of w equals hi: a zero half of w ^ (hi, hi) borrows from its top bit."""
    t = w ^ (hi << 16 | hi)
    return (t - 0x00010001) & (t ^ 0xFFFFFFFF) & 0x80008000


@triton.jit
def _settle(w, v, hi, lo):
    """w with each half that ties replaced by a draw that says what v decides: 0 keeps, 0xffff drops."""
    low = w & 0xFFFF
    high = w >> 16
    low = tl.where(low == hi, tl.where((v & 0xFFFF) < lo, 0, 0xFFFF).to(tl.uint32), low)
    high = tl.where(high == hi, tl.where((v >> 16) < lo, 0, 0xFFFF).to(tl.uint32), high)
    return low | high << 16


@triton.jit
def _any(x):
    """Whether any element of a tensor of rank 2 or 3 is not 0."""
    x = tl.max((x != 0).to(tl.int32), axis=1)
    if len(x.shape) == 2:
        x = tl.max(x, axis=1)
    return tl.max(x, axis=0) != 0


@triton.jit
def _keep(key, first, lane, hi, lo, VEC: tl.constexpr):
    """Which elements of the vectors that start at element indices `first` (int64, read as uint64) are kept.

    first: shape (..., 1); lane: arange(VEC) of shape (1, ..., VEC), one rank with it.
    hi, lo: uint32 with T = 65536 * hi + lo and hi <= 65535 (T = 2^32 is 65535, 65536).
    """
    chunk = first.to(tl.uint64, bitcast=True) >> 3
    w0, w1, w2, w3 = _chunk_words(key, chunk, 0)
    if lo != 0:
        tied = _equal_halves(w0, hi) | _equal_halves(w1, hi) | _equal_halves(w2, hi) | _equal_halves(w3, hi)
        if _any(tied):
            v0, v1, v2, v3 = _chunk_words(key, chunk, 1)
            w0 = _settle(w0, v0, hi, lo)
            w1 = _settle(w1, v1, hi, lo)
            w2 = _settle(w2, v2, hi, lo)
            w3 = _settle(w3, v3, hi, lo)
        hi = tl.maximum(hi, 1)  # so that a settled 0 is below it
    # The pair of draws that each lane's draw is in. Lanes are compile-time constants of a thread's registers.
    if VEC <= 4:
        second_half = (first & 4) != 0
        w0 = tl.where(second_half, w2, w0)
        w1 = tl.where(second_half, w3, w1)
    if VEC == 8:
        pair = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    elif VEC == 4:
        pair = tl.where(lane < 2, w0, w1)
    else:
        pair = tl.where((first & 2) == 0, w0, w1)
    if VEC == 1:
        lane = (first & 1).to(tl.int32)
    # Compared in the upper half, where the draw of an odd lane is already.
    return tl.where(lane % 2 == 0, pair << 16, pair) < hi << 16

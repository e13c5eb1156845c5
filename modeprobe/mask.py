"""The mask contract in plain torch: readable, on any device, and what every kernel is held to.

A dropout mask is a pure function of ``(seed, stream, i, p)``: the key's two uint64, the element's index and
the drop probability. Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
gives four 32-bit words for eight consecutive elements, 16 bits each; a second call breaks the ties, so the
keep probability is exact to 2^-32. ``docs/contract.md`` states it in full.

torch has no unsigned 64-bit arithmetic: words are int64 tensors with values in [0, 2^32).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["draws", "fold_in", "keep_mask", "keep_scale", "key", "new_key", "philox", "threshold"]

_LOW32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CHUNKS = (1 << 61) - 1  # chunk = i >> 3 of a uint64 index
_TIE, _FOLD = 1 << 31, 1 << 30  # bits of the last counter word that no chunk reaches
_NONNEGATIVE = (1 << 63) - 1
_SHAPE = (2,)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def key(seed: int, stream: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """A key: an int64 tensor of shape (2,), read as the two uint64 ``(seed, stream)``.

    Args:
        seed: an integer in [0, 2^64).
        stream: an integer in [0, 2^64); keys that differ in either give independent masks.
        device: where the data is that the key will be used with.

    Raises:
        TypeError: ``seed`` or ``stream`` is not an int.
        ValueError: ``seed`` or ``stream`` is outside [0, 2^64).
    """
    for name, value in (("seed", seed), ("stream", stream)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"mask.key: {name} must be an int, got {type(value).__name__}")
        if not 0 <= value < 1 << 64:
            raise ValueError(f"mask.key: {name} must be in [0, 2**64), got {value}")
    return torch.tensor([_signed(seed), _signed(stream)], dtype=torch.int64, device=device)


def new_key(device: torch.device | str = "cpu") -> Tensor:
    """A fresh random key from the generator of ``device``, without waiting for the device.

    One ``torch.randint``: ``torch.manual_seed``, ``torch.random.fork_rng``, activation checkpointing, CUDA
    graphs and ``torch.compile`` treat it like every other random operation of torch.
    """
    return torch.randint(_NONNEGATIVE, _SHAPE, device=device)  # of int64 by default


def fold_in(key: Tensor, n: int | Tensor) -> Tensor:
    """A key for the ``n``-th child of ``key`` (a layer, a step, a rank), independent of it and its siblings.

    Args:
        key: int64, shape (2,).
        n: an int in [0, 2^62), or an int64 tensor with one element on the key's device, taken modulo 2^62.

    Returns:
        int64, shape (2,), on the key's device: the four words of Philox4x32-10 with the key's seed and the
        counter ``(stream_lo, stream_hi, n_lo, n_hi | 1 << 30)``. No mask draws from such a counter, and
        different ``n`` give different keys.

    Raises:
        TypeError, ValueError: ``key`` or ``n`` is not as above.
    """
    check_key(key, "mask.fold_in")
    if isinstance(n, Tensor):
        if n.dtype != torch.int64 or n.numel() != 1 or n.device != key.device:
            raise ValueError(
                f"mask.fold_in: n must be an int or an int64 tensor with one element on {key.device}, "
                f"got {n.dtype} of shape {tuple(n.shape)} on {n.device}"
            )
        if _compiled(key):
            return torch.ops.modeprobe.fold_in.default(key, 0, n)
        count = n.reshape(())
    else:
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"mask.fold_in: n must be an int or an int64 tensor, got {type(n).__name__}")
        if not 0 <= n < 1 << 62:
            raise ValueError(f"mask.fold_in: n must be in [0, 2**62), got {n}")
        if _compiled(key):
            return torch.ops.modeprobe.fold_in.default(key, n)
        count = torch.full((), n, dtype=torch.int64, device=key.device)
    return _fold_in(key, count)


def _compiled(key: Tensor) -> bool:
    """Whether modeprobe's library is there to do in one step what takes some hundred here."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if not hasattr(torch.ops.modeprobe, "fold_in"):
        return False
    device = key.device.type.upper()
    return device in ("CPU", "CUDA") and torch._C._dispatch_has_kernel_for_dispatch_key(
        "modeprobe::fold_in", device
    )


def _fold_in(key: Tensor, count: Tensor) -> Tensor:
    low, high = _halves(count)
    words = philox(_halves(key[0]), (*_halves(key[1]), low, (high & 0x3FFFFFFF) | _FOLD))
    return torch.stack([words[0] | words[1] << 32, words[2] | words[3] << 32])


def check_key(key: Tensor, who: str) -> None:
    if not isinstance(key, Tensor):
        raise TypeError(f"{who}: key must be a tensor (see modeprobe.mask.key), got {type(key).__name__}")
    if key.dtype != torch.int64 or key.shape != (2,):
        raise ValueError(
            f"{who}: key must be an int64 tensor of shape (2,), got {key.dtype} of shape {tuple(key.shape)}"
        )


def _halves(value: Tensor) -> tuple[Tensor, Tensor]:
    return value & _LOW32, value >> 32 & _LOW32


def philox(
    key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of key and counter words, elementwise; int64 tensors with values in [0, 2^32)."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        # The low 64 bits of a product are the same for signed and unsigned factors.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32 & _LOW32) ^ c1 ^ k0, b & _LOW32, (a >> 32 & _LOW32) ^ c3 ^ k1, a & _LOW32
        k0, k1 = k0 + _WEYL[0] & _LOW32, k1 + _WEYL[1] & _LOW32
    return c0, c1, c2, c3


def draws(key: Tensor, count: int, offset: int = 0, *, tie: bool = False) -> Tensor:
    """The 16-bit draws ``u(offset .. offset + count - 1)``, or with ``tie`` those that break ties.

    Args:
        key: int64, shape (2,).
        count: how many.
        offset: index of the first, read as uint64.

    Returns:
        int64, shape (count,), values in [0, 2^16).
    """
    first, lead = offset >> 3 & _CHUNKS, offset & 7
    chunk = torch.arange((lead + count + 7) // 8, dtype=torch.int64, device=key.device) + first & _CHUNKS
    low, high = _halves(chunk)
    words = philox(_halves(key[0]), (*_halves(key[1]), low, high | (_TIE if tie else 0)))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1).flatten()[lead : lead + count]


def threshold(p: float | Tensor) -> int | Tensor:
    """``round((1 - p) * 2^32)``, computed in float64: the keep probability as an integer up to 2^32."""
    if isinstance(p, Tensor):
        return ((1 - p.to(torch.float64).clamp(0, 1)) * 2**32).round().to(torch.int64)
    return round((1.0 - p) * 2**32)


def keep_scale(p: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """What kept elements of a ``dtype`` tensor are multiplied by: 1 / (1 - p), for p = 1 zero.

    The factor is rounded to float32, for float64 tensors to float64.
    """
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    if isinstance(p, Tensor):
        q = 1 - p.to(torch.float64).clamp(0, 1)
        return torch.where(q > 0, 1 / q, 0.0).to(acc)
    scale = 1.0 / (1.0 - p) if p < 1 else 0.0
    return scale if acc == torch.float64 else _float32(scale)


def _float32(value: float) -> float:
    """``value`` rounded to float32: at most 24 significant bits, ties to even."""
    if value == 0 or not math.isfinite(value):
        return value
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)


def keep_mask(shape: Sequence[int], p: float | Tensor, key: Tensor, offset: int = 0) -> Tensor:
    """Which elements of a contiguous tensor dropout keeps.

    Args:
        shape: the tensor's shape.
        p: drop probability in [0, 1], a float or a tensor with one element on the key's device.
        key: int64, shape (2,).
        offset: index of the tensor's first element, read as uint64; a shard passes the number of elements
            that precede it.

    Returns:
        bool, ``shape``, on the key's device; True means kept.
    """
    count = math.prod(shape)
    limit = threshold(p)
    if isinstance(limit, int) and limit in (0, 1 << 32):
        return torch.full(tuple(shape), limit > 0, dtype=torch.bool, device=key.device)
    high, low = limit >> 16, limit & 0xFFFF
    u = draws(key, count, offset)
    kept = u < high
    if isinstance(low, Tensor) or low:
        kept = kept | (u == high) & (draws(key, count, offset, tie=True) < low)
    return kept.reshape(tuple(shape))

"""Exact moments over many batches: (n, mean, M2) per channel, merged by Chan's formula.

T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances" (1979). The result does not depend on how the values were cut into batches, except for round-off.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from modeprobe.ops import backend
from modeprobe.ops.batch_norm import operators


class Moments(NamedTuple):
    """Counts, means and sums of squared deviations from the mean; each of shape (channels,)."""

    n: Tensor
    mean: Tensor
    m2: Tensor

    def variance(self, correction: int = 1) -> Tensor:
        """m2 / (n - correction); NaN where that many values were not seen."""
        degrees = self.n - correction
        return torch.where(degrees > 0, self.m2 / degrees.clamp(min=1e-300), torch.nan)


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def channel_view(values: Tensor, x: Tensor) -> Tensor:
    """`values` (C,) shaped to broadcast over `x` (N, C, ...)."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))


def kernel_moments(x: Tensor) -> tuple[int, Tensor, Tensor] | None:
    """`batch_moments` in one read of `x` by modeprobe's kernel. None where there is none, or no value.

    Its mean carries rounding of float32, at |mean| / std = 1e4 some 1e-4 standard deviations: see `too_far`.
    """
    name = backend.resolve(x.device.type)
    if name == "reference" or not x.numel():
        return None
    wide = name == "native" and x.device.type == "cpu"
    moments = torch.ops.modeprobe.batch_norm_moments_double if wide else operators(name).batch_norm_moments
    channels = x.size(1)
    found = moments(x).to(accumulator_dtype(x.device))
    return x.numel() // channels, found[:channels], found[channels : 2 * channels]


def too_far(mean: Tensor, m2: Tensor, n: int | Tensor) -> Tensor:
    """Channels more than 32 standard deviations from zero: rounding of a kernel's mean, 2^-24 of it, would
    show in their pooled variance, to which differences between the batches' means add."""
    return mean.square() * n > 1e3 * m2


def batch_moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Values per channel, mean and M2 of one activation `x` (N, C, ...), any floating dtype and layout.

    In float64 (float32 on devices without it), in several reads of `x` by torch, from deviations and never
    from E[x^2] - E[x]^2, so that |mean| / std up to 1e4 costs no digits.
    """
    n, dtype = x.numel() // x.size(1) if x.numel() else 0, accumulator_dtype(x.device)
    if n == 0:
        zero = torch.zeros(x.size(1), dtype=dtype, device=x.device)
        return 0, zero, zero
    dims = [0, *range(2, x.dim())]
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    shift = x.mean(dims, dtype=work)
    deviation = x - channel_view(shift, x)
    # Not torch.batch_norm_update_stats: its sums over channels_last rows lose 3e-5 at 1e5 rows.
    mean = deviation.mean(dims).to(dtype)
    m2 = deviation.square_().mean(dims).to(dtype) * n - mean.square() * n
    return n, mean + shift.to(dtype), m2.clamp(min=0)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union. Either side may be empty (n = 0)."""
    n = a.n + b.n
    weight = b.n / n.clamp(min=1e-300)
    delta = b.mean - a.mean
    return Moments(n, a.mean + delta * weight, a.m2 + b.m2 + delta.square() * a.n * weight)


# layer, values per channel, mean, M2; None where the layer's slot has the statistics
Call = tuple[int, int, Tensor | None, Tensor | None]


class Pool:
    """Pooled moments of many layers' channels, side by side in flat vectors of length sum(channels).

    One batch costs a few element-wise operations however many layers there are; nothing is read back.

    channels   number of channels of each layer
    momentum   None: every value weighs the same. Otherwise the weight of what came before shrinks by
               (1 - momentum) with each batch.
    last       keep only the last so many calls of each layer
    """

    def __init__(
        self,
        channels: list[int],
        device: torch.device,
        momentum: float | None = None,
        last: int | None = None,
    ):
        self.channels, self.device, self.momentum = channels, device, momentum
        self.dtype = accumulator_dtype(device)
        self.starts = [0]
        for count in channels:
            self.starts.append(self.starts[-1] + count)
        self.total = self.zeros()
        self.skipped = torch.zeros(self.starts[-1], dtype=self.dtype, device=device)
        self.calls = [0] * len(channels)
        self.recent: list[deque] | None = [deque(maxlen=last) for _ in channels] if last else None
        self._waiting: list[Call] = []
        self._slots = torch.empty(2, self.starts[-1], dtype=self.dtype, device=device)
        self._slot = [
            (self._slots[0, self.span(layer)], self._slots[1, self.span(layer)])
            for layer in range(len(channels))
        ]
        self._filled: set[int] = set()
        self._known: set[int] = set()
        self._far: set[int] = set()
        self._flushes = 0
        self._indices: dict[tuple, tuple[Tensor | None, Tensor]] = {}

    def zeros(self) -> Moments:
        return Moments(*torch.zeros(3, self.starts[-1], dtype=self.dtype, device=self.device))

    def span(self, layer: int) -> slice:
        return slice(self.starts[layer], self.starts[layer + 1])

    def add(self, layer: int, n: int, mean: Tensor, m2: Tensor) -> None:
        """Note one call of a layer; merged by the next `flush`."""
        self._waiting.append((layer, n, mean, m2))

    def measure(self, layer: int, x: Tensor) -> tuple[int, Tensor, Tensor]:
        """Values per channel, mean and M2 of one activation, exact enough to be merged: by modeprobe's
        kernel, but by torch for a layer that is `too_far`. That its first batch tells, then the pool."""
        fast = None if layer in self._far else kernel_moments(x)
        if fast is None or (layer not in self._known and bool(too_far(fast[1], fast[2], fast[0]).any())):
            return batch_moments(x)
        return fast

    def trusts(self, layer: int) -> bool | None:
        """Whether a kernel's moments of this layer are exact enough; None before its first batch."""
        return layer not in self._far if layer in self._known else None

    def _watch(self) -> None:
        """Look which layers are too far; ever less often where the answer has to be waited for."""
        self._flushes += 1
        if self.device.type != "cpu" and self._flushes & (self._flushes - 1):
            return
        self._known = {layer for layer, calls in enumerate(self.calls) if calls}
        far = too_far(self.total.mean, self.total.m2, self.total.n)
        self._far = set()
        if bool(far.any()):
            self._far = {bisect_right(self.starts, at) - 1 for at in far.nonzero().flatten().tolist()}

    def slot(self, layer: int) -> tuple[Tensor, Tensor]:
        """Where a kernel may write a call's mean and unbiased variance; `add_slot` then counts them."""
        if layer in self._filled:
            self.flush()
        return self._slot[layer]

    def add_slot(self, layer: int, n: int) -> None:
        """Note one call of a layer of which the slot has the statistics; merged by the next `flush`."""
        self._filled.add(layer)
        self._waiting.append((layer, n, None, None))

    def flush(self) -> None:
        """Merge what waits: one round per repeated call of a layer, in the order of the calls."""
        waiting, self._waiting = self._waiting, []
        self._filled.clear()
        if not waiting:
            return
        while waiting:
            seen: set[int] = set()
            round_: list[Call] = []
            rest: list[Call] = []
            for call in waiting:
                (rest if call[0] in seen else round_).append(call)
                seen.add(call[0])
            self._round(sorted(round_, key=lambda call: call[0]))
            waiting = rest
        self._watch()

    def _round(self, calls: list[Call]) -> None:
        index, n = self._positions(tuple(call[0] for call in calls), tuple(call[1] for call in calls))
        if index is None and all(call[2] is None for call in calls):
            mean, m2 = self._slots[0], self._slots[1] * (n - 1)
        else:
            found = [self._moments(call) for call in calls]
            mean, m2 = torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])
        finite = mean.isfinite() & m2.isfinite()
        batch = Moments(n * finite, torch.where(finite, mean, 0), torch.where(finite, m2, 0))
        for layer, count, *_ in calls:
            self.calls[layer] += 1 if count else 0
        self.update(index, batch, ~finite)
        if self.recent is not None:
            start = 0
            for layer, *_ in calls:
                stop = start + self.channels[layer]
                self.recent[layer].append(Moments(*(part[start:stop] for part in batch)))
                start = stop

    def _moments(self, call: Call) -> tuple[Tensor, Tensor]:
        layer, n, mean, m2 = call
        if mean is None or m2 is None:
            mean, variance = self._slot[layer]
            return mean, variance * (n - 1)
        return mean.to(self.device, self.dtype), m2.to(self.device, self.dtype)

    def _positions(self, layers: tuple[int, ...], counts: tuple[int, ...]) -> tuple[Tensor | None, Tensor]:
        """Where the layers stand in the flat vectors (None: they fill them), and the counts per channel."""
        found = self._indices.get((layers, counts))
        if found is None:
            sizes = torch.tensor([self.channels[layer] for layer in layers])
            n = torch.tensor(counts, dtype=torch.float64).repeat_interleave(sizes)
            index = None
            if len(layers) < len(self.channels):
                index = torch.cat([torch.arange(self.starts[i], self.starts[i + 1]) for i in layers])
                index = index.to(self.device)
            found = self._indices[layers, counts] = (index, n.to(self.device, self.dtype))
        return found

    def update(self, index: Tensor | None, batch: Moments, nonfinite: Tensor) -> None:
        """Take in one batch; `index` as in `_positions`. Channels that are not finite count as skipped."""
        old = gather(self.total, index)
        if self.momentum is not None:
            keep = torch.where(batch.n > 0, 1 - self.momentum, 1.0)
            old = Moments(old.n * keep, old.mean, old.m2 * keep)
        scatter(self.total, index, merge(old, batch))
        self.skipped[slice(None) if index is None else index] += nonfinite.to(self.dtype)

    def result(self) -> Moments:
        """The pooled moments, flat."""
        self.flush()
        if self.recent is None:
            return self.total
        total = self.zeros()
        for layer, batches in enumerate(self.recent):
            pooled = gather(total, self.span(layer))
            for batch in batches:
                if self.momentum is not None:
                    keep = torch.where(batch.n > 0, 1 - self.momentum, 1.0)
                    pooled = Moments(pooled.n * keep, pooled.mean, pooled.m2 * keep)
                pooled = merge(pooled, batch)
            scatter(total, self.span(layer), pooled)
        return total

    def layer(self, layer: int, moments: Moments | None = None) -> Moments:
        """One layer's part of `moments`, by default of everything taken in so far."""
        return gather(self.result() if moments is None else moments, self.span(layer))


def gather(moments: Moments, index: Tensor | slice | None) -> Moments:
    return moments if index is None else Moments(*(part[index] for part in moments))


def scatter(moments: Moments, index: Tensor | slice | None, values: Moments) -> None:
    for part, value in zip(moments, values, strict=True):
        part[slice(None) if index is None else index] = value


def compare(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """How far running statistics are from (unbiased) population statistics, per channel, in float64:
    (running_mean - mean) / sqrt(variance + eps) and log((running_var + eps) / (variance + eps))."""
    variance = variance.double() + eps
    shift = (running_mean.double() - mean.double()) / variance.sqrt()
    return shift, ((running_var.double() + eps) / variance).log()


def rms(values: Tensor) -> float:
    """Root mean square over the finite values; NaN if there is none."""
    values = values[values.isfinite()]
    return float(values.square().mean().sqrt()) if values.numel() else float("nan")

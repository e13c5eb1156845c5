"""What a pass tells about the batches, beside the pooled moments: a moving average over them, their spread,
and the batch that weighs most."""

from __future__ import annotations

import torch
from torch import Tensor

from modeprobe.statistics.pooled import Moments, Pool, merge, scatter


class Trace(Pool):
    """A `Pool` that also keeps, per channel:

    moving      mean and unbiased variance of the moving average that training would have made of exactly
                these batches, with the layer's momentum (None: cumulative) and without an initial value
    within      sum of the batches' own M2; the rest of the total M2 lies between the batches
    spread      (count, mean, M2) of the batch means and of the batch variances, each batch weighing the same
    most        the largest part of M2 that one batch brought in, and which batch (counted per layer)
    """

    def __init__(self, channels: list[int], device: torch.device, momenta: list[float | None]):
        super().__init__(channels, device)
        sizes = torch.tensor(channels)
        rates = torch.tensor([-1.0 if rate is None else rate for rate in momenta], dtype=torch.float64)
        self.rate = rates.repeat_interleave(sizes).to(device, self.dtype)
        self.sums = torch.zeros(6, self.starts[-1], dtype=self.dtype, device=device)
        self.moving_mean, self.moving_variance, self.moving_weight = self.sums[:3]
        self.within, self.batches, self.used = self.sums[3:]
        self.most, self.most_batch = torch.zeros_like(self.sums[:2])
        self.spread = torch.zeros_like(self.sums[:4])  # mean, M2 of batch means; of batch variances

    def update(self, index: Tensor | None, batch: Moments, nonfinite: Tensor) -> None:
        at = slice(None) if index is None else index
        before = self.total.m2[at].clone()
        super().update(index, batch, nonfinite)
        gain = self.total.m2[at] - before
        larger = gain > self.most[at]
        self.most[at] = torch.where(larger, gain, self.most[at])
        self.most_batch[at] = torch.where(larger, self.batches[at], self.most_batch[at])
        self.batches[at] += 1
        self.within[at] += batch.m2

        counts = batch.n > 1  # training refuses batches of a single value
        variance = batch.m2 / (batch.n - 1).clamp(min=1)
        self.used[at] += counts.to(self.dtype)
        used = self.used[at].clamp(min=1)
        rate = torch.where(self.rate[at] < 0, 1 / used, self.rate[at])
        rate = torch.where(counts, rate, 0)
        self.moving_mean[at] += rate * (batch.mean - self.moving_mean[at])
        self.moving_variance[at] += rate * (variance - self.moving_variance[at])
        self.moving_weight[at] += rate * (1 - self.moving_weight[at])
        for value, mean, m2 in ((batch.mean, *self.spread[:2]), (variance, *self.spread[2:])):
            delta = torch.where(counts, value - mean[at], 0)
            mean[at] += delta / used
            m2[at] += torch.where(counts, delta * (value - mean[at]), 0)

    def packed(self) -> Tensor:
        """All sums, to be merged with those of other ranks by `take_in`."""
        self.flush()
        sizes = torch.tensor(self.channels, device=self.device)
        calls = torch.tensor(self.calls, device=self.device, dtype=self.dtype).repeat_interleave(sizes)
        rest = (self.most, self.most_batch, *self.spread, calls)
        return torch.stack([*self.total, self.skipped, *self.sums, *rest])

    def take_in(self, parts: list[Tensor]) -> None:
        """Hold what all ranks hold together; `parts` are their `packed()` in rank order. A moving average
        becomes the ranks' mean, each weighing by what it holds of its batches; of the batch that weighs most,
        the number is that on its rank."""
        total, means, variances = self.zeros(), self.zeros(), self.zeros()
        calls = torch.zeros_like(self.skipped)
        for values in (self.skipped, self.sums, self.most, self.most_batch):
            values.zero_()
        for part in parts:
            sums, most, most_batch, spread = part[4:10], part[10], part[11], part[12:16]
            total = merge(total, Moments(*part[:3]))
            means = merge(means, Moments(sums[5], spread[0], spread[1]))
            variances = merge(variances, Moments(sums[5], spread[2], spread[3]))
            self.skipped += part[3]
            self.sums += sums
            calls += part[16]
            self.most_batch.copy_(torch.where(most > self.most, most_batch, self.most_batch))
            self.most.copy_(torch.maximum(self.most, most))
        scatter(self.total, None, total)
        self.spread.copy_(torch.stack([*means[1:], *variances[1:]]))
        starts = [start for start, count in zip(self.starts, self.channels, strict=False) if count]
        counts = iter(calls[starts].tolist())
        self.calls = [int(next(counts)) if count else 0 for count in self.channels]

    def moving(self, layer: int) -> tuple[Tensor, Tensor]:
        """Moving mean and variance of one layer, free of the initial value."""
        span = self.span(layer)
        weight = self.moving_weight[span].clamp(min=1e-300)
        return self.moving_mean[span] / weight, self.moving_variance[span] / weight

    def noise(self, layer: int) -> tuple[Tensor, Tensor]:
        """Variance over the batches of the batch mean and of the batch variance."""
        span = self.span(layer)
        degrees = (self.used[span] - 1).clamp(min=1)
        return self.spread[1][span] / degrees, self.spread[3][span] / degrees

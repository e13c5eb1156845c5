"""What a pass tells about the batches, beside the pooled moments: a moving average over them, their spread,
and the batch that weighs most."""

from __future__ import annotations

import torch
from torch import Tensor

from modeprobe.statistics.pooled import Moments, Pool


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
        flat = torch.zeros(12, self.starts[-1], dtype=self.dtype, device=device)
        self.moving_mean, self.moving_variance, self.moving_weight = flat[:3]
        self.within, self.most, self.most_batch, self.batches, self.used = flat[3:8]
        self.spread = flat[8:12]  # mean and M2 of batch means, mean and M2 of batch variances

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

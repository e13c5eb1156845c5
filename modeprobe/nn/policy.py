"""Which batches reach a BatchNorm layer's running statistics, and when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

POLICIES = ("ema", "cumulative", "frozen", "pending")


class StatisticsPolicy(nn.Module):
    """What a BatchNorm layer does with the statistics of a training batch, independent of `train()` and
    `eval()`, which go on to say when a batch is one for training.

    statistics
        "ema"         the moving average with the layer's momentum, as in torch
        "cumulative"  the average of all batches, as torch's momentum=None
        "frozen"      nothing: the layer normalises with its running statistics in both modes
        "pending"     they are kept aside, merged with those of earlier batches as one large batch would have
                      them, until `commit()` makes one update of them or `discard()` forgets them

    Attributes have class defaults, so that a module whose class is changed to one of these has them.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    _statistics: str = "ema"
    _pending: Tensor | None = None  # float64 (2 * C + 1): mean, M2, n

    @property
    def statistics(self) -> str:
        return self._statistics

    @statistics.setter
    def statistics(self, policy: str) -> None:
        if policy not in POLICIES:
            raise ValueError(f"statistics must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
        if policy != "ema" and self.running_mean is None:
            raise ValueError(f"statistics={policy!r} needs running statistics; track_running_stats is False")
        self._statistics = policy
        self._pending = None if policy != "pending" else self._nothing()

    def _nothing(self) -> Tensor:
        assert self.running_mean is not None
        return self.running_mean.new_zeros(2 * self.running_mean.numel() + 1, dtype=torch.float64)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._place_pending()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._place_pending()

    def _place_pending(self) -> None:
        """Pending moments move with the module but keep their dtype; on "meta" they are forgotten."""
        if self._pending is not None and self.running_mean is not None:
            unplaced = self._pending.is_meta or self.running_mean.is_meta
            self._pending = self._nothing() if unplaced else self._pending.to(self.running_mean.device)

    @torch.no_grad()
    def hold(self, mean: Tensor, variance: Tensor, n: int | Tensor, taken: Tensor) -> None:
        """Merge a batch of `n` values per channel (its mean, its unbiased variance) into what is pending,
        unless `taken` says 0: a batch that was recomputed, or left out because it is not finite."""
        pending = self._pending
        if pending is None:
            return
        channels = mean.numel()
        mean, variance = mean.double(), variance.double()
        old_mean, old_m2, count = pending[:channels], pending[channels:-1], pending[-1:]
        total = count + n
        share = n / total
        delta = mean - old_mean
        m2 = old_m2 + variance * (n - 1) + delta.square() * count * share
        merged = torch.cat([old_mean + delta * share, m2, total])
        pending.copy_(torch.where((taken > 0) & (total > 0), merged, pending))

    @torch.no_grad()
    def commit(self) -> None:
        """Update the running statistics with what is pending, as one batch; nothing pending, nothing done.

        On the device, without a sync. Raises RuntimeError if the policy is not "pending".
        """
        pending = self._held()
        mean, variance, counter = self.running_mean, self.running_var, self.num_batches_tracked
        assert mean is not None
        assert variance is not None
        channels, n = mean.numel(), pending[-1]
        some = n > 0
        if counter is not None:
            counter += some
        factor: Any = self.momentum
        if factor is None:
            factor = 1 / (counter.clamp(min=1).double() if counter is not None else pending.new_ones(()))
        new_mean, new_variance = pending[:channels], pending[channels:-1] / (n - 1).clamp(min=1)
        for buffer, new in ((mean, new_mean), (variance, new_variance)):
            # A factor of 1 assigns, so that it heals NaN.
            blended = new if self.momentum == 1 else (1 - factor) * buffer.double() + factor * new
            if self.momentum is None:
                blended = torch.where(factor == 1, new, blended)
            buffer.copy_(torch.where(some, blended, buffer.double()))
        pending.zero_()

    def discard(self) -> None:
        """Forget what is pending, for instance after a step that the gradient scaler skipped.

        Raises RuntimeError if the policy is not "pending".
        """
        self._held().zero_()

    def _held(self) -> Tensor:
        if self._pending is None:
            raise RuntimeError(f'needs statistics="pending", the policy is {self.statistics!r}')
        return self._pending


def _layers(model: nn.Module) -> Iterator[StatisticsPolicy]:
    for module in model.modules():
        if isinstance(module, StatisticsPolicy):
            yield module


def set_statistics(model: nn.Module, policy: str) -> None:
    """Give every BatchNorm layer of `model` that has running statistics the policy "ema", "cumulative",
    "frozen" or "pending" (see `modeprobe.nn.BatchNorm1d`); what was pending is forgotten.

    Raises TypeError, before anything is changed, if a layer is torch's own: `mp.swap(model)` replaces those.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, StatisticsPolicy):
            raise TypeError(
                f"{name or 'model'} is {type(module).__name__}, which has no policy; mp.swap(model) first"
            )
    for layer in _layers(model):
        if layer.running_mean is not None:
            layer.statistics = policy


def commit_statistics(model: nn.Module) -> None:
    """`commit()` every layer of `model` whose policy is "pending"."""
    for layer in _layers(model):
        if layer.statistics == "pending":
            layer.commit()


def discard_statistics(model: nn.Module) -> None:
    """`discard()` in every layer of `model` whose policy is "pending"."""
    for layer in _layers(model):
        if layer.statistics == "pending":
            layer.discard()

"""What the choice of statistics does to a model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from modeprobe.statistics.feed import Feed, batch_size, tensors
from modeprobe.statistics.layers import Layer, batch_or_pooled, normalising_with
from modeprobe.statistics.pooled import Pool, batch_moments, kernel_moments
from modeprobe.statistics.ranks import together
from modeprobe.statistics.report import Change, Effect

PAIRS = {"running_vs_full": (0, 1), "running_vs_batch": (0, 2), "batch_vs_full": (2, 1)}


class _Difference:
    """Sums for sqrt(sum (a - b)^2 / sum b^2) over all floating outputs, and how often the largest output
    (over dimension 1 of the first one) is another one."""

    def __init__(
        self, difference: float = 0.0, scale: float = 0.0, changed: float = 0.0, decisions: float = 0.0
    ) -> None:
        self.difference, self.scale, self.changed, self.decisions = difference, scale, changed, decisions

    def add(self, a: list[Tensor], b: list[Tensor]) -> None:
        for x, y in zip(a, b, strict=False):
            if x.shape == y.shape:
                self.difference += float((x.double() - y.double()).square().sum())
                self.scale += float(y.double().square().sum())
        if a and b and a[0].shape == b[0].shape and a[0].dim() > 1 and a[0].size(1) > 1 and a[0].numel():
            differs = a[0].argmax(1) != b[0].argmax(1)
            self.changed += int(differs.sum())
            self.decisions += differs.numel()

    def packed(self) -> list[float]:
        return [self.difference, self.scale, self.changed, self.decisions]

    def result(self) -> Change:
        relative = (self.difference / self.scale) ** 0.5 if self.scale else float(self.difference > 0)
        return Change(relative, self.changed / self.decisions if self.decisions else None)


def measure_effect(
    feed: Feed,
    layers: list[Layer],
    pool: Pool,
    batches: Iterable[Any],
    metric: Callable[[Any, Any], float] | None,
    group: Any = None,
) -> Effect:
    """Outputs over `batches` of all ranks under running, full-pass and batch statistics; frozen layers keep
    theirs."""
    parts = together(lambda: _measure(feed, layers, pool, batches, metric), group)
    count, weight, *rest = torch.stack(parts).sum(0).tolist()
    metrics, pairs = rest[:3], iter(zip(*[iter(rest[3:])] * 4, strict=True))
    changes = {name: _Difference(*next(pairs)).result() for name in PAIRS}
    named = None
    if metric is not None and weight:
        named = dict(zip(("running", "full", "batch"), (value / weight for value in metrics), strict=True))
    return Effect(**changes, metric=named, batches=int(count))


def _measure(
    feed: Feed,
    layers: list[Layer],
    pool: Pool,
    batches: Iterable[Any],
    metric: Callable[[Any, Any], float] | None,
) -> Tensor:
    """This rank's sums: batches, samples, three metrics weighted by samples, four of each pair."""
    free = [pool.calls[i] > 0 and layer.has_buffers and not layer.frozen for i, layer in enumerate(layers)]
    full = [(part.mean, part.variance()) for part in (pool.layer(i) for i in range(len(layers)))]

    def full_pass(i: int, x: Tensor) -> tuple[Tensor, Tensor] | None:
        return full[i] if free[i] else None

    def of_batch(i: int, x: Tensor) -> tuple[Tensor, Tensor] | None:
        if not free[i]:
            return None
        n, mean, m2 = kernel_moments(x) or batch_moments(x)
        return batch_or_pooled(n, mean, m2, layers[i], lambda: pool.layer(i))

    differences = {name: _Difference() for name in PAIRS}
    sums, weight, count = [0.0, 0.0, 0.0], 0, 0
    for batch in batches:
        count += 1
        n = batch_size(batch)
        weight += n
        outputs = []
        for i, provide in enumerate((None, full_pass, of_batch)):
            with nullcontext() if provide is None else normalising_with(layers, provide):
                output = feed.run(batch)
            if metric is not None:
                sums[i] += float(metric(output, batch)) * n
            outputs.append([tensor for tensor in tensors(output) if tensor.is_floating_point()])
        for name, (a, b) in PAIRS.items():
            differences[name].add(outputs[a], outputs[b])
    pairs = [value for name in PAIRS for value in differences[name].packed()]
    return torch.tensor([count, weight, *sums, *pairs], dtype=torch.float64)

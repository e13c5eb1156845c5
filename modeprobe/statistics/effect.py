"""What the choice of statistics does to a model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from modeprobe.statistics.feed import Feed, batch_size, tensors
from modeprobe.statistics.layers import Layer, batch_or_pooled, normalising_with
from modeprobe.statistics.pooled import Pool, batch_moments, kernel_moments
from modeprobe.statistics.report import Change, Effect

PAIRS = {"running_vs_full": (0, 1), "running_vs_batch": (0, 2), "batch_vs_full": (2, 1)}


class _Difference:
    """Sums for sqrt(sum (a - b)^2 / sum b^2) over all floating outputs, and how often the largest output
    (over dimension 1 of the first one) is another one."""

    def __init__(self) -> None:
        self.difference = self.scale = 0.0
        self.changed = self.decisions = 0

    def add(self, a: list[Tensor], b: list[Tensor]) -> None:
        for x, y in zip(a, b, strict=False):
            if x.shape == y.shape:
                self.difference += float((x.double() - y.double()).square().sum())
                self.scale += float(y.double().square().sum())
        if a and b and a[0].shape == b[0].shape and a[0].dim() > 1 and a[0].size(1) > 1 and a[0].numel():
            differs = a[0].argmax(1) != b[0].argmax(1)
            self.changed += int(differs.sum())
            self.decisions += differs.numel()

    def result(self) -> Change:
        relative = (self.difference / self.scale) ** 0.5 if self.scale else float(self.difference > 0)
        return Change(relative, self.changed / self.decisions if self.decisions else None)


def measure_effect(
    feed: Feed,
    layers: list[Layer],
    pool: Pool,
    batches: Iterable[Any],
    metric: Callable[[Any, Any], float] | None,
) -> Effect:
    """Outputs over `batches` under running, full-pass and batch statistics; frozen layers keep theirs."""
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
    metrics = None
    if metric is not None and weight:
        metrics = dict(zip(("running", "full", "batch"), (value / weight for value in sums), strict=True))
    return Effect(
        **{name: item.result() for name, item in differences.items()}, metric=metrics, batches=count
    )

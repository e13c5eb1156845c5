"""What recalibration did and what drift found, as text, JSON and HTML."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    """Columns padded with two spaces between; the first flush left, the others flush right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    if value is None or value != value:
        return "-"
    return f"{value:.{digits}g}"


def plain(value: Any) -> Any:
    """JSON has neither NaN nor Inf: they become None."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


@dataclass
class RecalibratedLayer:
    """One BatchNorm layer in a `RecalibrationReport`.

    `state` is "recalibrated", "frozen: ...", "not reached", "not selected" or "no running statistics";
    `values` the values merged per channel; `left_out` the calls that were not finite; `mean_shift` and
    `log_variance_ratio` how far the old buffers were from the new, root mean square over channels, in
    standard deviations and as a natural logarithm.
    """

    name: str
    state: str
    values: int = 0
    calls: int = 0
    left_out: int = 0
    mean_shift: float | None = None
    log_variance_ratio: float | None = None


@dataclass
class RecalibrationReport:
    layers: list[RecalibratedLayer] = field(default_factory=list)
    layerwise: bool = False

    @property
    def verdict(self) -> str:
        done = [layer for layer in self.layers if layer.state == "recalibrated"]
        if not self.layers:
            return "The model has no BatchNorm layers."
        if not done:
            return f"No BatchNorm layer of {len(self.layers)} was recalibrated."
        how = "each behind recalibrated layers" if self.layerwise else "behind batch-normalised layers"
        return (
            f"{len(done)} of {len(self.layers)} BatchNorm layers have exact statistics of {done[0].values:,} "
            f"values per channel in {done[0].calls:,} batches, measured {how}."
        )

    def __str__(self) -> str:
        rows = [
            [
                layer.name or "(model)",
                layer.state,
                f"{layer.values:,}",
                str(layer.calls),
                str(layer.left_out),
                number(layer.mean_shift),
                number(layer.log_variance_ratio),
            ]
            for layer in self.layers
        ]
        head = ["layer", "state", "values", "calls", "left out", "mean was off (std)", "log variance was off"]
        return self.verdict + ("\n\n" + table(head, rows) if rows else "")

    __repr__ = __str__  # what a prompt shows

    def to_json(self) -> str:
        return json.dumps(plain({"verdict": self.verdict, **asdict(self)}), indent=2)


@dataclass
class LayerDrift:
    """One BatchNorm layer in a `DriftReport`; formulas are in `drift`'s docstring.

    `source` says where the layer's statistics come from; `mean_shift` and `log_variance_ratio` are root mean
    squares over channels; `shift`, `ratio` and `divergence` have one value per channel; `initial`,
    `not_representative` and `stale` are sizes of the parts of the difference and `noise` the size that chance
    gives to a moving average of such batches. `between_ratio` is the variance between batches over what
    shuffled batches could have at most; `largest_share` the median channel's share of the sum of squares that
    the batch `largest_batch` brought in. None: not defined for this layer.
    """

    name: str
    kind: str
    source: str
    momentum: float | None = None
    updates: int | None = None
    channels: int = 0
    values: int = 0
    calls: int = 0
    calls_per_forward: float = 0.0
    initial_weight: float | None = None
    mean_shift: float | None = None
    mean_shift_max: float | None = None
    log_variance_ratio: float | None = None
    kl: float | None = None
    kl_max: float | None = None
    size: float | None = None
    initial: float | None = None
    not_representative: float | None = None
    stale: float | None = None
    noise: float | None = None
    cause: str = ""
    worst: list[int] = field(default_factory=list)
    dead: list[int] = field(default_factory=list)
    nonfinite_batches: int = 0
    nonfinite_buffers: int = 0
    between_ratio: float | None = None
    largest_share: float | None = None
    largest_batch: int | None = None
    shift: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)


@dataclass
class Change:
    """`relative` is sqrt(sum (a - b)^2 / sum b^2) over all outputs; `decisions` the share of largest outputs
    (over dimension 1) that differ, None if outputs have no such dimension."""

    relative: float
    decisions: float | None = None

    def __str__(self) -> str:
        text = f"{self.relative:.1%}" if self.relative == self.relative else "NaN"
        return text if self.decisions is None else f"{text} ({self.decisions:.1%} of decisions)"


@dataclass
class Effect:
    """Outputs compared under running, full-pass and batch statistics; `metric` under each of the three."""

    running_vs_full: Change
    running_vs_batch: Change
    batch_vs_full: Change
    metric: dict[str, float] | None = None
    batches: int = 0


@dataclass
class DriftReport:
    layers: list[LayerDrift] = field(default_factory=list)
    effect: Effect | None = None
    signs: list[str] = field(default_factory=list)
    batches: int = 0
    samples: int = 0
    lower: str = "batch"
    tolerance: float = 0.1

    @property
    def off(self) -> list[LayerDrift]:
        """Layers whose statistics do not fit, worst first."""
        bad = [layer for layer in self.layers if layer.cause not in ("", "fits", "not reached")]
        worst = float("inf")
        return sorted(bad, key=lambda layer: -worst if layer.size != layer.size else -(layer.size or 0))

    @property
    def verdict(self) -> str:
        if not self.layers:
            return "The model has no BatchNorm layers."
        tracked = [layer for layer in self.layers if layer.size is not None]
        if not tracked:
            return "No BatchNorm layer with running statistics was reached: evaluation depends on the batch."
        if not self.off:
            count = f"All {len(tracked)} BatchNorm layers' running statistics"
            return f"{count} fit the data (size <= {self.tolerance:g})."
        worst = self.off[0]
        causes = ", ".join(sorted({layer.cause for layer in self.off}))
        if worst.nonfinite_buffers:
            how = "holds NaN or Inf"
        else:
            shift, ratio = number(worst.mean_shift, 2), number(worst.log_variance_ratio, 2)
            how = f"has its mean off by {shift} std, log variance by {ratio}"
        text = (
            f"{len(self.off)} of {len(tracked)} BatchNorm layers' running statistics do not fit the data "
            f"({causes}); worst is {worst.name or 'the model'}, which {how}."
        )
        if self.effect is not None:
            text += f" Full-pass statistics change the outputs by {self.effect.running_vs_full}"
            metric = self.effect.metric
            text += f", the metric from {metric['running']:.4g} to {metric['full']:.4g}." if metric else "."
        return text

    def __str__(self) -> str:
        head = ["layer", "source", "initial", "mean shift", "max", "log var", "KL", "size", "cause"]
        rows = [
            [
                layer.name or "(model)",
                layer.source,
                "-" if layer.initial_weight is None else f"{layer.initial_weight:.1%}",
                number(layer.mean_shift),
                number(layer.mean_shift_max),
                number(layer.log_variance_ratio),
                number(layer.kl),
                number(layer.size),
                layer.cause or "-",
            ]
            for layer in self.layers
        ]
        parts = [self.verdict]
        if rows:
            parts.append(table(head, rows))
        if self.effect is not None:
            parts.append(self._effect_text())
        if self.signs:
            parts.append("\n".join(f"* {sign}" for sign in self.signs))
        return "\n\n".join(parts)

    __repr__ = __str__

    def _effect_text(self) -> str:
        effect = self.effect
        assert effect is not None
        head = ["outputs differ", "by"]
        rows = [
            ["running from full pass", str(effect.running_vs_full)],
            ["running from batch", str(effect.running_vs_batch)],
            ["batch from full pass", str(effect.batch_vs_full)],
        ]
        text = table(head, rows)
        if effect.metric:
            text += (
                "\n" + "metric: " + ", ".join(f"{name} {value:.4g}" for name, value in effect.metric.items())
            )
        return text

    def to_json(self) -> str:
        return json.dumps(plain({"verdict": self.verdict, **asdict(self)}), indent=2)

    def chart(self) -> str:
        """Mean shift and log variance ratio of every layer, as SVG text."""
        from modeprobe.statistics.chart import drift_chart

        return drift_chart(self)

    def to_html(self) -> str:
        """One page with verdict, chart and tables; it loads nothing."""
        from modeprobe.statistics.page import drift_page

        return drift_page(self)

"""A `DriftReport` as one HTML page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from modeprobe._version import __version__
from modeprobe.statistics.chart import drift_chart
from modeprobe.statistics.report import DriftReport, number


def drift_page(report: DriftReport) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = number
    template = environment.from_string((Path(__file__).parent / "templates/drift.html").read_text("utf-8"))
    effect = report.effect
    changes = effect and [
        ("running", "full-pass", effect.running_vs_full),
        ("running", "batch", effect.running_vs_batch),
        ("batch", "full-pass", effect.batch_vs_full),
    ]
    return template.render(
        report=report,
        chart=drift_chart(report) if any(layer.shift for layer in report.layers) else "",
        worst=[(layer, channel) for layer in report.off[:3] for channel in layer.worst],
        changes=changes,
        version=__version__,
    )

"""Drift of every layer in one drawing, as SVG text."""

from __future__ import annotations

from html import escape
from math import asinh, isfinite

from modeprobe.statistics.report import DriftReport, LayerDrift

WIDTH, PANEL, GAP, LEFT, TOP = 920, 190, 46, 64, 26
INK, QUIET, GRID, FITS, OFF = "#1f2937", "#6b7280", "#e5e7eb", "#4f46e5", "#dc2626"
TICKS = (0.0, 0.1, 1.0, 10.0, 100.0, 1000.0)


def quantiles(values: list[float]) -> tuple[float, float, float, float, float] | None:
    """Least, quarters and greatest of the finite values."""
    ordered = sorted(value for value in values if isfinite(value))
    if not ordered:
        return None
    last = len(ordered) - 1
    low, first, middle, third, high = (ordered[round(last * part / 4)] for part in range(5))
    return low, first, middle, third, high


def scaled(value: float) -> float:
    """Linear up to about 0.1 and logarithmic beyond, on both sides of 0."""
    return asinh(value / 0.1)


def drift_chart(report: DriftReport) -> str:
    """Two panels over the layers in order: mean shift in standard deviations, and log variance ratio.

    A line spans all channels of a layer, a bar the middle half, a tick the median; the band is the tolerance.
    """
    layers = [layer for layer in report.layers if layer.shift]
    longest = min(max((len(layer.name) for layer in layers), default=0), 20)
    height = TOP + 2 * PANEL + GAP + 24 + 4 * longest
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-label="Mean shift and log variance ratio per BatchNorm layer" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="{INK}">'
    ]
    parts += _panel("mean shift (standard deviations)", layers, "shift", TOP, report.tolerance)
    below = TOP + PANEL + GAP
    parts += _panel("log of running variance / variance", layers, "ratio", below, 2**0.5 * report.tolerance)
    for number, layer in enumerate(layers):
        if len(layers) > 40 and number % (len(layers) // 20):
            continue
        x, y = _x(number, len(layers)), below + PANEL + 12
        name = layer.name if len(layer.name) < 20 else "..." + layer.name[-17:]
        parts.append(
            f'<text x="{x:.1f}" y="{y}" text-anchor="end" transform="rotate(-35 {x:.1f} {y})">'
            f"{escape(name or '(model)')}</text>"
        )
    return "".join([*parts, "</svg>"])


def _x(number: int, count: int) -> float:
    return LEFT + (WIDTH - LEFT - 16) * (number + 0.5) / count


def _panel(title: str, layers: list[LayerDrift], what: str, top: float, tolerance: float) -> list[str]:
    boxes = [quantiles(getattr(layer, what)) for layer in layers]
    extremes = [abs(value) for box in boxes if box for value in (box[0], box[4])]
    limit = max([1.0, *extremes]) * 1.1

    def y(value: float) -> float:
        return top + PANEL / 2 * (1 - scaled(value) / scaled(limit))

    right = WIDTH - 16
    parts = [
        f'<text x="{LEFT}" y="{top - 8}" font-weight="600" font-size="12">{title}</text>',
        f'<rect x="{LEFT}" y="{y(tolerance):.1f}" width="{right - LEFT}" '
        f'height="{y(-tolerance) - y(tolerance):.1f}" fill="#eef2ff"/>',
    ]
    ticks = sorted({sign * tick for tick in TICKS for sign in (-1, 1) if tick <= limit})
    for value in ticks:
        height = y(value)
        parts += [
            f'<line x1="{LEFT}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}" stroke="{GRID}"/>',
            f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end" fill="{QUIET}">{value:g}</text>',
        ]
    width = min(18.0, (right - LEFT) / max(len(layers), 1) * 0.6)
    for number, (layer, box) in enumerate(zip(layers, boxes, strict=True)):
        x, colour = _x(number, len(layers)), FITS if layer.cause == "fits" else OFF
        if box is None:
            parts.append(f'<text x="{x:.1f}" y="{y(0) - 4:.1f}" text-anchor="middle" fill="{OFF}">NaN</text>')
            continue
        low, first, middle, third, high = map(y, box)
        tip = f"{layer.name}: {box[0]:.3g} to {box[4]:.3g}, median {box[2]:.3g}; {layer.cause}"
        parts.append(
            f"<g><title>{escape(tip)}</title>"
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{high:.1f}" y2="{low:.1f}" stroke="{colour}"/>'
            f'<rect x="{x - width / 2:.1f}" y="{third:.1f}" width="{width:.1f}" '
            f'height="{max(first - third, 1):.1f}" fill="{colour}" fill-opacity=".35"/>'
            f'<line x1="{x - width / 2:.1f}" x2="{x + width / 2:.1f}" y1="{middle:.1f}" y2="{middle:.1f}" '
            f'stroke="{colour}" stroke-width="2"/></g>'
        )
    return parts

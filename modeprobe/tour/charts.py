"""The tour's charts, as SVG text that can stand inside an HTML page."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from modeprobe.tour import batch_norm, dropout
from modeprobe.tour.section import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDS = {"matplotlib": "matplotlib"}

INK, GRID = "#1f2937", "#e5e7eb"
OURS, TORCH, FLOOR, THIRD = "#4f46e5", "#ea580c", "#9ca3af", "#0d9488"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.fonttype": "path",
}


def _figure(name: str, columns: int, draw) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure: Figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        draw(*figure.subplots(1, columns, squeeze=False)[0])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Several drawings share one page: their ids must not.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", re.sub(r' height="[^"]*pt"', "", svg, count=1))


def dropout_speed(result: dropout.Result) -> str:
    """Time per call against size, with the floor of any elementwise pass."""
    colours = {"F.dropout": TORCH, "modeprobe": OURS, "x * 2": FLOOR, "copy": "#4b5563"}

    def draw(times: Axes, ratios: Axes) -> None:
        sizes = [speed.elements for speed in result.speeds]
        for work in dropout.WORKS:
            floor = work in ("x * 2", "copy")
            times.plot(
                sizes,
                [1e3 * speed.seconds[work] for speed in result.speeds],
                color=colours[work],
                linestyle="--" if floor else "-",
                marker=None if floor else "o",
                markersize=4,
                label=work,
            )
        times.set(xscale="log", yscale="log", xlabel="elements (float32)", ylabel="ms per call")
        times.set_xscale("log", base=2)
        times.set_title(f"Forward pass, p = {result.speed_p:g}, {count(result.threads, 'thread')}")
        times.legend()
        positions = range(len(sizes))
        values = [speed.ratio for speed in result.speeds]
        bars = ratios.bar(positions, values, color=OURS, width=0.6)
        ratios.bar_label(bars, [f"{value:.1f}x" for value in values], padding=2)
        ratios.axhline(1, color=TORCH, linewidth=1.2)
        ratios.set_xticks(positions, [f"$2^{{{size.bit_length() - 1}}}$" for size in sizes])
        ratios.set(xlabel="elements (float32)", ylabel="times F.dropout's speed")
        ratios.set_title("Speed against F.dropout")
        ratios.grid(axis="x", visible=False)

    return _figure("dropout-speed", 2, draw)


def moving_average(result: batch_norm.Result) -> str:
    """How the moving average approaches the full-pass value, step by step."""
    approach = result.approach
    frozen_steps = range(1, len(approach.frozen) + 1)

    def draw(distance: Axes, channel: Axes) -> None:
        distance.plot(approach.steps, approach.training, color=OURS, label="while the weights train")
        distance.plot(frozen_steps, approach.frozen, color=THIRD, label="under the trained weights")
        start = approach.frozen[0] / (1 - approach.momentum)
        decay = [start * (1 - approach.momentum) ** step for step in frozen_steps]
        distance.plot(
            frozen_steps, decay, color=FLOOR, linestyle="--", label=f"$(1-m)^n$, m = {approach.momentum:g}"
        )
        lowest = min(approach.frozen + approach.training)
        distance.set(xlabel="step", ylabel="|moving average - full pass| / std", yscale="log")
        distance.set_ylim(bottom=lowest / 2)
        distance.set_title("Distance to the full-pass mean, all channels")
        distance.legend()
        channel.plot(
            approach.steps, approach.channel_full, color=TORCH, label="full pass over the training set"
        )
        channel.plot(approach.steps, approach.channel_moving, color=OURS, label="moving average")
        channel.set(xlabel="step of training", ylabel="mean of the channel's input")
        channel.set_title("One channel of the last BatchNorm layer")
        channel.legend()

    return _figure("moving-average", 2, draw)


def accuracy(result: batch_norm.Result) -> str:
    """Test accuracy of the same weights under each source of statistics."""
    colours = dict(zip(batch_norm.SOURCES, (FLOOR, OURS, TORCH), strict=True))
    measured = result.runs["modeprobe"].accuracy
    steps = sorted(measured)

    def draw(bars: Axes) -> None:
        for shift, source in zip((-0.27, 0, 0.27), batch_norm.SOURCES, strict=True):
            heights = [100 * measured[step][source] for step in steps]
            drawn = bars.bar(
                [index + shift for index in range(len(steps))],
                heights,
                0.25,
                color=colours[source],
                label=source,
            )
            bars.bar_label(drawn, fmt="%.1f", padding=2, fontsize=8)
        bars.set_xticks(range(len(steps)), [f"after {step} steps" for step in steps])
        bars.set(ylabel="test accuracy, %", ylim=(0, 118))
        bars.set_title("The same weights, evaluated with three kinds of statistics (swapped network)")
        bars.legend(ncols=3, loc="upper left")
        bars.grid(axis="x", visible=False)

    return _figure("accuracy", 1, draw)

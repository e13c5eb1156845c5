"""Charts of a results file: the headline, the summary, speed against size, bars per layer, memory, models."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .check import fits, named, targets
from .registry import item_size
from .results import Results
from .tables import by_work, group_names, in_words, members, section, size, times

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLORS = {
    "modeprobe": "#0072B2",
    "modeprobe fused": "#009E73",
    "modeprobe triton": "#56B4E9",
    "torch": "#7f7f7f",
    "torch.compile": "#E69F00",
}
MARKERS = {
    "modeprobe": "o",
    "modeprobe fused": "D",
    "modeprobe triton": "s",
    "torch": "X",
    "torch.compile": "^",
}
OTHERS = "#CC79A7"
SLOWER = "#D55E00"
INK = "#1f2937"


@dataclass(frozen=True)
class Chart:
    """``draw`` makes a matplotlib figure; ``name`` is the file's stem."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Any]


def every_chart(results: Results) -> Iterator[Chart]:
    """The charts that the results have data for, the summary first."""
    if named(results):
        device = "cuda" if results["machine"]["gpu"] else "cpu"
        yield Chart(
            f"headline-{device}",
            "How many times as fast as torch",
            "Median ratio of times in one process, round by round; the line spans the 20th to the 80th "
            "percentile. The triangle is torch.compile on the same scale.",
            partial(headline, results),
        )
    for device in dict.fromkeys(row["device"] for row in results["results"]):
        if summary_rows(results, device):
            yield Chart(
                f"summary-{device}",
                "Time against a plain pass over the same bytes",
                "Each mark is the median time of an operation over that of a copy which moves the same "
                "bytes: 1 is the memory's own speed. The line spans the 20th to the 80th percentile.",
                partial(summary, results, device),
            )
    for group in group_names(results, ""):
        if group.endswith(" sizes"):
            for device, dtype in variants(results, group):
                yield Chart(
                    f"{slug(group)}-{device}-{dtype}",
                    f"{group.removesuffix(' sizes')} forward, {dtype}: bandwidth against size",
                    "Bytes that the operation has to move over its median time. Dashed and dotted: a plain "
                    "pass over the same tensor, into fresh and into existing memory.",
                    partial(sizes, results, group, device, dtype),
                )
    for group in group_names(results, "ResNet-50"):
        yield Chart(
            slug(group),
            f"{group}, forward and backward",
            "Time of one layer of each shape, with the number of such layers in the network. The line is the "
            "time of copying the bytes that the layer has to move.",
            partial(layers, results, group),
        )
    if memory_rows(results):
        yield Chart(
            "memory",
            "Memory kept for the backward pass",
            "Bytes of the storages that autograd saves during one forward pass, the input where it is saved; "
            "parameters are not counted.",
            partial(memory, results),
        )
    if any(section(row) == "models" and row["seconds"] for row in results["results"]):
        yield Chart(
            "models",
            "Whole models: one training step",
            "Forward, loss, backward and optimiser; before and after modeprobe.swap.",
            partial(models, results),
        )


def slug(text: str) -> str:
    return text.lower().replace(",", "").replace(" ", "-")


def figure(width: float, height: float, **options: Any) -> tuple[Any, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained", **options)


STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "modeprobe",
}
TINY = 4096  # elements; below, the time of a call says nothing about bandwidth


def legend(axes: Any) -> None:
    """Above the axes, where it hides no data."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=6)


def color(provider: str) -> str:
    return COLORS.get(provider, OTHERS)


def variants(results: Results, group: str) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["device"], row["dtype"]) for row in members(results, group)))


def shown(groups: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    """Providers with a time in any group: modeprobe's last, so that they are drawn on top."""
    found = {name for group in groups for name, row in group.items() if row["seconds"] and not row["floor"]}
    order = ["torch", "torch.compile"]
    ours = [name for name in COLORS if name.startswith("modeprobe")]
    rest = sorted(found - set(order) - set(ours))
    return [name for name in (*order, *rest, *ours) if name in found]


def headline(results: Results) -> Any:
    """A bar per headline work: its speed in torch's, to the right of 1 where it is faster."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    rows = named(results)
    drawing, axes = figure(9.0, 1.5 + 0.36 * len(rows))
    far = [1.0]
    compiled = None
    for place, (_, group) in enumerate(rows):
        faster = group["modeprobe"]["ratios"].get("torch")
        if faster is None:
            continue
        low, middle, high = faster
        tone = COLORS["modeprobe"] if middle >= 1 else SLOWER
        axes.barh(place, middle - 1, 0.62, left=1.0, color=tone, zorder=2)
        axes.plot([low, high], [place, place], color=INK, lw=1.2, zorder=3)
        far += [low, high]
        clear = max(high, 1.0)
        peer = group.get("torch.compile")
        theirs = peer["ratios"].get("torch") if peer else None
        if theirs:
            (compiled,) = axes.plot(
                theirs[1],
                place,
                MARKERS["torch.compile"],
                color=COLORS["torch.compile"],
                ms=7,
                mec="w",
                zorder=4,
            )
            far.append(theirs[1])
            clear = max(clear, 1.08 * theirs[1])
        text = f" {times(middle)}"
        axes.annotate(text, (clear, place), ha="left", va="center", color=tone, fontweight="bold")
    axes.axvline(1.0, color=INK, lw=1)
    axes.set_xscale("log")
    axes.set_xlim(min(far) / 1.3, max(far) * 1.9)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if min(far) / 2 <= tick]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.set_yticks(range(len(rows)), [words for words, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("speed in torch's, log scale: right of 1x modeprobe is faster")
    if compiled is not None:
        place_above = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.1}
        axes.legend([compiled], ["torch.compile, in torch's speed"], **place_above)
    above = 6 if compiled is None else 24  # points: the legend stands between
    words = f"modeprobe beside torch: {where(results)}"
    axes.set_title(words, loc="left", fontsize=10, color=INK, pad=above)
    return drawing


def where(results: Results) -> str:
    machine = results["machine"]
    if machine["gpu"]:
        return machine["gpu"]["name"]
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['simd']}"


def summary_rows(results: Results, device: str) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """(words, provider -> row) for each work that a target names and modeprobe has a figure for."""
    groups = {
        work: group
        for (where, work), group in by_work(results["results"]).items()
        if where == device
        and (ours := group.get("modeprobe") or {}).get("of_copy")
        and ours["elements"] > TINY
    }
    found: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {}
    for target in targets():
        for work, group in groups.items():
            if target["device"] == device and fits(work, target):
                found[work] = (in_words(target) if work == target["work"] else work, group)
    return list(found.values())


def summary(results: Results, device: str) -> Any:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = summary_rows(results, device)
    providers = shown([group for _, group in rows])
    drawing, axes = figure(9.5, 1.2 + 0.27 * len(rows))
    seen: set[str] = set()
    for row_place, (_, group) in enumerate(rows):
        for index, provider in enumerate(providers):
            row = group.get(provider)
            if row is None or not row["of_copy"]:
                continue
            place = row_place + 0.2 * (index - (len(providers) - 1) / 2)
            low, middle, high = (1 / value for value in reversed(row["of_copy"]))
            axes.plot([low, high], [place, place], color=color(provider), lw=2, alpha=0.6, zorder=2)
            axes.plot(
                middle,
                place,
                MARKERS.get(provider, "v"),
                color=color(provider),
                ms=7 if provider == "modeprobe" else 5,
                zorder=4 if provider == "modeprobe" else 3,
                label=provider if provider not in seen else None,
            )
            seen.add(provider)
    axes.axvline(1.0, color=INK, lw=1, ls="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(rows)), [words for words, _ in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", color="#f3f4f6")
    axes.set_xlabel("time over that of a copy of the same bytes (log scale; left is faster)", loc="right")
    axes.margins(y=0.02)
    legend(axes)
    return drawing


def sizes(results: Results, group: str, device: str, dtype: str) -> Any:
    from matplotlib.ticker import FixedLocator, FuncFormatter

    rows = [row for row in members(results, group) if row["device"] == device and row["dtype"] == dtype]
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    drawing, grid = figure(5.6 * len(layouts) + 0.8, 4.4, ncols=len(layouts), sharey=True, squeeze=False)
    for axes, layout in zip(grid[0], layouts, strict=True):
        # The flat inputs have no layout: they open both curves.
        mine = [row for row in rows if row["layout"] == layout or len(row["shape"]) < 3]
        groups = sorted(by_work(mine).values(), key=lambda item: next(iter(item.values()))["elements"])
        for floor, style, words in FLOORS:
            draw_line(axes, groups, floor, INK, words, linestyle=style, linewidth=1.2, passes=2)
        for provider in shown(groups):
            marker, line = MARKERS.get(provider, "v"), "-"
            if sum(bool(provider in group and group[provider]["seconds"]) for group in groups) < len(groups):
                line = ""  # measured at a few sizes only
            draw_line(
                axes, groups, provider, color(provider), provider, marker=marker, markersize=5, linestyle=line
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        powers = sorted({next(iter(group.values()))["elements"] for group in groups})
        axes.xaxis.set_major_locator(FixedLocator(powers))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("elements")
        if len(layouts) > 1:
            axes.set_title(layout)
    grid[0][0].set_ylabel("GB/s (log scale)")
    # Speed grows with size up to the caches': the lower right stays empty.
    grid[0][-1].legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")
    return drawing


FLOORS = (
    ("x.clone()", "--", "roof: copy into fresh memory"),
    ("y.copy_(x)", ":", "roof: copy into existing memory"),
)


def draw_line(
    axes: Any,
    groups: Sequence[dict[str, dict[str, Any]]],
    provider: str,
    color: str,
    words: str,
    passes: float | None = None,
    **options: Any,
) -> None:
    """Bandwidth of a provider against size; a floor moves its own passes over the tensor, not the work's."""
    points = []
    for group in groups:
        row = group.get(provider)
        if row and row["seconds"]:
            moved = row["bytes"]
            if passes is not None:
                moved = passes * row["elements"] * item_size(row["dtype"])
            points.append((row["elements"], *(moved / value / 1e9 for value in row["seconds"])))
    if not points:
        return
    x = [point[0] for point in points]
    axes.plot(x, [point[2] for point in points], color=color, label=words, **options)
    if options["linestyle"]:  # a band, like a line, would tell what lies between
        axes.fill_between(x, [p[3] for p in points], [p[1] for p in points], color=color, alpha=0.15, lw=0)


def bars(
    axes: Any,
    names: Sequence[str],
    groups: Sequence[dict[str, dict[str, Any]]],
    value: Callable[[dict[str, Any]], float | None],
    written: str = "",
) -> None:
    """A bar per provider and group that has a value; ``written`` is the format of a figure above each."""
    providers = shown(groups)
    width = 0.8 / max(len(providers), 1)
    for index, provider in enumerate(providers):
        heights = {
            place: height
            for place, group in enumerate(groups)
            if provider in group and (height := value(group[provider])) is not None
        }
        drawn = axes.bar(
            [place + (index - (len(providers) - 1) / 2) * width for place in heights],
            list(heights.values()),
            width * 0.92,
            color=color(provider),
            label=provider,
        )
        if written:
            axes.bar_label(drawn, fmt=written, fontsize=7, color=INK)
    axes.set_xticks(range(len(names)), names)
    axes.grid(axis="x", visible=False)
    legend(axes)


def layers(results: Results, group: str) -> Any:
    from matplotlib.ticker import FuncFormatter

    groups = list(by_work(members(results, group)).values())
    names = []
    for item in groups:
        row = next(iter(item.values()))
        _, channels, height, _ = row["shape"]
        names.append(f"{channels}x{height}²\n×{row['count']}")
    drawing, axes = figure(9.5, 4.2)
    bars(axes, names, groups, lambda row: row["seconds"][1] * 1e3 if row["seconds"] else None)
    for place, item in enumerate(groups):
        clone = item.get("x.clone()")
        if clone and clone["seconds"]:
            row = next(iter(item.values()))
            tensor = row["elements"] * item_size(row["dtype"])
            floor = clone["seconds"][1] * 1e3 * row["bytes"] / (2 * tensor)
            label = None if place else "roof: copy of the same bytes"
            axes.plot([place - 0.45, place + 0.45], [floor, floor], color=INK, lw=1.5, ls="--", label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("ms for one layer (log scale)")
    axes.set_xlabel("channels x height², and how many such layers ResNet-50 has")
    legend(axes)
    return drawing


def memory_rows(results: Results) -> list[dict[str, dict[str, Any]]]:
    found = []
    seen: set[tuple[str, str]] = set()
    for group in by_work(results["results"]).values():
        row = next(iter(group.values()))
        ours = group.get("modeprobe") or {}
        kind = row["family"], row["dtype"]
        if row["family"].startswith("model ") or row["elements"] <= TINY:
            continue
        if ours.get("saved_bytes") is not None and kind not in seen:
            seen.add(kind)
            found.append(group)
    return found


def memory(results: Results) -> Any:
    groups = memory_rows(results)
    drawing, axes = figure(max(7.0, 1.2 * len(groups) + 1.5), 4.2)
    providers = shown(groups)
    width = 0.8 / max(len(providers), 1)
    labels, named = [], set()
    for place, group in enumerate(groups):
        any_row = next(iter(group.values()))
        labels.append(f"{any_row['family'].replace('_', ' ')}\n{any_row['dtype']}")
        for index, provider in enumerate(providers):
            row = group.get(provider)
            if row is None or row["saved_bytes"] is None:
                continue
            at = place + (index - (len(providers) - 1) / 2) * width
            share = row["saved_bytes"] / (row["elements"] * item_size(row["dtype"]))
            label = None if provider in named else provider
            named.add(provider)
            axes.bar(at, share, width * 0.92, color=color(provider), label=label)
            text = size(row["saved_bytes"]) if share < 0.01 else f"{share:.2f}"
            axes.annotate(text, (at, share), ha="center", va="bottom", fontsize=7, color=INK)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("bytes saved, in sizes of the input")
    legend(axes)
    return drawing


def models(results: Results) -> Any:
    groups = list(by_work(row for row in results["results"] if section(row) == "models").values())
    names = []
    for group in groups:
        row = next(iter(group.values()))
        layout = "\nchannels_last" if row["layout"] == "channels_last" else ""
        names.append(f"{row['family'].removeprefix('model ')}, {row['dtype']}{layout}")
    drawing, axes = figure(max(7.0, 1.9 * len(groups) + 1), 4.2)

    def relative(row: dict[str, Any]) -> float | None:
        if not row["seconds"]:
            return None
        return 1.0 if row["provider"] == "torch" else 1 / row["ratios"]["torch"][1] if row["ratios"] else None

    bars(axes, names, groups, relative, "{:.2f}")
    axes.axhline(1.0, color=INK, lw=1, ls="--")
    axes.set_ylabel("time of a step, torch = 1 (lower is faster)")
    return drawing


def svg(drawing: Any) -> str:
    """The figure as SVG without a date, so that equal data gives equal text."""
    text = io.StringIO()
    drawing.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    content = text.getvalue()
    return content[content.index("<svg") :]


def write(results: Results, folder: Path) -> dict[str, tuple[Chart, str]]:
    """Writes each chart as SVG and PNG into ``folder``; returns name -> (chart, SVG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for chart in every_chart(results):
        with matplotlib.rc_context(STYLE):
            drawing = chart.draw()
            drawing.savefig(folder / f"{chart.name}.png", dpi=130, metadata={"Software": None})
            content = svg(drawing)
            pyplot.close(drawing)
        (folder / f"{chart.name}.svg").write_text(content)
        written[chart.name] = (chart, content)
    return written

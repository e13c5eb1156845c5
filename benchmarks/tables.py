"""Results as tables, once for the terminal, for Markdown and for the HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .check import NO_GPU, named
from .compare import Change
from .provenance import heading, is_older, provenance
from .results import Results

LAYER_PROVIDERS = ("torch", "torch.compile", "modeprobe")
PROVIDERS = ("torch", "torch.compile", "modeprobe", "modeprobe fused", "modeprobe triton")
TITLES = {
    "dropout": "Dropout",
    "batch_norm": "BatchNorm",
    "layers": "ResNet-50's BatchNorm layers",
    "models": "Whole models, one training step",
}


@dataclass
class Table:
    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        lines = [
            "| " + " | ".join(self.columns) + " |",
            "|" + "|".join("---" if index == 0 else "---:" for index in range(len(self.columns))) + "|",
        ]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        lines += ["", *(f"* {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def print(self, console: Any) -> None:
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title, title_justify="left", title_style="bold")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*(Text(cell, style=style(cell)) for cell in row))
        console.print(table)
        for note in self.notes:
            console.print(Text(note))


def style(cell: str) -> str:
    word = cell.partition(":")[0]
    if word in ("met", "faster"):
        return "green"
    return "red" if word in ("missed", "wrong", "failed", "slower") else ""


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale or unit == "us":
            return f"{value / scale:.3g} {unit}"
    raise AssertionError


def size(value: float | None) -> str:
    if value is None:
        return ""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def times(value: float) -> str:
    return f"{value:.3g}x" if value < 100 else f"{value:.0f}x"


def by_work(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """Rows as (device, work) -> provider -> row."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["device"], row["work"]), {})[row["provider"]] = row
    return found


def section(row: dict[str, Any]) -> str:
    if row["family"].startswith("model "):
        return "models"
    if row["groups"] and all(group.startswith("ResNet-50") for group in row["groups"]):
        return "layers"
    return "batch_norm" if row["family"].startswith("batch_norm") else "dropout"


def work_table(results: Results, wanted: str) -> Table:
    """Providers side by side: medians, modeprobe's ratios, the share of a copy's bandwidth, bytes saved."""
    groups = [
        group
        for group in by_work(results["results"]).values()
        if section(next(iter(group.values()))) == wanted
    ]
    others = {
        name
        for group in groups
        for name, row in group.items()
        if not row["floor"] and (name not in PROVIDERS or row["seconds"] or row["status"] == "wrong")
    }
    shown = [name for name in PROVIDERS if name in others or name in ("torch", "modeprobe")]
    shown += sorted(others - set(PROVIDERS))
    models = wanted == "models"
    columns = ["work", *shown, "vs torch", "vs torch.compile"]
    columns += [] if models else ["cost in x * 2", "of a copy's bandwidth"]
    columns += ["saved: torch", "saved: modeprobe"]
    table = Table(TITLES[wanted], columns)
    for group in groups:
        best = group.get("modeprobe") or {}
        ratios = best.get("ratios") or {}
        cells = [next(iter(group.values()))["work"], *(cell(group.get(name)) for name in shown)]
        cells += [times(ratios[peer][1]) if peer in ratios else "" for peer in ("torch", "torch.compile")]
        if not models:
            cells.append(f"{1 / ratios['x * 2'][1]:.2f}" if "x * 2" in ratios else "")
            cells.append(f"{best['of_copy'][1]:.0%}" if best.get("of_copy") else "")
        cells += [size((group.get(name) or {}).get("saved_bytes")) for name in ("torch", "modeprobe")]
        table.rows.append(cells)
        table.notes += [
            f"{row['work']}, {name}: {row['status']}: {row['reason']}"
            for name, row in group.items()
            if row["status"] in ("wrong", "failed")
        ]
    table.notes += reasons(groups)
    return sourced(table, results, (row for group in groups for row in group.values()))


def sourced(table: Table, results: Results, rows: Iterable[dict[str, Any]]) -> Table:
    """The table with a note of the runs that its rows come from."""
    note = provenance(results, rows)
    table.notes += [note] if note and table.rows else []
    return table


def reasons(groups: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    """Why a provider has no time, once per provider and reason."""
    found: dict[tuple[str, str], int] = {}
    for group in groups:
        for name, row in group.items():
            if row["status"] == "unavailable":
                found[name, row["reason"]] = found.get((name, row["reason"]), 0) + 1
    return [f"{name}, {count} of {len(groups)} works: {reason}" for (name, reason), count in found.items()]


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["status"] == "ok":
        return seconds(row["seconds"][1]) if row["seconds"] else ""
    return "-" if row["status"] == "unavailable" else row["status"]


def layer_totals(results: Results) -> Table:
    """All 53 BatchNorm layers of ResNet-50 together, each distinct layer times its count."""
    table = Table(
        "All 53 BatchNorm layers of ResNet-50, forward and backward",
        ["layers", "torch", "torch.compile", "modeprobe", "vs torch", "slowest layer vs torch"],
    )
    for name in group_names(results, "ResNet-50"):
        totals: dict[str, float] = {}
        incomplete: set[str] = set()
        worst: list[float] = []
        for group in by_work(members(results, name)).values():
            for provider in LAYER_PROVIDERS:
                row = group.get(provider)
                if row is None or not row["seconds"]:
                    incomplete.add(provider)
                else:
                    totals[provider] = totals.get(provider, 0.0) + row["count"] * row["seconds"][1]
            ratios = (group.get("modeprobe") or {}).get("ratios") or {}
            worst += [ratios["torch"][1]] if "torch" in ratios else []
        totals = {provider: total for provider, total in totals.items() if provider not in incomplete}
        mine, theirs = totals.get("modeprobe"), totals.get("torch")
        table.rows.append(
            [
                name,
                *(seconds(totals[name]) if name in totals else "-" for name in LAYER_PROVIDERS),
                times(theirs / mine) if mine and theirs else "",
                times(min(worst)) if worst else "",
            ]
        )
    rows = (row for name in group_names(results, "ResNet-50") for row in members(results, name))
    return sourced(table, results, rows)


def group_names(results: Results, start: str) -> list[str]:
    return list(
        dict.fromkeys(
            group for row in results["results"] for group in row["groups"] if group.startswith(start)
        )
    )


def members(results: Results, group: str) -> list[dict[str, Any]]:
    return [row for row in results["results"] if group in row["groups"]]


def target_table(verdicts: Iterable[dict[str, Any]], title: str = "Targets") -> Table:
    """Every target with its measured figure and verdict; the reasons of misses below."""
    table = Table(title, ["work", "target", "measured", "20th to 80th", "verdict"])
    verdicts = list(verdicts)
    for item in verdicts:
        figures = item["measured"]
        exact = "instructions" in item["bound"]
        middle = f"{figures[1]:.3g}" if figures else "-"
        spread = f"{figures[0]:.3g} to {figures[2]:.3g}" if figures and not exact else ""
        table.rows.append([in_words(item), item["bound"], middle, spread, item["verdict"]])
    table.notes = whys(verdicts)
    return table


def in_words(item: dict[str, Any]) -> str:
    """A target's text, with its family in front where the text does not say it."""
    text, family = item["text"], "BatchNorm" if item["family"] == "batch_norm" else "Dropout"
    named = "dropout" in text.lower() or "batchnorm" in text.lower()
    return text if named else f"{family}: {text}"


def whys(verdicts: Iterable[dict[str, Any]]) -> list[str]:
    """Each reason of a miss or of an absent figure, after the targets that it explains."""
    found: dict[str, list[str]] = {}
    for item in verdicts:
        if item["why"]:
            missed = f" ({item['bound']})" if item["verdict"] == "missed" else ""
            found.setdefault(item["why"], []).append(in_words(item) + missed)
    return [f"{'; '.join(dict.fromkeys(rows))}: {reason}" for reason, rows in found.items()]


def own_targets(results: Results) -> list[dict[str, Any]]:
    """The targets that this kind of machine can tell."""
    gpu = bool(results["machine"]["gpu"])
    return [item for item in results["targets"] if (item["device"] == "cuda") == gpu]


def target_tables(results: Results) -> list[Table]:
    """The targets of this kind of machine; below a CPU's those that need a GPU."""
    here = own_targets(results)
    pending = [item for item in results["targets"] if item["verdict"] == NO_GPU and item not in here]
    tables = [
        sourced(target_table(here), results, judged(results)),
        target_table(pending, "Targets for a GPU"),
    ]
    return [table for table in tables if table.rows]


def judged(results: Results) -> list[dict[str, Any]]:
    """The rows that decided on targets."""
    wanted = {item.get("row") for item in results["targets"]}
    return [row for row in results["results"] if row["work"] in wanted and row["provider"] == "modeprobe"]


def targets_by_machine(every: Sequence[Results]) -> Table:
    """Targets of one kind of machine, a column for each; below them reasons, the first machine's first.

    Reasons speak of today's kernels: other machines that have measured older ones get none.
    """
    if len(every) == 1:
        return target_tables(every[0])[0]
    table = Table("Targets", ["work", "target", *(heading(one) for one in every)])
    found: dict[tuple[str, str, str], dict[int, str]] = {}
    for index, one in enumerate(every):
        for item in own_targets(one):
            cells = found.setdefault((in_words(item), item["device"], item["bound"]), {})
            figure = f"{item['measured'][1]:.3g} " if item["measured"] else ""
            word = "**missed**" if item["verdict"] == "missed" else item["verdict"]
            cells[index] = figure + word
    table.rows = [
        [words, bound, *(cells.get(index, "") for index in range(len(every)))]
        for (words, _, bound), cells in found.items()
    ]
    older = [one for one in every[1:] if is_older(one)]
    explained = [one for one in every if one not in older]
    table.notes = list(dict.fromkeys(note for one in explained for note in whys(own_targets(one))))
    table.notes += [
        f"{one['machine']['name']}: measured with older kernels, whose misses are not explained here."
        for one in older
    ]
    return table


def headline_table(results: Results) -> Table:
    """The few works that say what a swap gains, where modeprobe is slower among them."""
    table = Table("In short", ["", "torch", "torch.compile", "modeprobe", "torch / modeprobe"])
    rows = []
    for words, group in named(results):
        ours = group["modeprobe"]
        rows.append(ours)
        faster = ours["ratios"].get("torch")
        table.rows.append(
            [
                words,
                *(cell(group.get(name)) for name in ("torch", "torch.compile", "modeprobe")),
                times(faster[1]) if faster else "",
            ]
        )
    return sourced(table, results, rows)


def losses(results: Results) -> Table:
    """Every row in which modeprobe is slower than a peer, beyond the spread of the measurement."""
    table = Table("Where modeprobe is slower", ["work", "than", "modeprobe's time in the peer's"])
    for row in results["results"]:
        if row["provider"] != "modeprobe" or row["status"] != "ok":
            continue
        for peer, faster in row["ratios"].items():
            floor = peer in ("x * 2", "x.clone()", "y.copy_(x)")
            if not floor and not peer.startswith("modeprobe") and faster[2] < 1.0:
                table.rows.append([row["work"], peer, times(1 / faster[1])])
    return sourced(table, results, (row for row in results["results"] if row["provider"] == "modeprobe"))


def floor_table(results: Results) -> Table:
    """Bandwidth of the plain passes over flat float32 tensors, a read and a write each."""
    names = ("x * 2", "x.clone()", "y.copy_(x)")
    table = Table("Plain passes", ["float32 elements", *names])
    rows = [row for row in members(results, "dropout sizes") if row["dtype"] == "float32" and row["floor"]]
    for group in sorted(by_work(rows).values(), key=lambda item: next(iter(item.values()))["elements"]):
        elements = next(iter(group.values()))["elements"]
        cells = [
            f"{8 * elements / group[name]['seconds'][1] / 1e9:.3g} GB/s"
            if name in group and group[name]["seconds"]
            else ""
            for name in names
        ]
        table.rows.append([f"2^{elements.bit_length() - 1}", *cells])
    return sourced(table, results, rows)


def compare_table(changes: Iterable[Change], a: str, b: str) -> Table:
    table = Table(f"{a} (A) and {b} (B)", ["work", "provider", "A", "B", "A / B", "beyond noise"])
    for change in changes:
        table.rows.append(
            [
                change.work if change.device == "cpu" else f"{change.work} ({change.device})",
                change.provider,
                seconds(change.a[1]) if change.a else "-",
                seconds(change.b[1]) if change.b else "-",
                times(change.speedup) if change.speedup else "",
                change.mark,
            ]
        )
    return table


def instruction_table(results: Results) -> Table:
    table = Table(
        "Instructions on the CPU, counted by callgrind",
        ["work", "provider", "per call", "per element", "SIMD"],
    )
    for row in results["instructions"]:
        table.rows.append(
            [
                row["work"],
                row["provider"],
                f"{row['instructions']:,}",
                f"{row['per_element']:.2f}",
                row["simd"],
            ]
        )
    return sourced(table, results, results["instructions"])


def every_table(results: Results) -> list[Table]:
    tables = [headline_table(results), *target_tables(results)]
    present = {section(row) for row in results["results"]}
    tables += [work_table(results, name) for name in TITLES if name in present]
    if group_names(results, "ResNet-50"):
        tables.append(layer_totals(results))
    tables.append(losses(results))
    tables.append(instruction_table(results))
    return [table for table in tables if table.rows]

"""A report for terminals and files: plain text, rich, Markdown."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from collections.abc import Iterable
from typing import Any

from modeprobe.probe.report import Report, Site
from modeprobe.probe.table import Table

COLOURS = {
    "module_dropout": "dark_orange",
    "functional_dropout": "yellow",
    "attention_dropout": "magenta",
    "stochastic_depth": "cyan",
    "random_noise": "red",
    "batch_statistics": "blue",
    "branch": "green",
    "opaque": "white",
}
_LIMIT = 40  # rows
_WIDTH = 118


def place(file: str, line: int) -> str:
    """`file:line` as short as it can be said: relative to the working directory or to the import path."""
    if not file:
        return ""
    roots = sorted({os.getcwd(), *filter(None, sys.path)}, key=len, reverse=True)
    for root in roots:
        prefix = root.rstrip(os.sep) + os.sep
        if file.startswith(prefix):
            return f"{file[len(prefix) :]}:{line}"
    return f"{file}:{line}"


def percent(value: float | None) -> str:
    if value is None:
        return ""
    if value >= 1e3:
        return "large"
    return f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.2g}%"


def facts(report: Report) -> list[str]:
    """Short statements beside the sites, most telling first."""
    lines = []
    if report.main_output_same:
        names = _some(d.path or "(output)" for d in report.output_differences)
        lines.append(f"the main output is the same in both modes; what differs: {names}")
    structural = [d for d in report.output_differences if d.kind not in ("value", "roundoff")]
    if structural:
        lines.append(
            f"output structure: {_some(f'{d.path} {d.kind} {d.detail}'.strip() for d in structural)}"
        )
    if report.train_is_random and not report.train_is_reproducible:
        lines.append("train mode cannot be reproduced under a fixed seed")
    if report.eval_is_random and not report.eval_is_reproducible:
        lines.append("eval mode cannot be reproduced under a fixed seed")
    foreign = [stream for stream in report.random_streams if stream != "torch"]
    if foreign:
        lines.append(f"random streams in use beside torch's: {', '.join(foreign)}")
    if report.generation_same is True:
        lines.append("generate(): greedy text is the same in both modes")
    elif report.generation_same is False:
        where = f" ({_some(place(*_split(c)) for c in report.checkpointing)})" if report.checkpointing else ""
        lines.append(f"generate(): greedy text differs between the modes{where}")
    elif report.generation_detail:
        lines.append(report.generation_detail)
    if report.mixed:
        lines.append(f"mixed modes as given, train() or eval() would undo them: {_some(report.mixed)}")
    for when in dict.fromkeys(m.when for m in report.mutations):
        changed = [m.name for m in report.mutations if m.when == when]
        kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in changed))
        many = f"{len(changed)} tensors ({_some(kinds)})"
        lines.append(f"{when} changes {many if len(changed) > 3 else _some(changed)}")
    for why in dict.fromkeys(i.why for i in report.idle):
        same = [i for i in report.idle if i.why == why]
        lines.append(f"idle dropout, {why}: {len(same)} ({_some(i.path for i in same)})")
    for source in dict.fromkeys(b.source for b in report.batch_norms):
        norms = [b for b in report.batch_norms if b.source == source]
        lines.append(f"batch norm in eval mode uses {source}: {len(norms)} ({_some(b.path for b in norms)})")
    if report.drift is not None:
        lines += [report.drift.verdict, *report.drift.signs]
    for error in dict.fromkeys(f.error for f in report.failures):
        raised = (f for f in report.failures if f.error == error)
        places = (f"{f.mode} mode{', some seeds' if f.sometimes else ''}, {f.phase}" for f in raised)
        lines.append(f"{'; '.join(places)}: {error}")
    return lines + report.notes


def chance(report: Report) -> dict[str, str]:
    """What each mode is: "random", "deterministic", or "raises"."""
    raised = {failure.mode for failure in report.failures}
    is_random = {"train": report.train_is_random, "eval": report.eval_is_random}
    return {
        mode: "raises" if mode in raised else "random" if random else "deterministic"
        for mode, random in is_random.items()
    }


def _split(text: str) -> tuple[str, int]:
    file, _, line = text.rpartition(":")
    return file, int(line)


def _some(items: Iterable[str], limit: int = 3) -> str:
    listed = [item or "(root)" for item in items]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def rows(report: Report) -> list[tuple[str, tuple[str, ...]]]:
    """(role, cells) of the table of sites; the same site in repeated layers is one row."""
    groups: dict[tuple, list[Site]] = {}
    for site in report.sites + report.ungated:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", site.path)
        groups.setdefault((pattern, site.what, site.p, site.cause, site.file, site.line), []).append(site)
    return [(group[0].cause or "ungated", _cells(group)) for group in groups.values()]


def _cells(group: list[Site]) -> tuple[str, ...]:
    site = group[0]
    names = zip(*(s.path.split(".") for s in group), strict=True)
    path = ".".join(same[0] if len(set(same)) == 1 else "*" for same in names) or "(root)"
    if len(group) > 1:
        path += f" ({len(group)} times)"
    p = "" if site.p is None else f"{site.p:g}"
    cause = site.cause or "on in eval mode too"
    where = f"{os.path.basename(site.file)}:{site.line}" if site.file else ""
    effect = max((s.reach for s in group if s.reach is not None), default=None)
    return (path, site.what, p, cause, where, percent(effect))


HEADINGS = ("module", "what", "p", "cause", "where", "effect")


def to_rich(report: Report) -> Any:
    from rich.console import Group
    from rich.text import Text

    tone = {0: "bold green", 1: "bold yellow", 2: "bold red", 3: "bold red"}[report.exit_code]
    return Group(Text(report.verdict, style=tone), *_details(report))


def _details(report: Report) -> list[Any]:
    from rich.table import Table as Grid
    from rich.text import Text

    blocks: list[Any] = []
    found = rows(report)
    if found:
        shown = found[:_LIMIT]
        table = Table(
            HEADINGS,
            [cells for _, cells in shown],
            right=frozenset({2, 5}),
            drop=(4, 1, 5),
            styled=3,
            styles=[COLOURS.get(role, "red") for role, _ in shown],
        )
        blocks += [Text(""), table]
        if len(found) > _LIMIT:
            blocks.append(Text(f"... and {len(found) - _LIMIT} more (to_json() has all)", style="dim"))
    lines = facts(report)
    if lines:
        listed = Grid.grid(padding=(0, 1, 0, 0))
        for line in lines:
            listed.add_row(Text("-", style="dim"), Text(line, style="dim"))
        blocks += [Text(""), listed]
    modes = ", ".join(f"{mode} {word}" for mode, word in chance(report).items())
    blocks.append(Text(f"\n{report.model}: {modes}; {report.forwards} forward passes", style="dim"))
    return blocks


def to_text(report: Report, width: int | None = None) -> str:
    """width: of the table and the lines below it; by default the terminal's, 118 at most."""
    from rich.console import Console

    width = width or min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, color_system=None, force_terminal=False)
    console.print(*_details(report), sep="\n")
    return "\n".join([report.verdict, *(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())])


def to_markdown(report: Report) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")

    def code(text: str) -> str:
        return f"`{text}`" if text else ""

    def row(path: str, what: str, p: str, cause: str, where: str, effect: str) -> str:
        return " | ".join((code(path), cell(what), p, cell(cause), code(where), effect))

    lines = [f"**{cell(report.verdict)}**", ""]
    found = rows(report)
    if found:
        lines += [f"| {' | '.join(HEADINGS)} |", "|---|---|--:|---|---|--:|"]
        lines += [f"| {row(*cells)} |" for _, cells in found]
        lines.append("")
    lines += [f"- {cell(line)}" for line in facts(report)]
    return "\n".join(lines).rstrip() + "\n"

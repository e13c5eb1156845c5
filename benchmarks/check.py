"""Targets against measured figures: which are met."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .registry import Work
from .results import Results

COPY = "copy bandwidth"
INSTRUCTIONS = "instructions per element"
NO_GPU = "needs a GPU"
NO_REASON = "no reason given; add a why to benchmarks/targets.json"


@dataclass(frozen=True)
class Verdict:
    """One bound of one target.

    Args:
        bound: in words, such as ``"at least 30x torch"``.
        measured: 20th, 50th and 80th percentile in the bound's unit; the median decides.
        verdict: "met", "missed", "not measured", "needs a GPU", or a row's own status when it has no time.
        row: the work that decided.
        why: the reason of a miss, or of a figure that is absent.
        run: the run in which the row that decided was measured.
    """

    family: str
    device: str
    text: str
    bound: str
    measured: list[float] | None
    verdict: str
    row: str = ""
    why: str = ""
    run: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@functools.cache
def targets() -> list[dict[str, Any]]:
    """The rows of ``targets.json``."""
    return json.loads(Path(__file__).with_name("targets.json").read_text())["rows"]


def priority(work: Work, device: str) -> int:
    """0 when a target for ``device`` names the work, 1 when a target speaks of its group, otherwise 2."""
    best = 2
    for target in targets():
        if target["device"] != device:
            continue
        if any(fits(way.name, target) for way in work.ways):
            return 0
        if any(speaks_of(target, way.name, way.groups) for way in work.ways):
            best = 1
    return best


def compared(work: Work, device: str) -> frozenset[str]:
    """What the targets for ``device`` that speak of a work compare it with."""
    return frozenset(
        bound["against"]
        for target in targets()
        if target["device"] == device and any(speaks_of(target, way.name, way.groups) for way in work.ways)
        for bound in target["bounds"]
    )


def speaks_of(target: dict[str, Any], name: str, groups: Iterable[str]) -> bool:
    if "group" in target:
        return any(fnmatchcase(group, target["group"]) for group in groups)
    return fits(name, target)


def named(results: Results) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """(headline, provider -> row) for each target with a headline that modeprobe has a time for.

    A target that names a pattern stands for the first work that fits.
    """
    device = "cuda" if results["machine"]["gpu"] else "cpu"
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["results"]:
        if row["device"] == device:
            groups.setdefault(row["work"], {})[row["provider"]] = row
    found = []
    for target in targets():
        if "headline" not in target or target["device"] != device:
            continue
        fitting = (group for name, group in groups.items() if fits(name, target))
        for group in fitting:
            if "modeprobe" in group and group["modeprobe"]["seconds"]:
                found.append((target["headline"], group))
                break
    return found


def fits(name: str, target: dict[str, Any]) -> bool:
    return "work" in target and (name == target["work"] or fnmatchcase(name, target["work"]))


def check(
    results: Results,
    rows: list[dict[str, Any]] | None = None,
    instructions: Mapping[str, float] | None = None,
) -> list[Verdict]:
    """A verdict for each bound of each target.

    Args:
        results: a machine's results.
        rows: targets; by default those of ``targets.json``.
        instructions: instructions per element by kernel, for the targets that speak of them.
    """
    return [
        judge(target, bound, results, instructions or {})
        for target in (targets() if rows is None else rows)
        for bound in target["bounds"]
    ]


def judge(
    target: dict[str, Any], bound: dict[str, Any], results: Results, instructions: Mapping[str, float]
) -> Verdict:
    def verdict(
        measured: list[float] | None, word: str, why: str = "", row: dict[str, Any] | None = None
    ) -> Verdict:
        if word == "missed":
            why = bound.get("why") or target.get("why") or NO_REASON
        return Verdict(
            family=target["family"],
            device=target["device"],
            text=target["text"],
            bound=words(bound),
            measured=measured,
            verdict=word,
            row=row["work"] if row else "",
            why=why,
            run=row.get("run", "") if row else "",
        )

    if bound["against"] == INSTRUCTIONS:
        count = instructions.get(target["work"])
        if count is None:
            return verdict(None, "not measured", "needs the library built with CUDA kernels")
        return verdict([count] * 3, "met" if count <= bound["at_most"] else "missed")
    rows = matching(target, results)
    if not rows:
        elsewhere = target["device"] == "cuda" and not results["machine"]["gpu"]
        return verdict(None, NO_GPU if elsewhere else "not measured")
    bad = next((row for row in rows if row["status"] != "ok"), None)
    if bad is not None:
        return verdict(None, bad["status"], bad["reason"], bad)
    figures = [(figure, row) for row in rows if (figure := measured(row, bound)) is not None]
    if not figures:
        return verdict(None, "not measured", f"{bound['against']} has no time")
    if "at_least" in bound:
        worst, row = min(figures, key=lambda pair: pair[0][1])
        met = worst[1] >= bound["at_least"]
    else:
        worst, row = max(figures, key=lambda pair: pair[0][1])
        met = worst[1] <= bound["at_most"]
    return verdict(worst, "met" if met else "missed", row=row)


@functools.cache
def sass_instructions() -> dict[str, float]:
    """Instructions per element by kernel and architecture, from the built library.

    Empty where it has no CUDA kernels, or where the tool that reads them fails or takes too long.
    """
    try:
        kernels = importlib.import_module(".kernels", __package__)
        path = None if kernels.resources.why_no_tool() else kernels.library()
        found = kernels.cuda_kernels(path) if path else []
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError):
        return {}
    return {f"{one.kernel} {one.arch}": one.per_element for one in found if one.per_element is not None}


def matching(target: dict[str, Any], results: Results) -> list[dict[str, Any]]:
    return [
        row
        for row in results["results"]
        if row["device"] == target["device"]
        and row["provider"] == "modeprobe"
        and speaks_of(target, row["work"], row["groups"])
    ]


def measured(row: dict[str, Any], bound: dict[str, Any]) -> list[float] | None:
    """The row's figure in the bound's unit: a speed-up, a cost, or a share."""
    if bound["against"] == COPY:
        return row["of_copy"]
    faster = row["ratios"].get(bound["against"])
    if faster is None or "at_least" in bound:
        return faster
    return [1 / value for value in reversed(faster)]


def words(bound: dict[str, Any]) -> str:
    at_least = "at_least" in bound
    value = bound["at_least"] if at_least else bound["at_most"]
    limit = "at least" if at_least else "at most"
    if bound["against"] == COPY:
        return f"{limit} {value:.0%} of {COPY}"
    if bound["against"] == INSTRUCTIONS:
        return f"{limit} {value:g} {INSTRUCTIONS}"
    return f"{limit} {value:g}x {bound['against']}" + ("" if at_least else "'s time")

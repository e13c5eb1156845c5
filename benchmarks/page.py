"""The HTML page of a machine, and the tables and the picture that the documentation takes from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import tables
from .check import targets
from .results import Results
from .tables import Table

MARKED = {"met", "missed", "wrong", "failed", "faster", "slower"}
DOCUMENTS = ("README.md", "docs/performance.md")
BLOCK = re.compile(r"(<!-- bench: (?P<kind>cpu|gpu) (?P<name>[a-z_]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def html(results: Results, charts: Mapping[str, Any], no_charts: str = "") -> str:
    """One self-contained page: no file beside it is needed."""
    from jinja2 import Environment

    template = Path(__file__).with_name("templates") / "performance.html"
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        template.read_text()
    )
    return page.render(
        machine=results["machine"],
        described=describe(results),
        charts=charts,
        no_charts=no_charts,
        tables=tables.every_table(results),
        runs=results["runs"],
        marked=MARKED,
    )


def describe(results: Results) -> str:
    """The machine and the software in one sentence."""
    machine = results["machine"]
    gpu = machine["gpu"]
    where = (
        f"{gpu['name']} ({gpu['memory_gib']} GiB, {gpu['multiprocessors']} multiprocessors), {machine['cpu']}"
        if gpu
        else f"{machine['cpu']}, {machine['threads']} threads, {machine['simd']}"
    )
    run = list(results["runs"].values())[-1] if results["runs"] else None
    if run is None:
        return where
    versions = run["versions"]
    return (
        f"{where}; torch {versions['torch']}, modeprobe {versions['modeprobe']}"
        f"{' at ' + run['commit'] if run['commit'] else ''}; {run['date'][:10]}"
    )


def headline(results: Results) -> Table:
    """The targets' works in words: times side by side and what modeprobe gains."""
    table = Table(
        "Ratios",
        ["", "torch", "torch.compile", "modeprobe", "vs torch", "vs torch.compile", "of a copy's bandwidth"],
    )
    device = "cuda" if results["machine"]["gpu"] else "cpu"
    groups = tables.by_work(results["results"])
    seen = set()
    for target in targets():
        work = target.get("work", "")
        group = groups.get((device, work))
        if target["device"] != device or group is None or work in seen:
            continue
        seen.add(work)
        ours = group.get("modeprobe") or {}
        ratios = ours.get("ratios") or {}
        family = "BatchNorm" if target["family"] == "batch_norm" else "Dropout"
        table.rows.append(
            [
                f"{family}: {target['text']}",
                *(tables.cell(group.get(name)) for name in ("torch", "torch.compile", "modeprobe")),
                *(
                    tables.times(ratios[peer][1]) if peer in ratios else ""
                    for peer in ("torch", "torch.compile")
                ),
                f"{ours['of_copy'][1]:.0%}" if ours.get("of_copy") else "",
            ]
        )
    return table


def blocks(results: Results) -> dict[str, str]:
    """Markdown by block name, for the marked places of the documents."""
    made = {
        "machine": describe(results) + ".\n",
        "floors": tables.floor_table(results).markdown(),
        "headline": headline(results).markdown(),
        "targets": tables.target_table(results["targets"]).markdown(),
        "losses": tables.losses(results).markdown(),
        "layers": tables.layer_totals(results).markdown(),
        "instructions": tables.instruction_table(results["instructions"]).markdown(),
    }
    for name in ("dropout", "batch_norm", "models"):
        made[name] = tables.work_table(results, name).markdown()
    return made


def refresh(text: str, results: Results) -> str:
    """A document with the marked tables of this machine's kind replaced::

        <!-- bench: cpu headline -->
        <!-- /bench -->

    Raises:
        ValueError: a block's name is unknown.
    """
    kind = "gpu" if results["machine"]["gpu"] else "cpu"
    made = blocks(results)

    def replaced(match: re.Match[str]) -> str:
        if match["kind"] != kind:
            return match[0]
        if match["name"] not in made:
            raise ValueError(f"no such block: {match['name']}; there are {', '.join(made)}")
        return f"{match[1]}\n{made[match['name']]}\n{match[4]}"

    return BLOCK.sub(replaced, text)


def publish(results: Results, charts: Path, root: Path) -> list[Path]:
    """Refreshes the documents below ``root`` and copies the summary picture to ``docs/images``."""
    kind = "gpu" if results["machine"]["gpu"] else "cpu"
    changed = []
    for name in DOCUMENTS:
        path = root / name
        if path.is_file():
            text = path.read_text()
            fresh = refresh(text, results)
            if fresh != text:
                path.write_text(fresh)
                changed.append(path)
    pictures = sorted(charts.glob(f"summary-{'cuda' if kind == 'gpu' else 'cpu'}.png"))
    for picture in pictures:
        target = root / "docs" / "images" / f"benchmarks-{kind}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(picture.read_bytes())
        changed.append(target)
    return changed

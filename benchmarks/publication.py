"""Tables and pictures of the documentation, taken from results files by command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from . import tables
from .provenance import machine_and_software
from .results import Results

DOCUMENTS = ("README.md", "docs/performance.md")
# chart -> picture in docs/images, for each kind of machine
PICTURES = {"headline": "headline", "summary": "benchmarks"}
BLOCK = re.compile(r"(<!-- bench: (?P<kind>cpu|gpu) (?P<name>[a-z_]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def blocks(results: Results, others: Sequence[Results] = ()) -> dict[str, str]:
    """Markdown by block name, for the marked places of the documents.

    Args:
        results: of the machine whose figures fill the tables.
        others: of further machines of its kind, which get a column in the targets' table.
    """
    every = (results, *others)
    made = {
        "machine": machine_and_software(results) + ".\n",
        "machines": "".join(f"* {machine_line(one)}\n" for one in every),
        "floors": tables.floor_table(results).markdown(),
        "headline": tables.headline_table(results).markdown(),
        "targets": tables.targets_by_machine(every).markdown(),
        "losses": tables.losses(results).markdown(),
        "layers": tables.layer_totals(results).markdown(),
        "instructions": tables.instruction_table(results).markdown(),
    }
    for name in ("dropout", "batch_norm", "models"):
        made[name] = tables.work_table(results, name).markdown()
    return made


def machine_line(results: Results) -> str:
    name = results["machine"]["name"]
    return f"[{name}](../benchmarks/results/{name}/results.json): {machine_and_software(results)}"


def refresh(text: str, results: Results, others: Sequence[Results] = ()) -> str:
    """A document with the marked tables of this machine's kind replaced::

        <!-- bench: cpu headline -->
        <!-- /bench -->

    Raises:
        ValueError: a block's name is unknown.
    """
    kind = "gpu" if results["machine"]["gpu"] else "cpu"
    made = blocks(results, others)

    def replaced(match: re.Match[str]) -> str:
        if match["kind"] != kind:
            return match[0]
        if match["name"] not in made:
            raise ValueError(f"no such block: {match['name']}; there are {', '.join(made)}")
        return f"{match[1]}\n{made[match['name']]}\n{match[4]}"

    return BLOCK.sub(replaced, text)


def publish(results: Results, others: Sequence[Results], charts: Path, root: Path) -> list[Path]:
    """Refreshes the documents below ``root`` and copies their pictures to ``docs/images``."""
    device, kind = ("cuda", "gpu") if results["machine"]["gpu"] else ("cpu", "cpu")
    changed = []
    for name in DOCUMENTS:
        path = root / name
        if path.is_file():
            text = path.read_text()
            fresh = refresh(text, results, others)
            if fresh != text:
                path.write_text(fresh)
                changed.append(path)
    for chart, picture in PICTURES.items():
        source = charts / f"{chart}-{device}.png"
        if source.is_file():
            target = root / "docs" / "images" / f"{picture}-{kind}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            changed.append(target)
    return changed

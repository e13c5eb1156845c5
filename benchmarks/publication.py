"""Tables and pictures of the documentation, taken from results files by command."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import tables
from .provenance import machine_and_software
from .results import Results

DOCUMENTS = ("README.md", "docs/performance.md")
# chart -> picture in docs/images, for each kind of machine
PICTURES = {"headline": "headline", "summary": "benchmarks"}
CAPTIONS = {
    "headline": "How many times as fast as torch",
    "benchmarks": "Time against a copy of the same bytes",
}
BLOCK = re.compile(r"(<!-- bench: (?P<kind>cpu|gpu) (?P<name>[a-z_]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
NOT_YET = {
    "gpu": "**Not yet run on a GPU**: no GPU figure is given here before one was measured.\n",
    "cpu": "Not yet measured on a CPU.\n",
}


def kind_of(results: Results) -> str:
    return "gpu" if results["machine"]["gpu"] else "cpu"


def blocks(results: Results, *others: Results) -> dict[str, str]:
    """Markdown by block name, for the marked places of the documents.

    Args:
        results: of the machine whose figures fill the tables.
        others: of further machines of its kind, which get a column in the targets' table.
    """
    every = (results, *others)
    made = {
        "state": state(results),
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
    made["report"] = report(results, *others)
    return made


def state(results: Results) -> str:
    """The machine, and how many of its targets are met, in two sentences."""
    words = Counter(item["verdict"] for item in tables.own_targets(results))
    counted = ", ".join(f"{count} {word}" for word, count in words.most_common())
    return f"Measured on {machine_and_software(results)}. Targets: {counted}.\n"


def report(results: Results, *others: Results) -> str:
    """Every table of a machine that documents show, under a heading each, and its pictures."""
    every = [tables.targets_by_machine((results, *others)), tables.floor_table(results)]
    every += [tables.work_table(results, name) for name in ("dropout", "batch_norm")]
    every += [tables.layer_totals(results), tables.work_table(results, "models"), tables.losses(results)]
    parts = [f"### {table.title}\n\n{table.markdown()}" for table in every if table.rows]
    machines = "".join(f"* {machine_line(one)}\n" for one in (results, *others))
    pictures = [f"![{words}](images/{name}-{kind_of(results)}.png)\n" for name, words in CAPTIONS.items()]
    return "\n".join([machines, *pictures, *parts])


def machine_line(results: Results) -> str:
    name = results["machine"]["name"]
    return f"[{name}](../benchmarks/results/{name}/results.json): {machine_and_software(results)}"


def by_kind(every: Sequence[Results]) -> dict[str, list[Results]]:
    found: dict[str, list[Results]] = {}
    for one in every:
        found.setdefault(kind_of(one), []).append(one)
    return found


def refresh(text: str, every: Sequence[Results]) -> str:
    """A document with the marked tables replaced::

        <!-- bench: cpu headline -->
        <!-- /bench -->

    Args:
        every: results by machine; the first of each kind fills the tables. Of a kind that has none, "state"
            says so, and the other blocks are empty.

    Raises:
        ValueError: a block's name is unknown.
    """
    made = {kind: blocks(*those) for kind, those in by_kind(every).items()}
    names = list(next(iter(made.values())))

    def replaced(match: re.Match[str]) -> str:
        kind, name = match["kind"], match["name"]
        if name not in names:
            raise ValueError(f"no such block: {name}; there are {', '.join(names)}")
        content = made[kind][name] if kind in made else NOT_YET[kind] if name == "state" else ""
        return f"{match[1]}\n{content}\n{match[4]}" if content else match[1] + match[4]

    return BLOCK.sub(replaced, text)


def publish(every: Sequence[Results], folder: Path, root: Path) -> list[Path]:
    """Refreshes the documents below ``root`` and copies their pictures to ``docs/images``.

    Args:
        every: results of the machine that publishes, then of the others.
        folder: of the machines' folders, for their charts.
    """
    changed = []
    for name in DOCUMENTS:
        path = root / name
        if path.is_file():
            text = path.read_text()
            fresh = refresh(text, every)
            if fresh != text:
                path.write_text(fresh)
                changed.append(path)
    for kind, (first, *_) in by_kind(every).items():
        device = "cuda" if kind == "gpu" else "cpu"
        for chart, picture in PICTURES.items():
            source = folder / first["machine"]["name"] / "charts" / f"{chart}-{device}.png"
            target = root / "docs" / "images" / f"{picture}-{kind}.png"
            if source.is_file() and not (target.is_file() and target.read_bytes() == source.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
                changed.append(target)
    return changed

"""The ``modeprobe bench`` command."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from .measure import Row
    from .registry import Work
    from .results import Results

FULL_SECONDS = 870.0  # of a whole run: a quarter of an hour, less the time to start
QUICK_SECONDS = 110.0
COUNT_SHARE = 0.2  # of a whole run, for valgrind
RENDER_SECONDS = 75.0  # for charts, the page, and reading the library's machine code
QUICK_RENDER_SECONDS = 25.0


def bench(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Only the targets' works, without torch.compile, in under two minutes."),
    ] = False,
    works: Annotated[
        Optional[str],  # noqa: UP045  (typer reads this at run time, on Python 3.10 too)
        typer.Option("--works", metavar="PATTERN", help="Only works whose name contains or matches PATTERN."),
    ] = None,
    list_works: Annotated[bool, typer.Option("--list", help="List the works and stop.")] = False,
    report: Annotated[
        bool,
        typer.Option("--report", help="Measure nothing: render the charts and the page from saved results."),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Measure nothing: print the targets with verdicts; exit 1 if one is missed."
        ),
    ] = False,
    compare: Annotated[
        Optional[tuple[str, str]],  # noqa: UP045
        typer.Option(
            "--compare", metavar="A B", help="Print two machines' results, or two files, side by side."
        ),
    ] = None,
    publish: Annotated[
        bool,
        typer.Option(
            "--publish",
            help="Also refresh the pictures and tables in README.md and docs/ (with --report: without "
            "measuring).",
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=1, metavar="SECONDS", help="Time for the measurements; what does not fit is left out."
        ),
    ] = None,
    within: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="Time for the whole run: measurements, instruction counts, charts.",
        ),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="Where the machines' results are; one folder each."),
    ] = None,
    machine: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="NAME",
            help="The machine's folder; by default this machine's, named after its GPU, or its CPU, "
            "CPU generation and instruction set.",
        ),
    ] = None,
    instructions: Annotated[
        bool,
        typer.Option("--instructions/--no-instructions", help="Count CPU instructions where valgrind is."),
    ] = True,
) -> None:
    """Measure modeprobe beside torch, torch.compile and installed rivals, against plain passes over memory.

    Every result is compared with a float64 reference first. Saves results.json, charts and a page in a
    folder per machine as it goes.
    """
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        if compare is not None:
            print_comparison(console, output, *compare)
            return
        device = chosen_device(device)
        path = results_path(output, machine, device, quick)
        if check:
            raise typer.Exit(print_targets(console, path))
        if list_works:
            for work in selected(device, works, quick):
                console.print(work.name, markup=False, highlight=False)
            return
        if not report:
            counting = instructions and works is None and budget is None and not quick and device == "cpu"
            until = time.monotonic() + (within or (QUICK_SECONDS if quick else FULL_SECONDS))
            rendering = QUICK_RENDER_SECONDS if quick else RENDER_SECONDS
            if budget is None:
                share = COUNT_SHARE if counting else 0.0
                budget = max(10.0, (1 - share) * (until - time.monotonic()) - rendering)
            measure_all(console, path, device, works, quick, budget)
            if counting:
                count_instructions(console, path, until - time.monotonic() - rendering)
        render(console, path, publish)
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None


def chosen_device(name: str) -> str:
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device")
    return name if name != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def results_path(output: Path | None, machine: str | None, device: str, quick: bool) -> Path:
    from . import results

    name = machine or results.machine(device)["name"]
    return (output or results.default_folder()) / (f"{name}-quick" if quick else name) / "results.json"


def selected(device: str, pattern: str | None, quick: bool) -> list[Work]:
    from .check import priority
    from .registry import all_works, select

    works = select(all_works(device), pattern)
    if not quick or pattern is not None:
        # What targets speak of comes first: a run that ends early has their verdicts.
        return sorted(works, key=lambda work: priority(work, device))
    return [work for work in works if priority(work, device) == 0]


def measure_all(
    console: Any,
    path: Path,
    device: str,
    pattern: str | None,
    quick: bool,
    budget: float,
) -> None:
    from . import results, runner

    chosen = selected(device, pattern, quick)
    found = results.load(path) if path.is_file() else results.empty(device)
    found["machine"]["name"] = path.parent.name
    load, cores = results.load_average(), found["machine"]["cores"] or 1
    if load is not None and load > 0.5 * cores:
        console.print(f"The machine is busy (load {load} on {cores} cores): figures will be noisy.")
    console.print(f"{len(chosen)} works on {path.parent.name}, at most {budget:.0f} s")
    with Progress(console, len(chosen), budget) as progress:
        late = runner.run(
            chosen,
            device,
            found,
            path,
            limits=runner.QUICK if quick else runner.GPU if device == "cuda" else runner.FULL,
            budget=budget,
            without=("torch.compile",) if quick else (),
            report=progress.done,
        )
    if late:
        console.print(f"No time was left for {len(late)} works, {late[0].name} the first; see --budget")


def count_instructions(console: Any, path: Path, timeout: float) -> None:
    """Adds callgrind's counts to the results; says so where there are none."""
    from . import callgrind, results

    console.print(f"Counting instructions with valgrind, at most {timeout:.0f} s")
    try:
        rows = callgrind.count(max(timeout, 1.0))
    except RuntimeError as error:
        console.print(f"No instruction counts: {error}", markup=False)
        return
    found = results.load(path)
    results.upsert(found, "instructions", rows, list(found["runs"])[-1])
    results.save(found, path)


class Progress:
    """A line per work with the time gone and the time left, above a bar when the output is a terminal."""

    def __init__(self, console: Any, total: int, budget: float, now: Callable[[], float] = time.monotonic):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.console, self.total, self.budget, self.now = console, total, budget, now
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("measuring", total=total)
        self.finished = 0
        self.start = now()

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *details: Any) -> None:
        self.bar.stop()

    def done(self, work: Work, rows: Sequence[Row]) -> None:
        self.finished += not work.replayed
        gone = self.now() - self.start
        # The works ahead cost what those behind did, or what the budget still has.
        ahead = min(self.budget - gone, gone / self.finished * (self.total - self.finished))
        self.bar.advance(self.task, not work.replayed)
        self.console.print(
            f"{self.finished:3}/{self.total} {gone:4.0f} s, {max(ahead, 0):3.0f} s left  {line(work, rows)}",
            markup=False,
            highlight=False,
        )


def line(work: Work, rows: Sequence[Row]) -> str:
    """A work's outcome in one line."""
    from .tables import seconds, times

    parts = []
    for row in rows:
        if row.seconds and not row.floor:
            faster = row.ratios.get("torch")
            compared = f" ({times(faster[1])} torch)" if faster and row.provider != "torch" else ""
            parts.append(f"{row.provider} {seconds(row.seconds[1])}{compared}")
        elif row.status in ("wrong", "failed"):
            parts.append(f"{row.provider} {row.status.upper()}: {row.reason}")
    return f"{work.name}: " + ", ".join(parts)


def render(console: Any, path: Path, publish: bool) -> None:
    from . import page, publication, results, tables

    found = refreshed(results.load(path), quick=path.parent.name.endswith("-quick"))
    results.save(found, path)
    for table in tables.every_table(found):
        table.print(console)
    charts, no_charts = drawn(found, path.parent / "charts")
    if no_charts:
        console.print(f"No charts: {no_charts}")
    (path.parent / "index.html").write_text(page.html(found, charts, no_charts))
    for what, file in (("results", path), ("page", path.parent / "index.html")):
        console.print(f"{what}: {file}", soft_wrap=True)
    if publish:
        root = results.checkout()
        if root is None:
            raise ValueError("publish: refreshes a source tree, and this is an installed package")
        every = [found, *(refreshed(other) for other in results.others(path))]
        for file in publication.publish(every, path.parent.parent, root):
            console.print(f"refreshed: {file}", soft_wrap=True)


def drawn(found: Results, folder: Path) -> tuple[dict[str, Any], str]:
    """The charts, or why there are none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return {}, "matplotlib is not installed; run: pip install 'modeprobe[bench]'"
    from . import charts

    return charts.write(found, folder), ""


def refreshed(found: Results, quick: bool = False) -> Results:
    """The results with verdicts of today's targets; a quick one does not read the library's machine code."""
    from .check import check, sass_instructions

    read = {
        (item["text"], item["bound"]): item
        for item in found["targets"]
        if item["device"] == "sass" and item["measured"]
    }
    verdicts = [
        verdict.as_dict() for verdict in check(found, instructions={} if quick else sass_instructions())
    ]
    # What an earlier reading gave stands where this library cannot be read.
    found["targets"] = [
        item if item["measured"] else read.get((item["text"], item["bound"]), item) for item in verdicts
    ]
    return found


def print_targets(console: Any, path: Path) -> int:
    from . import results, tables
    from .check import NO_REASON

    found = refreshed(results.load(path))
    for table in tables.target_tables(found):
        table.print(console)
    words = Counter(item["verdict"] for item in found["targets"])
    console.print(", ".join(f"{count} {word}" for word, count in words.items()))
    unexplained = sum(item["why"] == NO_REASON for item in found["targets"])
    if unexplained:
        console.print(f"{unexplained} missed without a reason")
    return 1 if any(words[word] for word in ("missed", "wrong", "failed")) else 0


def print_comparison(console: Any, output: Path | None, a: str, b: str) -> None:
    from . import results, tables
    from .compare import compare

    folder = output or results.default_folder()
    first, second = (
        results.load(path if (path := Path(name)).exists() else folder / name) for name in (a, b)
    )
    table = tables.compare_table(compare(first, second), a, b)
    table.print(console)
    if not table.rows:
        console.print("The two have no work in common.")


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
app.command()(bench)


def main() -> None:
    """Entry point of ``python -m modeprobe.benchmarks``."""
    app(prog_name="modeprobe bench")

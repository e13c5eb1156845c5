"""The ``modeprobe bench`` command."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from .measure import Row
    from .registry import Work
    from .results import Results

FULL_BUDGET = 720.0
COUNT_SECONDS = 120.0  # for valgrind, on top of the budget of the measurements
QUICK_BUDGET = 90.0


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
        typer.Option("--publish", help="Also refresh the picture and the tables in README.md and docs/."),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    budget: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="SECONDS", help="Time for the measurements; what does not fit is left out."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="Where the machines' results are; one folder each."),
    ] = None,
    machine: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Name of the machine's folder; by default from its GPU or CPU."),
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
            whole = budget is None and works is None and not quick
            budget = budget if budget is not None else (QUICK_BUDGET if quick else FULL_BUDGET)
            measure_all(console, path, device, works, quick, budget)
            if instructions and whole and device == "cpu":
                count_instructions(console, path)
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
    load, cores = results.load_average(), found["machine"]["cores"] or 1
    if load is not None and load > 0.5 * cores:
        console.print(f"The machine is busy (load {load} on {cores} cores): figures will be noisy.")
    console.print(f"{len(chosen)} works on {results.machine(device)['name']}, at most {budget:.0f} s")
    with Progress(console, len(chosen)) as progress:
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


def count_instructions(console: Any, path: Path) -> None:
    """Adds callgrind's counts to the results; says so where there are none."""
    from . import callgrind, results

    console.print("Counting instructions with valgrind")
    try:
        rows = callgrind.count(COUNT_SECONDS)
    except RuntimeError as error:
        console.print(f"No instruction counts: {error}", markup=False)
        return
    found = results.load(path)
    results.upsert(found, "instructions", rows, list(found["runs"])[-1])
    results.save(found, path)


class Progress:
    """A line per work, above a bar when the output is a terminal."""

    def __init__(self, console: Any, total: int):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.console = console
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
        self.start = time.monotonic()

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *details: Any) -> None:
        self.bar.stop()

    def done(self, work: Work, rows: Sequence[Row]) -> None:
        self.bar.advance(self.task)
        self.console.print(
            f"{time.monotonic() - self.start:5.0f} s  {line(work, rows)}", markup=False, highlight=False
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
    from . import page, results, tables

    found = refreshed(results.load(path))
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
        for file in page.publish(found, path.parent / "charts", root):
            console.print(f"refreshed: {file}", soft_wrap=True)


def drawn(found: Results, folder: Path) -> tuple[dict[str, Any], str]:
    """The charts, or why there are none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return {}, "matplotlib is not installed; run: pip install 'modeprobe[bench]'"
    from . import charts

    return charts.write(found, folder), ""


def refreshed(found: Results) -> Results:
    """The results with verdicts of today's targets."""
    from .check import check, sass_instructions

    verdicts = check(found, instructions=sass_instructions())
    found["targets"] = [verdict.as_dict() for verdict in verdicts]
    return found


def print_targets(console: Any, path: Path) -> int:
    from . import results, tables

    found = refreshed(results.load(path))
    for table in tables.target_tables(found["targets"]):
        table.print(console)
    bad = sum(item["verdict"] in ("missed", "wrong", "failed") for item in found["targets"])
    return 1 if bad else 0


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

"""The guided tour: three questions about dropout and BatchNorm, answered by measurement on this machine."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from modeprobe.info import info
from modeprobe.tour.section import Missing, missing

if TYPE_CHECKING:
    from rich.console import Console

QUESTIONS = {
    "dropout": "Dropout: where does it scale, and what does it cost?",
    "batchnorm": "BatchNorm: which statistics does evaluation use?",
    "models": "Language models: what does eval() change?",
}


@dataclass
class Tour:
    """What a tour found: a result or :class:`Missing` per section, and the error of each that raised."""

    outcomes: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    page: Path | None = None

    @property
    def exit_code(self) -> int:
        """0, also when packages were missing; 1 when a section raised."""
        return 1 if self.failures else 0


def run(
    output: Path,
    only: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
    console: Console | None = None,
) -> Tour:
    """Take the tour: compute each section, print its tables and its answer, and write the HTML page.

    Args:
        output: the HTML file to write.
        only: names of :data:`QUESTIONS` to take; all by default.
        settings: ``Settings`` of a section, by its name, in place of the defaults.
        console: where to print; standard output by default.

    Returns:
        A :class:`Tour`. A section whose packages are missing says so and the rest runs.

    Raises:
        ValueError: a name in ``only`` is no section.
        OSError: ``output`` cannot be written; found out before anything is computed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    unknown = [name for name in only if name not in QUESTIONS]
    if unknown:
        raise ValueError(f"tour: only must name sections among {', '.join(QUESTIONS)}, got {unknown[0]!r}")
    new = not output.exists()
    with open(output, "a"):
        pass
    if new:
        output.unlink()  # an interrupted tour leaves no empty page
    console = console or Console()
    tour = Tour()
    names = [name for name in QUESTIONS if not only or name in only]
    for number, name in enumerate(names, 1):
        console.print()
        console.rule(f"[bold]{number}. {QUESTIONS[name]}", align="left")
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        ) as progress:
            task = progress.add_task("measuring", total=None)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tour.outcomes[name] = _compute(name, settings or {}, progress, task)
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                reason = str(error).partition("\n")[0]
                tour.failures[name] = f"{type(error).__name__}: {reason}"
        _print(name, tour, console)
    _write(tour, output, console)
    return tour


def _compute(name: str, settings: dict[str, Any], progress: Any, task: Any) -> Any:
    section = _section(name)
    if isinstance(section, Missing):
        return section
    chosen = settings.get(name, section.Settings())
    progress.update(task, total=chosen.steps)
    return section.compute(chosen, lambda: progress.advance(task))


def _section(name: str) -> ModuleType | Missing:
    """The module of a section, or what it lacks. Imported one by one: each may need other packages."""
    if name == "dropout":
        from modeprobe.tour import dropout

        return dropout
    if name == "batchnorm":
        from modeprobe.tour import batch_norm

        return missing(batch_norm.NEEDS) or batch_norm
    from modeprobe.tour import language_models

    return missing(language_models.NEEDS) or language_models


def _print(name: str, tour: Tour, console: Console) -> None:
    from modeprobe.tour import terminal

    if name in tour.failures:
        console.print(terminal.problem("This part failed", tour.failures[name]))
        return
    outcome = tour.outcomes[name]
    if isinstance(outcome, Missing):
        console.print(terminal.problem("This part is left out", outcome.message))
        return
    show: dict[str, Callable[[Any], Any]] = {
        "dropout": terminal.show_dropout,
        "batchnorm": terminal.show_batch_norm,
        "models": terminal.show_language_models,
    }
    console.print(show[name](outcome))
    console.print(terminal.answer("Answer", outcome.answer))


def _write(tour: Tour, output: Path, console: Console) -> None:
    from modeprobe.tour import page

    output.write_text(page.render(QUESTIONS, tour.outcomes, tour.failures, info()), encoding="utf-8")
    tour.page = output
    no_charts = missing({"matplotlib": "matplotlib"})
    if no_charts:
        console.print(f"Without charts: {no_charts.message}", markup=False)
    console.print(f"\nReport with charts: {output.resolve()}", markup=False, soft_wrap=True)

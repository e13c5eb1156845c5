"""The tour's tables in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from modeprobe.tour import batch_norm, dropout, language_models
from modeprobe.tour.section import count, milliseconds, percent


def _table(title: str, *columns: str, right_from: int = 1) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index >= right_from else "left")
    return table


def _verdict(good: bool, yes: str, no: str) -> Text:
    return Text(yes, style="green") if good else Text(no, style="bold red")


def show_dropout(result: dropout.Result) -> RenderableType:
    means = _table("Mean output over ones", "p", "convention", "training", "evaluation", right_from=2)
    for row in result.means:
        means.add_row(f"{row.p:g}", row.scaling, f"{row.training:.4f}", f"{row.evaluation:.4f}")
    checks = _table("The mask contract, checked here", "backend", "checks", "verdict", right_from=3)
    for backend in dict.fromkeys(check.backend for check in result.checks):
        mine = [check for check in result.checks if check.backend == backend]
        failed = [check.what for check in mine if not check.passed]
        checks.add_row(backend, str(len(mine)), _verdict(not failed, "hold", f"FAILED: {'; '.join(failed)}"))
    speeds = _table(
        f"Forward pass, p = {result.speed_p:g}, float32, {count(result.threads, 'thread')}; "
        "speed-up over F.dropout",
        "elements",
        *dropout.WORKS,
        "speed-up",
        right_from=0,
    )
    for speed in result.speeds:
        speeds.add_row(
            f"2^{speed.elements.bit_length() - 1}",
            *[milliseconds(speed.seconds[work]) for work in dropout.WORKS],
            f"{speed.ratio:.1f}x",
        )
    return Group(means, checks, speeds)


def show_batch_norm(result: batch_norm.Result) -> RenderableType:
    table = _table(
        f"Test accuracy on {result.test_images} handwritten digits, by source of the statistics",
        "network",
        "after",
        *batch_norm.SOURCES,
        right_from=2,
    )
    for name, run in result.runs.items():
        for step in sorted(run.accuracy):
            table.add_row(
                name,
                f"{step} steps",
                *[percent(run.accuracy[step][source]) for source in batch_norm.SOURCES],
                end_section=step == result.steps,
            )
    approach = result.approach
    near = _table("Distance of the moving average to the full pass, in standard deviations", "step",
                  "while the weights train", "under the trained weights", right_from=0)  # fmt: skip
    for step in [step for step in (1, 5, 10, 20, 45, result.steps) if step in approach.steps]:
        near.add_row(
            str(step),
            f"{approach.training[approach.steps.index(step)]:.3f}",
            f"{approach.frozen[step - 1]:.3f}",
        )
    times = _table(
        f"Training, {result.steps} steps, same initial weights, one thread",
        "network",
        "seconds",
        "median step",
        "accuracy",
    )
    for name, run in result.runs.items():
        times.add_row(
            name,
            f"{run.seconds:.2f}",
            milliseconds(run.median_step),
            percent(result.final[name]["moving average"]),
        )
    return Group(table, near, times)


def show_language_models(result: language_models.Result) -> RenderableType:
    table = _table("What eval() changes", "model", "measured by the probe", "counting nn.Dropout says", "",
                   right_from=4)  # fmt: skip
    for row in result.rows:
        table.add_row(
            Text(row.name, style="bold", overflow="fold"),
            row.verdict,
            f"{row.shortcut} ({row.remark})" if row.remark else row.shortcut,
            _verdict(row.shortcut_is_right, "right", "WRONG"),
            end_section=True,
        )
    return table


def answer(title: str, text: str) -> RenderableType:
    return Panel(Text(text), title=Text(title), title_align="left", border_style="green", padding=(0, 1))


def problem(title: str, text: str) -> RenderableType:
    return Panel(Text(text), title=Text(title), title_align="left", border_style="yellow", padding=(0, 1))

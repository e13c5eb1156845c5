"""The ``modeprobe`` command."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

import modeprobe
from modeprobe.benchmarks.cli import bench
from modeprobe.probe.cli import ProbeCommand, probe

app = typer.Typer(
    name="modeprobe",
    help="Kernels for dropout and BatchNorm, and a probe that measures what train() and eval() change.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"modeprobe {modeprobe.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


class Section(str, Enum):
    """Parts of the tour."""

    dropout = "dropout"
    batchnorm = "batchnorm"
    models = "models"


@app.command()
def tour(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The HTML report to write.", dir_okay=False)
    ] = Path("modeprobe-tour.html"),
    only: Annotated[
        list[Section] | None, typer.Option("--only", help="Take this part only; may be given more than once.")
    ] = None,
) -> None:
    """Answer three questions about dropout and BatchNorm by measurement on this machine (a minute or two).

    Where does dropout scale, and what does it cost? Which statistics does BatchNorm use in evaluation? What
    does eval() change in a language model? Tables are printed, and one self-contained HTML page is written.
    """
    from modeprobe.tour import run

    try:
        taken = run(output, [section.value for section in only or ()])
    except OSError as error:
        raise typer.BadParameter(f"cannot write {output}: {error.strerror}", param_hint="--output") from None
    raise typer.Exit(taken.exit_code)


app.command(cls=ProbeCommand)(probe)
app.command()(bench)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, CPU instructions in use, and which backends work here (and if not, why)."""
    report = modeprobe.info()
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, show_header=False, pad_edge=False)
    for what, value in report.rows():
        facts.add_row(Text(what, style="bold"), Text(value))
    table = Table(title="Backends", title_justify="left", title_style="bold")
    for column in ("backend", "device", "built", "usable"):
        table.add_column(column)
    for item in report.backends:
        chosen = " (automatic choice)" if report.automatic.get(item.device) == item.name else ""
        usable = Text(f"yes{chosen}", style="green") if item.usable else Text("no", style="yellow")
        table.add_row(item.name, item.device, "yes" if item.built else "no", usable)
    console = Console()
    console.print(facts, "", table)
    for item in report.backends:
        if item.why_not is not None:
            # Not in the table: a command in a wrapped cell cannot be copied.
            console.print(Text(f"{item.name} on {item.device}: {item.why_not}"), soft_wrap=True)


def main() -> None:
    """Entry point of the ``modeprobe`` console script."""
    app(prog_name="modeprobe")

"""`modeprobe probe`: the probe from the command line."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from modeprobe.probe.report import Report

_COULD_NOT_RUN = 3


class ProbeCommand(TyperCommand):
    """Ends with 3 where arguments are wrong: the usual 2 would say that the model is suspicious."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except Exception as error:
            if getattr(error, "exit_code", None) == 2:
                error.exit_code = _COULD_NOT_RUN  # type: ignore[attr-defined]
            raise


class Format(str, Enum):
    """How the report is written."""

    text = "text"
    json = "json"
    markdown = "markdown"
    html = "html"


def probe(
    target: Annotated[
        str | None,
        typer.Argument(help="What makes the model: **package.module:factory**.", show_default=False),
    ] = None,
    make_input: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="What makes its input: **package.module:make_input**. "
            "A dict is passed by keyword, a tuple by position. With --transformers it is called with the "
            "model, and returns a dict.",
            show_default=False,
        ),
    ] = None,
    transformers: Annotated[
        str | None,
        typer.Option(
            help="Probe a tiny, randomly initialised model of this type of the installed transformers, or of "
            "the configuration in this **config.json** or checkpoint folder; nothing is downloaded.",
            show_default=False,
            metavar="MODEL_TYPE|PATH",
        ),
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="With --transformers: a value of its configuration, as **attention_dropout=0.1** or "
            "**text_config.attention_dropout=0.1**; may be repeated.",
            show_default=False,
            metavar="FIELD=VALUE",
        ),
    ] = None,
    form: Annotated[Format, typer.Option("--format", "-f", help="How to write the report.")] = Format.text,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write the report to this file.", dir_okay=False, show_default=False
        ),
    ] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Compare gradients too.")] = False,
) -> None:
    """Measure what train() and eval() change in a model.

    Exit code: 0 nothing differs, 1 outputs differ, 2 suspicious (random in eval mode, ungated random calls,
    mixed modes, state changed, generated text that depends on the mode), 3 could not be run, or wrong
    arguments.
    """
    try:
        # Whatever the model prints must not mix with the report.
        with contextlib.redirect_stdout(sys.stderr):
            model, args, kwargs = _load(target, make_input, transformers, _values(values or []))
            from modeprobe.probe.api import probe as run

            report = run(model, *args, gradients=gradients, **kwargs)
        _write(report, form, output)
    except typer.BadParameter as error:
        error.exit_code = _COULD_NOT_RUN
        raise
    except Exception as error:
        typer.echo(f"modeprobe probe: {type(error).__name__}: {error}", err=True)
        raise typer.Exit(_COULD_NOT_RUN) from None
    raise typer.Exit(report.exit_code)


def _values(given: list[str]) -> dict[str, Any]:
    """By field, each value read as JSON, or else as a text."""
    found: dict[str, Any] = {}
    for text in given:
        field, equals, value = text.partition("=")
        if not (field and equals):
            raise typer.BadParameter(f"--set must be given as FIELD=VALUE, got {text!r}")
        try:
            found[field] = json.loads(value)
        except json.JSONDecodeError:
            found[field] = value
    return found


def _load(
    target: str | None, make_input: str | None, model_type: str | None, values: dict[str, Any]
) -> tuple[Any, tuple, dict]:
    if (target is None) == (model_type is None):
        raise typer.BadParameter("give either package.module:factory or --transformers MODEL_TYPE")
    if values and model_type is None:
        raise typer.BadParameter("--set is for --transformers: a factory sets its own values")
    sys.path.insert(0, os.getcwd())
    if model_type is not None:
        from modeprobe.probe import architectures

        make = None if make_input is None else partial(_keywords, _find(make_input, "--input"))
        model, inputs = architectures.build(model_type, values=values, make_inputs=make)
        return model, (), inputs
    assert target is not None
    model = _call(target, "the factory")
    if make_input is None:
        return model, (), {}
    made = _call(make_input, "--input")
    if isinstance(made, dict):
        return model, (), made
    return model, made if isinstance(made, tuple) else (made,), {}


def _keywords(make: Any, model: Any) -> dict[str, Any]:
    made = make(model)
    if not isinstance(made, dict):
        raise TypeError(f"--input must return a dict of keyword arguments, got {type(made).__name__}")
    return made


def _call(name: str, what: str) -> Any:
    from torch import nn

    found = _find(name, what)
    return found if isinstance(found, nn.Module) or not callable(found) else found()


def _find(name: str, what: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise typer.BadParameter(f"{what} must be given as package.module:name, got {name!r}")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _write(report: Report, form: Format, output: Path | None) -> None:
    if form is Format.text and output is None and sys.stdout.isatty():
        from rich.console import Console

        Console().print(report)
        return
    text = {
        Format.text: report.__str__,
        Format.json: report.to_json,
        Format.markdown: report.to_markdown,
        Format.html: report.to_html,
    }[form]()
    if output is None:
        typer.echo(text)
    else:
        output.write_text(text + "\n", encoding="utf-8")
        typer.echo(f"{report.verdict} Written to {output}.", err=True)

"""The tour as one self-contained HTML page."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

from modeprobe.info import Info
from modeprobe.tour import batch_norm, dropout
from modeprobe.tour.section import Missing, count, milliseconds, missing, percent


def render(
    questions: Mapping[str, str], outcomes: Mapping[str, Any], failures: Mapping[str, str], info: Info
) -> str:
    """The page for the sections that ran, with the reason for each that did not.

    Args:
        questions: title of each section, by name, in order.
        outcomes: result of each section, or :class:`~modeprobe.tour.section.Missing`.
        failures: message of each section that raised.
        info: what the footer says of the machine.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(percent=percent, milliseconds=milliseconds)
    sections = []
    for name, question in questions.items():
        if name not in outcomes and name not in failures:
            continue
        outcome = outcomes.get(name)
        absent = outcome if isinstance(outcome, Missing) else None
        sections.append(
            {
                "name": name,
                "question": question,
                "result": None if absent else outcome,
                "problem": absent.message if absent else failures.get(name),
                "answer": getattr(outcome, "answer", None),
            }
        )
    no_charts = missing({"matplotlib": "matplotlib"})
    return environment.get_template("tour.html").render(
        sections=sections,
        charts={} if no_charts else _charts(outcomes),
        no_charts=no_charts.message if no_charts else None,
        works=dropout.WORKS,
        sources=batch_norm.SOURCES,
        info=info,
        machine=f"{_processor()}, {count(torch.get_num_threads(), 'thread')}",
    )


def _charts(outcomes: Mapping[str, Any]) -> dict[str, str]:
    from modeprobe.tour import charts

    drawn = {}
    result = outcomes.get("dropout")
    if isinstance(result, dropout.Result):
        drawn["dropout_speed"] = charts.dropout_speed(result)
    result = outcomes.get("batchnorm")
    if isinstance(result, batch_norm.Result):
        drawn["moving_average"] = charts.moving_average(result)
        drawn["accuracy"] = charts.accuracy(result)
    return drawn


def _processor() -> str:
    try:
        lines: Sequence[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

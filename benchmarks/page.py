"""The HTML page of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import tables
from .provenance import described, machine_and_software
from .results import Results

MARKED = {"met", "missed", "wrong", "failed", "faster", "slower"}


def html(results: Results, charts: Mapping[str, Any], no_charts: str = "") -> str:
    """One self-contained page: no file beside it is needed."""
    from jinja2 import Environment

    template = Path(__file__).with_name("templates") / "performance.html"
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        template.read_text()
    )
    return page.render(
        machine=results["machine"],
        described=machine_and_software(results),
        charts=charts,
        no_charts=no_charts,
        tables=tables.every_table(results),
        runs=[(described(run), run) for run in results["runs"].values()],
        marked=MARKED,
    )

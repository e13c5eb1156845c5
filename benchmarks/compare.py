"""Two results files side by side, and what is beyond noise between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .results import Results

LEAST = 0.03  # smaller changes of the median are not worth a mark, however quiet the machines


@dataclass(frozen=True)
class Change:
    """A row that both files have. ``speedup`` is A's median over B's: above 1, B is faster.

    ``mark``: "faster" or "slower" when the spreads from the 20th to the 80th percentile do not touch and
    the medians differ by more than ``LEAST``; "" within noise; otherwise the statuses that differ.
    """

    work: str
    provider: str
    device: str
    a: list[float] | None
    b: list[float] | None
    speedup: float | None
    mark: str


def compare(a: Results, b: Results) -> list[Change]:
    """Every row that both files have, in the order of A; floors and rows without any time are left out."""
    theirs = {key(row): row for row in b["results"]}
    changes = []
    for row in a["results"]:
        other = theirs.get(key(row))
        if other is None or row["floor"] or not (row["seconds"] or other["seconds"]):
            continue
        changes.append(change(row, other))
    return changes


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["device"], row["work"], row["provider"]


def change(a: dict[str, Any], b: dict[str, Any]) -> Change:
    mine, theirs = a["seconds"], b["seconds"]
    mark, speedup = "", None
    if mine and theirs:
        speedup = mine[1] / theirs[1]
        if abs(speedup - 1) > LEAST:
            if theirs[2] < mine[0]:
                mark = "faster"
            elif theirs[0] > mine[2]:
                mark = "slower"
    elif a["status"] != b["status"]:
        mark = f"{a['status']} -> {b['status']}"
    return Change(a["work"], a["provider"], a["device"], mine, theirs, speedup, mark)

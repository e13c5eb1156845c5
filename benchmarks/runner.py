"""A run: works one after the other within a time budget, saved as they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from . import allocator, results, rivals
from .check import check, compared, priority
from .compiled import first_line
from .measure import MODEPROBE, Row, measure, row
from .registry import Work
from .timing import Clock, Limits

FULL = Limits(seconds=3.0, least_rounds=7, most_rounds=60, longest=9.0)
GPU = Limits(seconds=1.0, least_rounds=10, most_rounds=60)
QUICK = Limits(seconds=0.8, least_rounds=3, most_rounds=20, sample_seconds=1e-3)
COMPILE = "torch.compile"
# What a torch.compile peer costs before it can be timed, until one has shown it: with less time per work
# it is left out, unless a target names the work or compares it with torch.compile.
COMPILE_SECONDS = 3.0
TIMING_SHARE = 0.6  # of the time left per work; the rest goes to inputs, references and compilation
# Parts of the time left: a target's work counts double, and compiling one takes as much again.
NAMED, COMPILED, PLAIN = 1, 2, 1

Report = Callable[[Work, Sequence[Row]], None]


def run(
    works: Sequence[Work],
    device: str,
    found: results.Results,
    path: Path,
    *,
    limits: Limits = FULL,
    budget: float | None = None,
    without: Sequence[str] = (),
    report: Report = lambda work, rows: None,
    clock: Clock | None = None,
    now: Callable[[], float] = time.monotonic,
) -> list[Work]:
    """Measures works into ``found`` and saves it to ``path`` after each.

    Args:
        limits: of one work; its seconds shrink when the budget asks for it.
        budget: seconds for the whole run, shared by the works that are left. Whatever the machine's
            speed, the run ends with it, but for the work that is under way; what does not fit is left out.
        without: providers to leave out.
        report: called after each work, and once more with its replay.
        clock: for tests; by default the one that fits the device.
        now: seconds, for the budget.

    Returns:
        The works that were left out; on a GPU also those after a work that took the GPU from the process.
    """
    name = results.now()
    while name in found["runs"]:
        name += "+"
    here = results.machine(device)
    if found["results"]:
        results.require_same_machine(found, here, path)
    found["machine"] = {**here, "name": found["machine"]["name"]}
    entry: dict[str, Any] = {
        "date": results.now(),
        "commit": results.commit(),
        "device": device,
        "versions": results.versions(),
        "rivals": rivals.states(),
        "load": [results.load_average(), None],
        "limits": {"seconds": limits.seconds, "least_rounds": limits.least_rounds, "budget": budget},
        "allocator": allocator.pin() if device == "cpu" else "torch's caching allocator",
        "left_out": [],
    }
    found["runs"][name] = entry
    weights = [weight(work, device) for work in works]
    compiling: list[float] = []
    start = now()
    for index, work in enumerate(works):
        own, left = limits, list(without)
        if budget is not None:
            remaining = budget - (now() - start)
            if remaining <= 0:
                entry["left_out"] = [late.name for late in works[index:]]
                results.save(found, path)
                return list(works[index:])
            share = remaining * weights[index] / sum(weights[index:])
            own = within(limits, TIMING_SHARE * share / len(work.ways))
            cost = median(compiling) if compiling else COMPILE_SECONDS
            if share < cost and priority(work, device) and COMPILE not in compared(work, device):
                left.append(COMPILE)
        try:
            rows = measure(work, device, own, clock=clock, without=left)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            rows = [row(work, MODEPROBE, device, status="failed", reason=reason)]
        compiling += [
            item.setup_seconds
            for item in rows
            if item.provider == COMPILE and item.status == "ok" and item.setup_seconds is not None
        ]
        results.upsert(found, "results", [item.as_dict() for item in rows], name)
        found["targets"] = [verdict.as_dict() for verdict in check(found)]
        entry["load"][1] = results.load_average()
        results.save(found, path)
        for way in work.ways:
            report(way, [item for item in rows if item.work == way.name])
        if device == "cuda" and lost():
            entry["left_out"] = [late.name for late in works[index + 1 :]]
            results.save(found, path)
            return list(works[index + 1 :])
    return []


def weight(work: Work, device: str) -> int:
    return PLAIN * len(work.ways) + NAMED * (priority(work, device) == 0) + COMPILED * work.compiled


def lost() -> bool:
    """Whether the process can use its GPU no more: an illegal access makes every later call fail."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def within(limits: Limits, seconds: float) -> Limits:
    """The limits with no race longer than ``seconds``, as far as its fewest rounds allow."""
    longest = limits.seconds if limits.longest is None else limits.longest
    return replace(
        limits,
        seconds=min(limits.seconds, seconds),
        longest=min(longest, seconds),
        ceiling=min(limits.ceiling or seconds, seconds),
    )

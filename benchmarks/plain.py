"""The measurements of ``modeprobe bench`` with nothing but torch installed: what `make gpu` runs.

Saves results.json, with verdicts, as it goes. Charts and the page are made from it elsewhere, by
``modeprobe bench --report --machine NAME``.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import results, runner, warm
from .check import compared, priority
from .measure import LEFT_OUT, Row
from .registry import Work, all_works, select


def line(work: Work, rows: Sequence[Row]) -> str:
    """A work's outcome in one line."""
    parts = []
    for row in rows:
        if row.seconds and not row.floor:
            faster = row.ratios.get("torch")
            compared = f" ({faster[1]:.2f}x torch)" if faster and row.provider != "torch" else ""
            parts.append(f"{row.provider} {1e6 * row.seconds[1]:.1f} us{compared}")
        elif row.status in ("wrong", "failed"):
            parts.append(f"{row.provider} {row.status.upper()}: {row.reason}")
    return f"{work.name}: " + ", ".join(parts)


def complete(found: results.Results, work: Work, device: str) -> bool:
    """Whether all that a work's targets need was measured at this commit."""
    now, names = results.commit(), {way.name for way in work.ways}
    rows = [row for row in found["results"] if row["work"] in names and row["device"] == device]
    return {row["work"] for row in rows} == names and all(
        found["runs"][row["run"]]["commit"] == now
        and (row["reason"] != LEFT_OUT or row["provider"] not in compared(work, device))
        for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when something was measured."""
    parser = argparse.ArgumentParser(prog="python -m modeprobe.benchmarks.plain")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--budget", type=float, required=True, help="seconds for the measurements")
    parser.add_argument("--output", type=Path, default=None, help="folder of the machines' folders")
    parser.add_argument("--machine", default=None, help="name of the machine's folder")
    parser.add_argument("--works", default=None, help="only works whose name contains or matches this")
    parser.add_argument("--rest", action="store_true", help="only works without figures of this commit")
    parser.add_argument(
        "--warm", type=float, default=0.0, help="seconds for compiling torch.compile's peers ahead"
    )
    options = parser.parse_args(arguments)
    name = options.machine or results.machine(options.device)["name"]
    path = (options.output or results.default_folder()) / name / "results.json"
    found = results.load(path) if path.is_file() else results.empty(options.device)
    start = time.monotonic()
    # What targets speak of comes first, and of that what an earlier run had no time for: a run that ends
    # early has their verdicts.
    works: list[Work] = []
    again: list[Work] = []
    for work in select(all_works(options.device), options.works):
        (again if complete(found, work, options.device) else works).append(work)
    works = works if options.rest else [*works, *again]
    works.sort(key=lambda work: (min(priority(work, options.device), 2), work in again))
    named = [work for work in works if priority(work, options.device) < 2]
    print(f"{len(works)} works, at most {options.budget:.0f} s", flush=True)
    if options.warm:
        compiled = [work for work in named if work.compiled]
        print(warm.warm_up(compiled, options.device, options.warm), flush=True)
    # What is imported by now is looked at by none of the collections that follow each work.
    gc.freeze()
    late: list[Work] = []
    # Others get what the targets leave, not a share of it.
    for part in filter(None, (named, works[len(named) :])):
        if late:
            late += part
            continue
        late += runner.run(
            part,
            options.device,
            found,
            path,
            limits=runner.GPU if options.device == "cuda" else runner.FULL,
            budget=options.budget - (time.monotonic() - start),
            report=lambda work, rows: print(
                f"{time.monotonic() - start:5.0f} s  {line(work, rows)}", flush=True
            ),
        )
        if late and options.device == "cuda" and runner.lost():
            left = options.budget - (time.monotonic() - start)
            print("The GPU is lost: a new process goes on", flush=True)
            options_now = ["--budget", str(max(left, 0.0)), "--rest", "--warm", "0"]
            os.execv(sys.executable, [*sys.orig_argv, *options_now])
    if late:
        print(f"No time was left for {len(late)} works, {late[0].name} the first")
    print(f"{len(works) - len(late)} works measured: {path}")
    return 0 if len(late) < len(works) else 1


if __name__ == "__main__":
    raise SystemExit(main())

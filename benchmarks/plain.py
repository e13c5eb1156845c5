"""The measurements of ``modeprobe bench`` with nothing but torch installed: what `make gpu` runs.

Saves results.json, with verdicts, as it goes. Charts and the page are made from it elsewhere, by
``modeprobe bench --report --machine NAME``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import results, runner
from .check import priority
from .measure import Row
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


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when something was measured."""
    parser = argparse.ArgumentParser(prog="python -m modeprobe.benchmarks.plain")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--budget", type=float, required=True, help="seconds for the measurements")
    parser.add_argument("--output", type=Path, default=None, help="folder of the machines' folders")
    parser.add_argument("--machine", default=None, help="name of the machine's folder")
    parser.add_argument("--works", default=None, help="only works whose name contains or matches this")
    parser.add_argument(
        "--after", default=None, help="only works that come after this one in the run's order"
    )
    options = parser.parse_args(arguments)
    name = options.machine or results.machine(options.device)["name"]
    path = (options.output or results.default_folder()) / name / "results.json"
    # What targets speak of comes first: a run that ends early has their verdicts.
    works = sorted(
        select(all_works(options.device), options.works), key=lambda work: priority(work, options.device)
    )
    names = [work.name for work in works]
    works = works[names.index(options.after) + 1 if options.after else 0 :]
    found = results.load(path) if path.is_file() else results.empty(options.device)
    start = time.monotonic()
    print(f"{len(works)} works, at most {options.budget:.0f} s", flush=True)
    late = runner.run(
        works,
        options.device,
        found,
        path,
        limits=runner.GPU if options.device == "cuda" else runner.FULL,
        budget=options.budget,
        report=lambda work, rows: print(f"{time.monotonic() - start:5.0f} s  {line(work, rows)}", flush=True),
    )
    if late and options.device == "cuda" and runner.lost():
        *_, last = [work.name for work in works if work not in late]
        print(f"The GPU is lost after {last}: a new process goes on", flush=True)
        left = options.budget - (time.monotonic() - start)
        os.execv(sys.executable, [*sys.orig_argv, "--budget", str(max(left, 0.0)), "--after", last])
    if late:
        print(f"No time was left for {len(late)} works, {late[0].name} the first")
    print(f"{len(works) - len(late)} works measured: {path}")
    return 0 if len(late) < len(works) else 1


if __name__ == "__main__":
    raise SystemExit(main())

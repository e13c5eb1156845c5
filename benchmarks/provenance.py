"""Which runs a table's figures come from, and whether the kernels have changed since."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from .results import Results, older_kernels

OLDER = "kernels older than this source tree's"
NAMED = 3  # works without time, of which more are counted
UNPINNED = "before memory was made the same for everybody"


def provenance(results: Results, rows: Iterable[dict[str, Any]]) -> str:
    """``Measured at abc on 2026-01-01``; with the number of works each where several runs met."""
    works: Counter[str] = Counter()
    for run in {(row["work"], row["run"]): row["run"] for row in rows}.values():
        works[run] += 1
    parts = [
        described(results["runs"][run]) + (f", {count} works" if len(works) > 1 else "")
        for run, count in sorted(works.items(), reverse=True)
        if run in results["runs"]
    ]
    return f"Measured {'; '.join(parts)}." if parts else ""


def described(run: dict[str, Any]) -> str:
    commit = run.get("commit")
    words = f"at {commit} " if commit else ""
    remarks = [OLDER] if older_kernels(commit) else []
    if run.get("device") == "cpu" and "allocator" not in run:
        remarks.append(UNPINNED)
    return f"{words}on {run['date'][:10]}" + (f" ({', '.join(remarks)})" if remarks else "")


def last_run(results: Results) -> dict[str, Any] | None:
    return max(results["runs"].values(), key=lambda run: run["date"], default=None)


def is_older(results: Results) -> bool:
    """Whether the last run was of kernels that have changed since."""
    run = last_run(results)
    return run is not None and older_kernels(run.get("commit"))


def machine_and_software(results: Results) -> str:
    """The machine, the software and the last run in one sentence."""
    machine = results["machine"]
    gpu = machine["gpu"]
    kind = f" ({machine['generation']})" if machine.get("generation") else ""
    where = (
        f"{gpu['name']} ({gpu['memory_gib']} GiB, {gpu['multiprocessors']} multiprocessors), {machine['cpu']}"
        if gpu
        else f"{machine['cpu']}{kind}, {machine['threads']} threads, {machine['simd']}"
    )
    run = last_run(results)
    if run is None:
        return where
    versions, late = run["versions"], run.get("left_out") or []
    named = ", ".join(late) if len(late) <= NAMED else f"{len(late)} works, {late[0]} the first"
    return f"{where}; torch {versions['torch']}, modeprobe {versions['modeprobe']} {described(run)}" + (
        f"; no time was left for {named}" if late else ""
    )


def heading(results: Results) -> str:
    """The heading of a machine's column where several stand side by side."""
    run = last_run(results)
    return results["machine"]["name"] + (f" {described(run)}" if run else "")

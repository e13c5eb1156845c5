"""One work, all providers: set up, judged, warmed up, then raced."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from . import allocator, memory, replay
from .compiled import first_line
from .registry import Candidate, Problem, Unavailable, Work
from .timing import Clock, Contender, Limits, Spread, clock_for, race, ratio

MODEPROBE = "modeprobe"
LEFT_OUT = "left out of this run"


@dataclass
class Row:
    """One provider's figures for one work.

    Args:
        status: "ok"; "wrong", the result differs from the reference; "failed", it raised; "unavailable",
            it cannot do this work here. Only "ok" has times.
        reason: why the status is not "ok", in words.
        seconds: 20th, 50th, 80th percentile of the time per call.
        fastest: the shortest sample.
        ratios: time of another provider over this one's (above 1: this one is faster), round by round;
            20th, 50th, 80th percentile.
        of_copy: share of the bandwidth of a plain pass over the same tensor that this provider reaches
            with the work's bytes.
        saved_bytes: what autograd keeps of one forward pass.
        peak_bytes: allocated on the CUDA device by one run.
        setup_seconds: from nothing to the judged first result, compilation included.
    """

    work: str
    provider: str
    device: str
    status: str = "ok"
    reason: str = ""
    note: str = ""
    floor: bool = False
    family: str = ""
    mode: str = ""
    shape: list[int] = field(default_factory=list)
    dtype: str = ""
    layout: str = ""
    groups: list[str] = field(default_factory=list)
    count: int = 1
    elements: int = 0
    bytes: int = 0
    seconds: list[float] | None = None
    fastest: float | None = None
    rounds: int = 0
    ratios: dict[str, list[float]] = field(default_factory=dict)
    of_copy: list[float] | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    setup_seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    work: Work,
    device: str,
    limits: Limits,
    *,
    clock: Clock | None = None,
    without: Sequence[str] = (),
    capture: Callable[[Candidate, int], Candidate] = replay.captured,
) -> list[Row]:
    """Rows of all providers of a work. Never raises for a provider: its row says what went wrong.

    A work that replays has rows of its replay as well, after its own: both from one setup.

    Args:
        limits: of each race.
        clock: how a sample is timed; by default wall time, or CUDA events.
        without: providers to leave out of this run.
        capture: makes a replay of a candidate.
    """
    try:
        problem = work.setup(work, device)
    except torch.OutOfMemoryError as error:
        return [row(work, MODEPROBE, device, status="failed", reason=f"out of memory: {first_line(error)}")]
    rows: dict[str, Row] = {}
    ready: dict[str, Candidate] = {}
    for name, setup in (*problem.candidates.items(), *problem.floors.items()):
        floor = name in problem.floors
        if name in without:
            rows[name] = row(work, name, device, status="unavailable", reason=LEFT_OUT)
            continue
        rows[name], candidate = prepare(work, device, name, setup, problem, floor)
        if candidate is not None:
            ready[name] = candidate
    contenders = [Contender(name, candidate.run, candidate.context) for name, candidate in ready.items()]
    if device == "cpu":
        allocator.give_back()
    try:
        samples = race(contenders, clock or clock_for(device, work.elements), limits)
    except torch.OutOfMemoryError as error:
        return [row(work, MODEPROBE, device, status="failed", reason=f"out of memory: {first_line(error)}")]
    for name, own in samples.items():
        fill(rows[name], own, samples, work)
    found = list(rows.values())
    if work.replays and device == "cuda":
        try:
            found += measure_replay(work.replay, device, limits, clock, rows, ready, problem, capture)
        except Exception as error:  # the eager calls have their figures
            reason = f"{type(error).__name__}: {first_line(error)}"
            found.append(row(work.replay, MODEPROBE, device, status="failed", reason=reason))
    del contenders, ready, problem
    gc.collect()
    return found


def measure_replay(
    work: Work,
    device: str,
    limits: Limits,
    clock: Clock | None,
    eager: dict[str, Row],
    ready: dict[str, Candidate],
    problem: Problem,
    capture: Callable[[Candidate, int], Candidate],
) -> list[Row]:
    """Rows of the replays of what was set up and timed; what a replay left behind is judged again."""
    rows = {
        name: row(work, name, device, floor=own.floor, status=own.status, reason=own.reason)
        for name, own in eager.items()
    }
    contenders = []
    for name, candidate in ready.items():
        own, seconds = rows[name], eager[name].seconds
        calls = replay.calls_in_a_graph(seconds[1], limits.sample_seconds) if seconds else 1
        try:
            again = capture(candidate, calls)
            outcome = again.run()
            fault = None if own.floor else problem.verify(outcome)
        except Exception as error:
            own.status, own.reason = (
                "unavailable",
                f"not captured: {type(error).__name__}: {first_line(error)}",
            )
            continue
        own.note = again.note
        if fault is not None:
            own.status, own.reason = "wrong", fault
            continue
        contenders.append(Contender(name, again.run, calls=calls))
    samples = race(contenders, clock or clock_for(device, work.elements), limits)
    for name, mine in samples.items():
        fill(rows[name], mine, samples, work)
    return list(rows.values())


def prepare(
    work: Work, device: str, name: str, setup: Any, problem: Problem, floor: bool
) -> tuple[Row, Candidate | None]:
    """Sets a provider up, runs it once, judges the result and counts its memory."""
    own = row(work, name, device, floor=floor)
    start = time.perf_counter()
    try:
        candidate = setup()
        with candidate.context():
            outcome = candidate.run()
            fault = None if floor else problem.verify(outcome)
            own.setup_seconds = round(time.perf_counter() - start, 3)
            if fault is None and not floor:
                if candidate.forward is not None:
                    own.saved_bytes = memory.saved_bytes(candidate.forward)
                del outcome
                if device == "cuda":
                    own.peak_bytes = memory.peak_bytes(candidate.run)
    except Unavailable as error:
        own.status, own.reason = "unavailable", str(error)
        return own, None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        own.status, own.reason = "failed", f"{type(error).__name__}: {first_line(error)}"
        return own, None
    own.note = candidate.note
    if fault is not None:
        own.status, own.reason = "wrong", fault
        return own, None
    return own, candidate


def row(work: Work, provider: str, device: str, **fields: Any) -> Row:
    return Row(
        work=work.name,
        provider=provider,
        device=device,
        family=work.family,
        mode=work.mode,
        shape=list(work.shape),
        dtype=work.dtype,
        layout=work.layout,
        groups=list(work.groups),
        count=work.count,
        elements=work.elements,
        bytes=work.bytes,
        **fields,
    )


def fill(own: Row, mine: list[float], samples: dict[str, list[float]], work: Work) -> None:
    own.seconds = Spread.of(mine).as_list()
    own.fastest = float(f"{min(mine):.6g}")
    own.rounds = len(mine)
    own.ratios = {
        other: ratio(theirs, mine).as_list() for other, theirs in samples.items() if other != own.provider
    }
    if work.unit in samples and work.passes:
        # The unit is two passes: a read and a write.
        own.of_copy = ratio(samples[work.unit], mine).scaled(work.passes / 2).as_list()

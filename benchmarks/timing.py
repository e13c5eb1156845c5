"""Interleaved timing: every contender runs in every round, so that drift of the machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile of samples."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if not samples:
            raise ValueError("samples is empty; at least one is needed")
        return cls(*(percentile(samples, share) for share in (0.2, 0.5, 0.8)))

    def scaled(self, factor: float) -> Spread:
        return Spread(self.low * factor, self.middle * factor, self.high * factor)

    def as_list(self) -> list[float]:
        return [float(f"{value:.6g}") for value in (self.low, self.middle, self.high)]


def percentile(samples: Sequence[float], share: float) -> float:
    """Linear interpolation between the two closest ranks (type 7 of Hyndman and Fan, numpy's default)."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass
class Contender:
    """One provider's callable; ``context`` is entered around each sample, outside the timed region."""

    name: str
    run: Callable[[], Any]
    context: Callable[[], AbstractContextManager] = nullcontext


class Clock(Protocol):
    def now(self) -> float:
        """Seconds, for budgets."""
        ...

    def sample(self, run: Callable[[], Any], calls: int) -> float:
        """Seconds per call, over ``calls`` calls in a row."""
        ...


class HostClock:
    """Wall time on the host; on CUDA the device is drained before and after, so it holds launch costs too."""

    def __init__(self, synchronize: Callable[[], Any] = lambda: None):
        self.synchronize = synchronize

    def now(self) -> float:
        return time.perf_counter()

    def sample(self, run: Callable[[], Any], calls: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        self.synchronize()
        return (time.perf_counter() - start) / calls


class DeviceClock(HostClock):
    """CUDA events on the current stream: the time between two points of the device's own time line."""

    def __init__(self) -> None:
        super().__init__(torch.cuda.synchronize)

    def sample(self, run: Callable[[], Any], calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e-3 / calls


def clock_for(device: str, elements: int) -> Clock:
    """Events on CUDA, except for tensors so small that the launch on the host is what a user waits for."""
    if device != "cuda":
        return HostClock()
    return HostClock(torch.cuda.synchronize) if elements <= 4096 else DeviceClock()


@dataclass(frozen=True)
class Limits:
    seconds: float = 3.0  # of timing per work, all contenders together
    least_rounds: int = 5
    most_rounds: int = 60
    sample_seconds: float = 2e-3  # calls are repeated until a sample lasts this long
    most_calls: int = 2000


def calibrate(contender: Contender, clock: Clock, limits: Limits) -> int:
    """How many calls make one sample; also the warm-up, beside the run that was judged."""
    with contender.context():
        seconds = clock.sample(contender.run, 1)
        if seconds < limits.sample_seconds:
            # One call is all overhead of the clock when the work is tiny: ask again with more.
            seconds = clock.sample(contender.run, 10)
    return max(1, min(limits.most_calls, int(limits.sample_seconds / max(seconds, 1e-9))))


def race(contenders: Sequence[Contender], clock: Clock, limits: Limits) -> dict[str, list[float]]:
    """Seconds per call of each contender, one sample per round and contender.

    The order is turned and reversed from round to round, so that nobody always runs after the same
    neighbour. Round ``k`` of one contender and round ``k`` of another are neighbours in time: ratios
    are to be formed per round.
    """
    calls = {contender.name: calibrate(contender, clock, limits) for contender in contenders}
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    start = clock.now()
    for round_number in range(limits.most_rounds):
        if round_number >= limits.least_rounds and clock.now() - start >= limits.seconds:
            break
        turn = round_number // 2 % max(len(contenders), 1)
        order = [*contenders[turn:], *contenders[:turn]]
        for contender in reversed(order) if round_number % 2 else order:
            with contender.context():
                samples[contender.name].append(clock.sample(contender.run, calls[contender.name]))
    return samples


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the round-by-round ratios of two contenders of one race."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])

"""Interleaved timing: every contender runs in every round, so that drift of the machine hits all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import count
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
    """One provider's callable; ``context`` is entered around each sample, outside the timed region.

    ``calls``: of the work in one ``run``.
    """

    name: str
    run: Callable[[], Any]
    context: Callable[[], AbstractContextManager] = nullcontext
    calls: int = 1


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
    """CUDA events on the current stream: the time between two points of the device's own time line.

    A call goes ahead of the first event: else the device, idle until then, would be timed while the host
    prepares its first launch. Where the host is slower than the device, its pace is what is timed.
    """

    def __init__(self) -> None:
        super().__init__(torch.cuda.synchronize)

    def sample(self, run: Callable[[], Any], calls: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        run()
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
    """When a race ends.

    Args:
        seconds: of timing per work, all contenders together.
        least_rounds: so many even when they take longer than ``seconds``.
        most_rounds: no more, however little they take.
        longest: a race whose ratios are not settled goes on until here, and to ``NOISY`` times
            ``most_rounds``; None: no longer than ``seconds``.
        ceiling: past this it ends after ``FEWEST`` rounds already; None: no such end.
        sample_seconds: calls are repeated until a sample lasts this long.
        most_calls: in one sample.
    """

    seconds: float = 3.0
    least_rounds: int = 5
    most_rounds: int = 60
    longest: float | None = None
    ceiling: float | None = None
    sample_seconds: float = 2e-3
    most_calls: int = 2000

    def over(self, rounds: int, elapsed: float, samples: Mapping[str, Sequence[float]]) -> bool:
        if self.ceiling is not None and rounds >= FEWEST and elapsed >= self.ceiling:
            return True
        if rounds < self.least_rounds or (elapsed < self.seconds and rounds < self.most_rounds):
            return False
        longest = self.seconds if self.longest is None else self.longest
        return elapsed >= longest or rounds >= NOISY * self.most_rounds or settled(samples)


FEWEST = 3
NOISY = 4
SETTLED = 0.06  # width of the 95% interval of a median ratio, in that ratio


def settled(samples: Mapping[str, Sequence[float]]) -> bool:
    """Whether the median ratios of the first contender to every other one are known closely enough."""
    first, *others = samples.values() or ((),)
    for other in others:
        ratios = sorted(a / b for a, b in zip(other, first, strict=True))
        low, high = median_interval(ratios)
        if high - low > SETTLED * percentile(ratios, 0.5):
            return False
    return True


def median_interval(ordered: Sequence[float]) -> tuple[float, float]:
    """About 95% confidence for the median, from order statistics (Conover, Practical Nonparametric
    Statistics, 3.2), whatever the distribution."""
    middle, reach = len(ordered) / 2, 0.98 * len(ordered) ** 0.5
    low, high = int(middle - reach), math.ceil(middle + reach)
    return ordered[max(low, 0)], ordered[min(high, len(ordered) - 1)]


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
    for round_number in count():
        if limits.over(round_number, clock.now() - start, samples):
            break
        turn = round_number // 2 % max(len(contenders), 1)
        order = [*contenders[turn:], *contenders[:turn]]
        for contender in reversed(order) if round_number % 2 else order:
            with contender.context():
                seconds = clock.sample(contender.run, calls[contender.name])
                samples[contender.name].append(seconds / contender.calls)
    return samples


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the round-by-round ratios of two contenders of one race."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])

"""Races under a clock that is told what each callable costs."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from modeprobe.benchmarks import timing
from modeprobe.benchmarks.timing import Contender, HostClock, Limits, Spread, percentile, race, ratio

pytestmark = pytest.mark.rung("reference")


class ToldClock:
    """A sample costs what ``costs`` says for the callable, times what the machine's drift adds."""

    def __init__(self, costs, drift=lambda sample: 1.0):
        self.costs, self.drift = costs, drift
        self.time, self.samples, self.log = 0.0, 0, []

    def now(self):
        return self.time

    def sample(self, run, calls):
        seconds = self.costs[run] * self.drift(self.samples)
        self.samples += 1
        self.time += seconds * calls
        self.log.append((run, calls))
        return seconds


def fast():
    pass


def slow():
    pass


def third():
    pass


def test_percentiles_are_numpys():
    numpy = pytest.importorskip("numpy")
    samples = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0]
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert percentile(samples, share) == pytest.approx(float(numpy.quantile(samples, share)))
    with pytest.raises(ValueError, match="empty"):
        Spread.of([])


def test_a_slow_contender_is_slower_by_its_factor():
    clock = ToldClock({fast: 1e-3, slow: 3e-3})
    samples = race([Contender("fast", fast), Contender("slow", slow)], clock, Limits(seconds=1.0))
    assert ratio(samples["slow"], samples["fast"]).as_list() == [3.0, 3.0, 3.0]


def test_ratios_survive_a_machine_that_becomes_ten_times_slower():
    clock = ToldClock({fast: 1e-3, slow: 2e-3}, drift=lambda sample: 1 + 9 * sample / 100)
    samples = race([Contender("fast", fast), Contender("slow", slow)], clock, Limits(seconds=9.0))
    assert max(samples["fast"]) > 3 * min(samples["fast"])
    assert ratio(samples["slow"], samples["fast"]).middle == pytest.approx(2.0, rel=0.05)


def test_rounds_are_interleaved_and_nobody_keeps_its_place():
    runs = {"fast": fast, "slow": slow, "third": third}
    clock = ToldClock(dict.fromkeys(runs.values(), 1e-2))
    limits = Limits(seconds=1e9, least_rounds=5, most_rounds=12)
    samples = race([Contender(name, run) for name, run in runs.items()], clock, limits)
    rounds = [run for run, _ in clock.log[-36:]]
    orders = [tuple(rounds[start : start + 3]) for start in range(0, 36, 3)]
    assert {len(own) for own in samples.values()} == {12}
    assert all(set(order) == set(runs.values()) for order in orders)
    for place in range(3):
        assert {order[place] for order in orders} == set(runs.values())


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 4), (1e9, 9)])
def test_limits_hold(seconds, rounds):
    clock = ToldClock({fast: 1.0})
    limits = Limits(seconds=seconds, least_rounds=4, most_rounds=9)
    assert len(race([Contender("fast", fast)], clock, limits)["fast"]) == rounds


def test_a_race_that_takes_more_than_its_share_ends_after_the_fewest_rounds():
    clock = ToldClock({fast: 10.0})
    limits = Limits(seconds=5.0, least_rounds=7, ceiling=5.0)
    assert len(race([Contender("fast", fast)], clock, limits)["fast"]) == timing.FEWEST
    roomy = Limits(seconds=5.0, least_rounds=7, ceiling=1e9)
    assert len(race([Contender("fast", fast)], clock, roomy)["fast"]) == 7


@pytest.mark.parametrize(
    ("swing", "longest", "rounds"),
    [(0.0, 1e9, 10), (0.9, 1e9, 40), (0.9, None, 10), (0.9, 25.0, 13)],
)
def test_a_race_goes_on_while_its_ratios_are_not_settled(swing, longest, rounds):
    """One contender's samples swing between two values, as those of a heap that is at times trimmed."""

    class Swinging(ToldClock):
        def sample(self, run, calls):
            factor = 1 + swing * (run is slow) * (len(self.log) // 3 % 2)
            seconds = super().sample(run, calls) * factor
            self.time += seconds - self.costs[run]
            return seconds

    clock = Swinging({fast: 1.0, slow: 1.0})
    limits = Limits(seconds=0.0, least_rounds=10, most_rounds=10, longest=longest)
    samples = race([Contender("fast", fast), Contender("slow", slow)], clock, limits)
    assert len(samples["fast"]) == pytest.approx(rounds, abs=4 if longest == 25.0 else 0)


def test_the_interval_of_a_median_covers_it_in_19_of_20_draws():
    numpy = pytest.importorskip("numpy")
    draws = numpy.sort(numpy.random.default_rng(0).standard_exponential((2000, 31)), axis=1)
    intervals = [timing.median_interval(list(own)) for own in draws]
    covered = sum(low <= numpy.log(2) <= high for low, high in intervals) / len(intervals)
    assert 0.93 < covered < 0.99


def test_a_tiny_call_is_repeated_until_a_sample_is_long_enough():
    clock = ToldClock({fast: 1e-5, slow: 1.0})
    race([Contender("fast", fast), Contender("slow", slow)], clock, Limits(seconds=0.0, sample_seconds=2e-3))
    assert set(clock.log[-4:]) == {(fast, 200), (slow, 1)}


def test_contexts_surround_samples_and_are_left():
    depth, seen = [], []

    @contextmanager
    def inside():
        depth.append(1)
        yield
        depth.pop()

    def run():
        seen.append(len(depth))

    race([Contender("run", run, inside)], HostClock(), Limits(seconds=0.0, least_rounds=2, most_calls=3))
    assert set(seen) == {1}
    assert not depth

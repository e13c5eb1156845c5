"""The ground truth: uninstrumented runs in both modes at equal seeds, compared leaf by leaf."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from modeprobe.probe.call import Call, Run, without_frames
from modeprobe.probe.leaves import Comparison, compare, flatten
from modeprobe.probe.randomness import (
    RandomState,
    generator_state,
    private_generators,
    reseed_generator,
    seed_everything,
)
from modeprobe.probe.state import reachable
from modeprobe.probe.workbench import Workbench

SEEDS = (20011, 20021, 20023)
_MODES = (True, False)


@dataclass
class Observation:
    """Runs and what their comparison says.

    effect: train against eval at equal seeds, the largest difference over the seeds.
    rare: an effect too rare for these seeds was found by setting a coin.
    by_seed: for each mode, one seed against another; repeated: for each mode, one seed against itself.
    """

    runs: list[Run] = field(default_factory=list)
    effect: Comparison | None = None
    by_seed: dict[bool, Comparison] = field(default_factory=dict)
    repeated: dict[bool, Comparison] = field(default_factory=dict)
    rare: bool = False

    def first(self, mode: bool) -> Run | None:
        """The first run in this mode that did not raise, or the first."""
        runs = [run for run in self.runs if run.mode is mode]
        return next((run for run in runs if run.error is None), runs[0] if runs else None)

    def sometimes(self, mode: bool) -> bool:
        """Whether runs in this mode raise with one seed and not with another."""
        return len({run.error is None for run in self.runs if run.mode is mode}) == 2

    @property
    def seed(self) -> int:
        """The first seed with which both modes ran."""
        ran = {
            mode: {run.seed for run in self.runs if run.mode is mode and run.error is None} for mode in _MODES
        }
        return next((seed for seed in SEEDS if seed in ran[True] & ran[False]), SEEDS[0])

    @property
    def without_values(self) -> bool:
        """Whether outputs are on the meta device, with shapes only."""
        leaves = next((run.leaves for run in self.runs if run.leaves), {})
        return any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves.values())

    def is_random(self, mode: bool) -> bool:
        by_seed, repeated = self.by_seed.get(mode), self.repeated.get(mode)
        if self.sometimes(mode):
            return True
        if by_seed is None:
            return False
        # A change within round-off is chance too when the same seed gives the same bits.
        bitwise = not by_seed.same and repeated is not None and repeated.same
        return by_seed.differs or bitwise or (repeated is not None and repeated.differs)

    def is_reproducible(self, mode: bool) -> bool:
        return mode not in self.repeated or not self.repeated[mode].differs


def run_once(
    bench: Workbench, call: Call, mode: bool, seed: int, inspect: bool = False, wide: bool = False
) -> Run:
    """One run of a fresh model. inspect: compare its state before and after; wide: compute in float64."""
    run = Run(mode, seed)
    with bench.fresh() as lent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if wide:
                lent.model.double()
            run.phase = "train()" if mode else "eval()"
            lent.model.train(mode) if mode else lent.model.eval()
            if inspect:
                run.toggled = lent.changed()
            seed_everything(seed)
            private = private_generators(reachable([lent.model]))
            for generator in private if seed != SEEDS[0] else ():
                reseed_generator(generator, seed)
            before = [generator_state(generator) for generator in private]
            state = RandomState()
            run.phase = "forward"
            output = call.wide(lent.model) if wide else call(lent.model)
            run.streams = state.moved()
            if before != [generator_state(generator) for generator in private]:
                run.streams = (*run.streams, "the model's own generator")
            run.phase = "reading the output"
            run.leaves = flatten(output)
            if inspect:
                run.mutated = tuple(name for name in lent.changed() if name not in run.toggled)
        except Exception as error:
            run.error = without_frames(error)
    return run


def observe(bench: Workbench, call: Call, tick: Callable[[str], None] = lambda text: None) -> Observation:
    seen = Observation()
    by: dict[tuple[bool, int], Run] = {}
    for mode in _MODES:
        inspect = True
        for index, seed in enumerate(SEEDS):
            tick(f"{'train' if mode else 'eval'} mode, seed {index + 1} of {len(SEEDS)}")
            run = run_once(bench, call, mode, seed, inspect)
            if run.error is not None and not call.grad_enabled and not by:
                call.grad_enabled = True  # a model that differentiates inside its forward needs it
                retry = run_once(bench, call, mode, seed, inspect)
                if retry.error is None:
                    run = retry
                else:
                    call.grad_enabled = False
            seen.runs.append(run)
            by[mode, seed] = run
            inspect = inspect and run.error is not None
            if run.error is not None and index:
                break
        outcomes = [run for (m, _), run in by.items() if m is mode and run.leaves is not None]
        if len(outcomes) > 1:
            seen.by_seed[mode] = _largest([_compare(outcomes[0], other) for other in outcomes[1:]])
            if not seen.by_seed[mode].same:
                again = run_once(bench, call, mode, outcomes[0].seed)
                if again.leaves is not None:
                    seen.repeated[mode] = _compare(outcomes[0], again)
    pairs = [(by.get((True, seed)), by.get((False, seed))) for seed in SEEDS]
    compared = [_compare(a, b) for a, b in pairs if a and b and a.leaves is not None and b.leaves is not None]
    if compared:
        seen.effect = _largest(compared)
        doubtful = not seen.effect.differs or seen.effect.amount < _SUSPECT
        if doubtful and not seen.effect.same and not seen.effect.structural:
            seen.effect = _in_float64(bench, call) or seen.effect
    return seen


# A relative difference below this may be rounding, however it accumulated: float64 tells.
_SUSPECT = 1e-3


def _in_float64(bench: Workbench, call: Call) -> Comparison | None:
    """Train against eval in float64, where rounding shrinks and a real difference does not."""
    if bench.strategy != "copy":
        return None
    runs = [run_once(bench, call, mode, SEEDS[0], wide=True) for mode in _MODES]
    if any(run.error is not None for run in runs):
        return None
    assert runs[0].leaves is not None
    assert runs[1].leaves is not None
    return compare(runs[0].leaves, runs[1].leaves, tolerance=1e-9)


def _compare(a: Run, b: Run) -> Comparison:
    assert a.leaves is not None
    assert b.leaves is not None
    return compare(a.leaves, b.leaves)


def _largest(comparisons: list[Comparison]) -> Comparison:
    return max(comparisons, key=lambda c: (c.differs, c.structural, c.amount))

"""The ground truth: uninstrumented runs in both modes at equal seeds, compared leaf by leaf."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from modeprobe.probe.call import Call, Run
from modeprobe.probe.leaves import Comparison, compare, flatten
from modeprobe.probe.randomness import RandomState, seed_everything
from modeprobe.probe.workbench import Workbench

SEEDS = (20011, 20021, 20023)


@dataclass
class Observation:
    """Runs and what their comparison says.

    effect: train against eval at equal seeds, the largest difference over the seeds.
    by_seed: for each mode, one seed against another; repeated: for each mode, one seed against itself.
    """

    runs: list[Run] = field(default_factory=list)
    effect: Comparison | None = None
    by_seed: dict[bool, Comparison] = field(default_factory=dict)
    repeated: dict[bool, Comparison] = field(default_factory=dict)

    def first(self, mode: bool) -> Run | None:
        return next((run for run in self.runs if run.mode is mode), None)

    def is_random(self, mode: bool) -> bool:
        return any(mode in table and table[mode].differs for table in (self.by_seed, self.repeated))

    def is_reproducible(self, mode: bool) -> bool:
        return mode not in self.repeated or not self.repeated[mode].differs


def run_once(bench: Workbench, call: Call, mode: bool, seed: int, inspect: bool = False) -> Run:
    run = Run(mode, seed)
    with bench.fresh() as lent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run.phase = "train()" if mode else "eval()"
            lent.model.train(mode) if mode else lent.model.eval()
            if inspect:
                run.toggled = lent.changed()
            seed_everything(seed)
            state = RandomState()
            run.phase = "forward"
            output = call(lent.model)
            run.streams = state.moved()
            run.phase = "reading the output"
            run.leaves = flatten(output)
            if inspect:
                run.mutated = tuple(name for name in lent.changed() if name not in run.toggled)
        except Exception as error:
            run.error = error
    return run


def observe(bench: Workbench, call: Call, tick: Callable[[str], None] = lambda text: None) -> Observation:
    seen = Observation()
    by: dict[tuple[bool, int], Run] = {}
    for mode in (True, False):
        for index, seed in enumerate(SEEDS):
            tick(f"{'train' if mode else 'eval'} mode, seed {index + 1} of {len(SEEDS)}")
            run = run_once(bench, call, mode, seed, inspect=index == 0)
            if run.error is not None and not call.grad_enabled and not by:
                call.grad_enabled = True  # a model that differentiates inside its forward needs it
                retry = run_once(bench, call, mode, seed, inspect=index == 0)
                if retry.error is None:
                    run = retry
                else:
                    call.grad_enabled = False
            seen.runs.append(run)
            by[mode, seed] = run
            if run.error is not None:
                break
        outcomes = [run for (m, _), run in by.items() if m is mode and run.leaves is not None]
        if len(outcomes) > 1:
            seen.by_seed[mode] = _largest([_compare(outcomes[0], other) for other in outcomes[1:]])
            if not seen.by_seed[mode].same:
                again = run_once(bench, call, mode, SEEDS[0])
                if again.leaves is not None:
                    seen.repeated[mode] = _compare(outcomes[0], again)
    pairs = [(by.get((True, seed)), by.get((False, seed))) for seed in SEEDS]
    compared = [_compare(a, b) for a, b in pairs if a and b and a.leaves is not None and b.leaves is not None]
    if compared:
        seen.effect = _largest(compared)
    return seen


def _compare(a: Run, b: Run) -> Comparison:
    assert a.leaves is not None
    assert b.leaves is not None
    return compare(a.leaves, b.leaves)


def _largest(comparisons: list[Comparison]) -> Comparison:
    return max(comparisons, key=lambda c: (c.differs, c.structural, c.amount))

"""Does a local effect reach the model's outputs? One site at a time is switched, everything else held fixed.

All runs are seeded per event, so switching one site changes no other draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modeprobe.probe.call import Call, told, without_frames
from modeprobe.probe.events import Key, Trace
from modeprobe.probe.instrument import set_flag
from modeprobe.probe.leaves import Comparison, compare, flatten, indices_changed
from modeprobe.probe.local import Finding
from modeprobe.probe.randomness import seed_everything
from modeprobe.probe.trace import Control, Tracer
from modeprobe.probe.workbench import Workbench

_SALT = 11
_MORE = 2


@dataclass
class Outcome:
    leaves: dict[str, Any]
    trace: Trace


class Reach:
    """Runs of the whole model with single sites switched.

    flags: the mode of every module after train() and after eval(), by path.
    """

    def __init__(
        self,
        bench: Workbench,
        call: Call,
        flags: Mapping[bool, Mapping[str, bool]],
        draws: set[str],
        below: bool,
    ) -> None:
        self.bench, self.call, self.flags, self.draws, self.below = bench, call, flags, draws, below
        self._base: dict[tuple[bool, bool], Outcome] = {}

    def run(
        self,
        mode: bool,
        changed: Mapping[str, bool],
        control: Control | None = None,
        plain: bool = False,
        seed: int = _SALT,
    ) -> Outcome:
        """seed: for draws that cannot be seen; the others have seeds of their own."""
        control = control or Control(_SALT)
        control.draws = self.draws
        with self.bench.fresh() as lent, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lent.model.train(mode)
            modules = dict(lent.model.named_modules())
            for path, flag in changed.items():
                set_flag(modules[path], flag)
            seed_everything(seed)
            tracer = Tracer(lent.model, Control() if plain else control, not plain, self.below and not plain)
            try:
                if plain:
                    leaves = flatten(self.call(lent.model))
                else:
                    with tracer.active():
                        leaves = flatten(self.call(lent.model))
            except Exception as error:
                leaves = {"": f"raised {told(error)}"}
                tracer.trace.error = without_frames(error)
        return Outcome(leaves, tracer.trace)

    def base(self, mode: bool, plain: bool = False) -> Outcome:
        if (mode, plain) not in self._base:
            self._base[mode, plain] = self.run(mode, {}, plain=plain)
        return self._base[mode, plain]

    def effect(self) -> Comparison:
        """Train against eval with every event seeded by its call site."""
        return compare(self.base(True).leaves, self.base(False).leaves)

    def is_reproducible(self) -> bool:
        """Whether eval mode gives the same outputs twice when every event has its own seed."""
        return not compare(self.run(False, {}).leaves, self.base(False).leaves).differs

    def kept_elsewhere(self) -> bool:
        """Whether train() still differs from eval() when every flag is as in eval mode."""
        run = self.run(True, self.flags[False])
        return run.trace.error is None and compare(run.leaves, self.base(False).leaves).differs

    def of(self, finding: Finding) -> Comparison | None:
        """The change at the outputs that this finding makes, or None."""
        owners = {path: self.flags[False][path] for path in finding.owners}
        if finding.plain:
            flipped = {path: self.flags[True][path] for path in finding.owners}
            change = compare(self.run(False, flipped, plain=True).leaves, self.base(False, plain=True).leaves)
            return change if change.differs else None
        keys = frozenset(finding.events)
        if finding.forced is not None:
            change = self._of_forced(keys)
            return None if change.same else change
        if finding.only_cause or not keys:
            without = self.run(True, owners)
        else:
            without = self.run(True, {}, _switch(finding.events))
        change = compare(without.leaves, self.base(True).leaves)
        if not change.same:
            return change
        flipped = {path: self.flags[True][path] for path in finding.owners}
        change = compare(self.run(False, flipped).leaves, self.base(False).leaves)
        if change.same and finding.varies:  # the draws of these runs may have dropped nothing
            change = self._of_forced(keys)
            change = self._of_other_draws(keys) if change.same else change
        return None if change.same else change

    def _of_other_draws(self, keys: frozenset[Key]) -> Comparison:
        """The change when these call sites, and draws that cannot be seen, take other values."""
        runs = (
            self.run(True, {}, Control(_SALT, resalt=dict.fromkeys(keys, salt)), seed=salt)
            for salt in range(_SALT + 1, _SALT + 1 + _MORE)
        )
        changes = (compare(run.leaves, self.base(True).leaves) for run in runs)
        return next((change for change in changes if not change.same), Comparison((), 0))

    def _of_forced(self, keys: frozenset[Key]) -> Comparison:
        low, high = (self.run(True, {}, Control(_SALT, force=force, forced=keys)) for force in (0, 1))
        return compare(low.leaves, high.leaves)

    def one_sample_each(self, finding: Finding) -> bool:
        """Whether each value of the masks acts on one sample: on one index of some axis of every output.

        A scalar output tells nothing; then the shape of the mask decides.
        """
        keys = frozenset(finding.events)
        owners = {path: self.flags[True][path] for path in finding.owners}
        mode = not owners  # a flag kept elsewhere needs train()
        runs = [
            self.run(mode, owners, Control(_SALT, force=1, forced=keys, single=single))
            for single in (False, True)
        ]
        pairs = [
            (runs[0].leaves[path], leaf) for path, leaf in runs[1].leaves.items() if path in runs[0].leaves
        ]
        changed = [indices_changed(a, b) for a, b in pairs]
        return all(1 in per_axis for per_axis in changed if per_axis)

    def of_events(self, mode: bool, events: Mapping[Key, list]) -> Comparison | None:
        """The change at the outputs when these call sites are silenced, or draw other values."""
        change = compare(self.run(mode, {}, _switch(events)).leaves, self.base(mode).leaves)
        return None if change.same else change

    def of_draws(self, mode: bool, keys: frozenset[Key]) -> Comparison | None:
        """The change at the outputs when these call sites draw other values."""
        change = compare(
            self.run(mode, {}, Control(_SALT, resalt=dict.fromkeys(keys, _SALT + 1))).leaves,
            self.base(mode).leaves,
        )
        return None if change.same else change


def _switch(events: Mapping[Key, list]) -> Control:
    drawn = frozenset(key for key in events if key.kind in ("draw", "reseed"))
    return Control(_SALT, silent=frozenset(events) - drawn, resalt=dict.fromkeys(drawn, _SALT + 1))

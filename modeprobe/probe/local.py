"""Causes at one module: which of its mode-dependent events change its own output."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from modeprobe.probe.depth import drops_branch, leaves_out_layers, mask_axis
from modeprobe.probe.events import Event, Key, Place, Trace
from modeprobe.probe.leaves import Comparison, compare
from modeprobe.probe.replay import SALT, ReplayBench, Variant

_SILENCEABLE = frozenset({"dropout", "attention", "depth", "statistics"})
_UNSILENCED = frozenset({"random_noise", "stochastic_depth"})
_MORE_SALTS = range(SALT + 1, SALT + 9)
_ENOUGH = 4  # other draws, to see what a chance that changes the output does to the layers

Events = dict[Key, list[Event]]


@dataclass
class Finding:
    """One cause at one module that reads the mode, with a measured effect on the module's own output.

    events: the calls behind it by call site (none for a branch). plain: visible only without interception.
    forced: a scalar draw had to be set to its lowest (0) or highest (1) value to see it.
    varies: other draws gave another output.
    """

    path: str
    owners: frozenset[str]
    cause: str
    amount: float
    events: Events = field(default_factory=dict)
    plain: bool = False
    forced: int | None = None
    detail: str = ""
    place: Place | None = None
    only_cause: bool = True
    varies: bool = False


class LocalJudge:
    """Compares replays of one call: `flipped` (mode as in training) against `steady` (eval)."""

    def __init__(self, bench: ReplayBench, path: str, owners: frozenset[str]) -> None:
        self.bench, self.path, self.owners = bench, path, owners
        self.flipped, self.steady = bench.variant(True), bench.variant(False)
        self.redrawn: list[Variant] = []
        self.added = added_events(self.flipped.trace, self.steady.trace)
        self.silent = frozenset(key for key in self.added if key.kind in _SILENCEABLE)

    def findings(self) -> list[Finding]:
        change = differs(self.flipped, self.steady, exact=True)
        if change and self._is_plain_layer():
            return [self._finding(self.word(next(iter(self.added))), self.added, change)]
        self.unseen = tuple(s for s in self.flipped.unseen if s not in self.steady.unseen)
        if not change and not self.added and not self.unseen:
            self.quiet = self.flipped
            return self._gated_coins() or self._unintercepted()
        self.quiet = self.bench.variant(True, silent=self.silent) if self.silent else self.flipped
        self.residue = differs(self.quiet, self.steady, exact=True)
        found = self._silenceable(change) + self._drawn() + self._gated_coins()
        if self.residue:
            if not any(f.cause in _UNSILENCED or f.events.keys() - self.silent for f in found):
                found += self._remainder(self.residue)
            elif self._structure_alone():
                found.append(self._finding("branch", {}, self.residue))
        for finding in found:
            finding.only_cause = len(found) == 1
        return found

    def _silenceable(self, change: Comparison | None) -> list[Finding]:
        groups: dict[str, Events] = {}
        for key in self.silent:
            groups.setdefault(self.word(key), {})[key] = self.added[key]
        if len(groups) == 1 and not self.residue:
            word, events = next(iter(groups.items()))
            return [self._finding(word, events, change)] if change else []
        found = []
        for word, events in groups.items():
            alone = self.bench.variant(True, silent=self.silent - events.keys())
            effect = differs(alone, self.quiet, exact=True)
            if effect:
                found.append(self._finding(word, events, effect))
        return found

    def _drawn(self) -> list[Finding]:
        """Events that cannot be silenced: draws, reseeding, scripted dropout, private generators."""
        found: list[Finding] = []
        for word, events in self._by_use().items():
            finding = self._draw_effect(word, events)
            if finding:
                found.append(finding)
        if self.unseen and not found:
            found += self._unseen_draws()
        return found

    def _unseen_draws(self) -> list[Finding]:
        variants = [
            self.quiet,
            *(
                self.bench.variant(True, silent=self.silent, salt=salt)
                for salt in _MORE_SALTS
                if not self.bench.exhausted
            ),
        ]
        self.redrawn += variants
        changes = [differs(v, self.steady, exact=True) for v in variants]
        change = next((c for c in changes if c), None)
        if change is None:
            return []
        finding = self._finding(
            self._depth_or_noise(variants), {}, change, f"draws from {', '.join(self.unseen)}"
        )
        finding.varies = any(differs(v, self.quiet, exact=True) for v in variants[1:])
        return [finding]

    def _gated_coins(self) -> list[Finding]:
        """Coins drawn in both modes whose outcome only counts in one."""
        coins = {
            key: events
            for key, events in self.flipped.trace.active().items()
            if key.kind == "draw"
            and key.path == self.path
            and key not in self.added
            and all(event.coin for event in events)
        }
        if not coins:
            return []
        keys = frozenset(coins)
        on, off = (
            [self.bench.variant(mode, silent=silent, force=force, forced=keys) for force in (0, 1)]
            for mode, silent in ((True, self.silent), (False, frozenset()))
        )
        changes = [differs(a, b, exact=True) for a, b in zip(on, off, strict=True)]
        change = changes[0] or changes[1]
        if change is None or (changes[0] and changes[1]):
            return []  # the mode counts however the coin falls
        finding = self._finding(self._depth_or_noise(on, coin=True), coins, change)
        finding.forced, finding.varies = (0 if changes[0] else 1), True
        return [finding]

    def _by_use(self) -> dict[str, Events]:
        groups: dict[str, Events] = {}
        for key, events in self.added.items():
            if key in self.silent or key.kind == "statistics":
                continue
            if key.kind != "draw" or isinstance(self.bench.module, _DropoutNd):
                word = self.word(key)
            elif all(mask_axis(event) is not None for event in events):
                word = "stochastic_depth"
            elif all(e.coin for e in events):
                word = "coin"
            else:
                word = "random_noise"
            groups.setdefault(word, {})[key] = events
        return groups

    def _draw_effect(self, word: str, events: Events) -> Finding | None:
        if any(key.kind != "draw" for key in events) or word == "module_dropout":
            return self._finding(word, events, self.residue) if self.residue else None
        scalar = all(event.scalar for group in events.values() for event in group)
        forced = self._forced(word, events) if scalar or word == "coin" else None
        if forced:
            return forced
        runs, change = [self.quiet], None
        for salt in _MORE_SALTS:
            if self.bench.exhausted:
                break
            runs.append(self._redrawn(events, salt))
            change = change or differs(runs[-1], self.quiet, exact=True)
            self.redrawn.append(runs[-1])
            layers = [run.trace.layers for run in (self.steady, *runs)]
            if change and (layers[1:] == layers[:-1] or len(runs) > _ENOUGH):
                break
        if change:
            word = word if word == "stochastic_depth" else self._depth_or_noise(runs)
            finding = self._finding(word, events, change)
            finding.varies = True
            return finding
        if word != "stochastic_depth":
            return None
        rare = None if scalar else self._forced(word, events)
        return rare or (self._finding(word, events, self.residue) if self.residue else None)

    def _forced(self, word: str, events: Events) -> Finding | None:
        """The effect of draws set to their lowest or highest values, however rarely they fall so."""
        for force in (0, 1):
            forced = self.bench.variant(True, silent=self.silent, force=force, forced=frozenset(events))
            change = differs(forced, self.quiet, exact=True)
            if change:
                if word == "coin":
                    word = self._depth_or_noise([forced, self.quiet], coin=True)
                finding = self._finding(word, events, change)
                finding.forced, finding.varies = force, True
                return finding
        return None

    def _redrawn(self, events: Events, salt: int) -> Variant:
        return self.bench.variant(True, silent=self.silent, resalt=dict.fromkeys(events, salt))

    def _depth_or_noise(self, runs: list[Variant], coin: bool = False) -> str:
        """What chance does that changes between these runs. coin: whether it has one value at a time."""
        depth = leaves_out_layers(runs, self.steady, self.path) or (
            coin and any(drops_branch(run, self.steady, self.bench.arguments) for run in runs)
        )
        return "stochastic_depth" if depth else "random_noise"

    def _remainder(self, residue: Comparison) -> list[Finding]:
        """A change that dropout, statistics and draws do not account for."""
        unsilenced = {
            key: events
            for key, events in self.added.items()
            if key.kind == "statistics"
            and (
                key not in self.silent
                or any(e.key == key and not e.silenced for e in self.quiet.trace.events)
            )
        }
        if unsilenced or isinstance(self.bench.module, (_BatchNorm, _InstanceNorm)):
            return [self._finding("batch_statistics", unsilenced, residue)]
        if self._normalises_by_hand():
            return [
                self._finding("batch_statistics", {}, residue, "statistics of the batch, then stored ones")
            ]
        salt = _MORE_SALTS[0]
        varied = differs(self.bench.variant(True, silent=self.silent, salt=salt), self.quiet, exact=False)
        if varied and not differs(self.bench.variant(False, salt=salt), self.steady, exact=False):
            drawn = {k: e for k, e in self.flipped.trace.active().items() if k.kind == "draw"}
            return [self._finding("random_noise", drawn, residue, "draws whose use depends on the mode")]
        return [self._finding("branch", {}, residue)]

    def _normalises_by_hand(self) -> bool:
        """Buffers (a mean, a variance) that training writes and ignores, and eval uses."""
        stored = frozenset(self.quiet.written) - frozenset(self.steady.written)
        if not stored:
            return False
        training = self.bench.variant(True, silent=self.silent, shifted=stored)
        evaluation = self.bench.variant(False, shifted=stored)
        uses = differs(evaluation, self.steady, exact=False)
        return uses is not None and not differs(training, self.quiet, exact=False)

    def _structure_alone(self) -> bool:
        """Whether the output has other parts than in eval mode, and the same ones however the draws fall."""
        keys = frozenset(key for key, events in self.added.items() if all(event.coin for event in events))
        others = [self.bench.variant(True, silent=self.silent, force=force, forced=keys) for force in (0, 1)]
        runs = (self.quiet, *self.redrawn, *others)
        return all(_other_parts(run, self.steady) and not _other_parts(run, self.quiet) for run in runs)

    def _unintercepted(self) -> list[Finding]:
        """Code that interception of functions hides, such as fused fast paths."""
        if any(event.active and event.kind != "statistics" for event in self.flipped.trace.events):
            return []
        on, off = self.bench.variant(True, functions=False), self.bench.variant(False, functions=False)
        change = differs(on, off, exact=False)
        if not change:
            return []
        finding = self._finding("branch", {}, change)
        finding.plain = True
        return [finding]

    def _is_plain_layer(self) -> bool:
        """A layer of torch.nn with one kind of event has nothing else behind its flag."""
        module, kinds = self.bench.module, {key.kind for key in self.added}
        if isinstance(module, _DropoutNd):
            return bool(kinds) and "statistics" not in kinds
        return (
            len(kinds) == 1
            and kinds <= _SILENCEABLE
            and all(key.path == self.path for key in self.added)
            and isinstance(module, (_BatchNorm, _InstanceNorm, nn.RNNBase, nn.MultiheadAttention))
        )

    def word(self, key: Key) -> str:
        owner = self.added[key][0].module_type
        if isinstance(self.bench.module, _DropoutNd) or issubclass(owner, _DropoutNd):
            return "module_dropout"
        return WORDS.get(key.kind, "random_noise")

    def _finding(self, cause: str, events: Events, change: Comparison | None, detail: str = "") -> Finding:
        if not detail and change and cause == "branch":
            first = next((d for d in change.differences if d.kind != "roundoff"), None)
            detail = f"output{first.path}: {first.kind} {first.detail}".strip() if first else ""
        return Finding(
            self.path, self.owners, cause, change.amount if change else 0.0, dict(events), detail=detail
        )


WORDS = {
    "dropout": "functional_dropout",
    "attention": "attention_dropout",
    "depth": "stochastic_depth",
    "statistics": "batch_statistics",
}


def added_events(flipped: Trace, steady: Trace) -> Events:
    """Active events of the first trace that the second does not have."""
    before = steady.active()
    return {
        key: events[len(before.get(key, ())) :]
        for key, events in flipped.active().items()
        if len(events) > len(before.get(key, ()))
    }


def _other_parts(a: Variant, b: Variant) -> bool:
    """Whether one output has parts that the other has not; other shapes are no other parts."""
    return any(d.kind in ("type", "extra", "missing") for d in compare(a.leaves, b.leaves).differences)


def differs(a: Variant, b: Variant, exact: bool) -> Comparison | None:
    """The comparison if the outputs differ, else None. exact: round-off counts as a difference."""
    comparison = compare(a.leaves, b.leaves)
    return comparison if (not comparison.same if exact else comparison.differs) else None

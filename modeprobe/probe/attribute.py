"""Which places in the model the difference comes from: trace, replay locally, follow to the outputs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from modeprobe.probe.call import Call, told, without_frames
from modeprobe.probe.depth import mask_axis
from modeprobe.probe.events import Trace
from modeprobe.probe.instrument import flag_of
from modeprobe.probe.leaves import Comparison, compare
from modeprobe.probe.local import WORDS, Events, Finding, LocalJudge, added_events
from modeprobe.probe.randomness import seed_everything
from modeprobe.probe.reach import Reach
from modeprobe.probe.replay import ReplayBench, Setting
from modeprobe.probe.state import reachable
from modeprobe.probe.trace import Control, Tracer, flags_of
from modeprobe.probe.workbench import Workbench, named_tensors

_CALLS_REPLAYED = 3
# Of the sites with the same cause at the same line (repeated layers) this many are followed one by one.
_ALIKE = 5
_BISECTED = 300


@dataclass
class Located:
    """A finding and the change it makes at the model's outputs (None: it does not reach them)."""

    finding: Finding
    change: Comparison | None


@dataclass
class Attribution:
    """traces: by mode. located: findings at modules that read their mode, or at events without a reader.
    ungated: events active in eval mode whose draws reach the outputs.
    """

    traces: dict[bool, Trace] = field(default_factory=dict)
    located: list[Located] = field(default_factory=list)
    ungated: Events = field(default_factory=dict)
    readers: dict[str, frozenset[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Attributor:
    def __init__(
        self,
        bench: Workbench,
        call: Call,
        seed: int,
        mutated: frozenset[str],
        tick: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.bench, self.call, self.seed, self.mutated, self.tick = bench, call, seed, mutated, tick
        self.draws: set[str] = set()
        self.gap = False
        self.below = _has_scripts(bench.model)
        self.found = Attribution()

    def trace(self) -> None:
        self._trace()
        if self.gap and not self.below:
            self.below = True
            self._trace()
        self.found.readers = self._readers()

    def _trace(self) -> None:
        for mode in (True, False):
            self.tick(f"tracing {'train' if mode else 'eval'} mode")
            self.found.traces[mode] = self._traced(mode)

    def _traced(self, mode: bool) -> Trace:
        with self.bench.fresh() as lent, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracer = Tracer(lent.model, Control(draws=self.draws), below=self.below)
            try:
                lent.model.train(mode)
                tracer.trace.flags = flags_of(lent.model)
                seed_everything(self.seed)
                with tracer.active():
                    self.call(lent.model)
            except Exception as error:
                tracer.trace.error = without_frames(error)
            self.gap = self.gap or tracer.gap
        return tracer.trace

    def _readers(self) -> dict[str, frozenset[str]]:
        """Modules during whose forward a mode is read that train() and eval() set differently."""
        train, evaluation = self.found.traces[True], self.found.traces[False]
        toggled = {path for path, flag in train.flags.items() if evaluation.flags.get(path) is not flag}
        readers: dict[str, set[str]] = {}
        for read in (*train.reads, *evaluation.reads):
            if read.owner in toggled:
                readers.setdefault(read.path if read.path is not None else "", set()).add(read.owner)
        for path, kind in train.types.items():
            if issubclass(kind, torch.jit.ScriptModule) and path in toggled:
                inside = {p for p in toggled if p == path or p.startswith(path + "." if path else "")}
                readers.setdefault(path, set()).update(inside)
        return {path: frozenset(owners) for path, owners in readers.items()}

    def replay(self) -> tuple[list[Finding], set]:
        """Local findings at every reader, and all call sites that some reader accounts for."""
        findings: list[Finding] = []
        explained: set = set()
        todo = dict.fromkeys(self.found.readers, _CALLS_REPLAYED)
        total = len(todo)

        with self.bench.fresh() as lent, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lent.model.eval()
            modules = dict(lent.model.named_modules())
            setting = Setting(
                {module: flag_of(module) for module in modules.values()},
                {id(t) for name, t in named_tensors(lent.model).items() if name in self.mutated},
                self.draws,
                self.call,
                self.below,
                lent.twins(),
            )
            lent.model.train()

            reads = self.found.traces[True].reads
            places = {read.path: read.place for read in reversed(list(reads)) if read.path is not None}

            def visit(
                tracer: Tracer, path: str, module: nn.Module, run: Callable[[], Any], arguments: Any
            ) -> None:
                owners = self.found.readers[path]
                self.tick(f"replaying modules that read their mode ({total - len(todo) + 1} of {total})")
                flags = {modules[owner]: flag_of(modules[owner]) for owner in owners}
                todo[path] -= 1
                try:
                    bench = ReplayBench(tracer, module, run, arguments, flags, setting)
                    judge = LocalJudge(bench, path, owners)
                    local = judge.findings()
                except Exception as error:
                    self.found.notes.append(f"{path} could not be replayed: {told(error)}")
                    del todo[path]
                    return
                # A gradient may differ where no output does: then the whole model has to tell.
                for finding in local:
                    finding.place = places.get(path)
                explained.update(k for f in local for k in f.events)
                if not self.call.gradients:
                    explained.update(judge.added)
                findings.extend(local)
                if local or not todo[path]:
                    del todo[path]

            tracer = _ReplayTracer(lent.model, todo, visit)
            seed_everything(self.seed)
            try:
                with tracer.active():
                    self.call(lent.model)
            except Exception as error:
                self.found.notes.append(f"replay in train mode: {told(error)}")
        return findings, explained

    def locate(self, findings: list[Finding], explained: set, eval_is_random: bool) -> Reach:
        train, evaluation = self.found.traces[True], self.found.traces[False]
        reach = Reach(
            self.bench, self.call, {True: train.flags, False: evaluation.flags}, self.draws, self.below
        )
        free = {k: e for k, e in added_events(train, evaluation).items() if k not in explained}
        groups: dict[str, Events] = {}
        for key, events in free.items():
            groups.setdefault(_word_without_reader(events[0]), {})[key] = events
        for word, group in groups.items():
            change = reach.of_events(True, group)
            for key, events in group.items():
                finding = Finding(key.path, frozenset(), word, 0.0, {key: events})
                self.found.located.append(Located(finding, change))
        alike: dict[tuple, list[Finding]] = {}
        for finding in findings:
            place = next((key.place for key in finding.events), None)
            alike.setdefault((finding.cause, place, train.types.get(finding.path)), []).append(finding)
        assumed = {id(f) for group in alike.values() for f in group[_ALIKE:-1]}
        for index, finding in enumerate(findings):
            if id(finding) in assumed:
                continue
            self.tick(f"following effects to the outputs ({index + 1} of {len(findings)})")
            if self.call.left < 8:  # one finding takes eight passes at most
                self.found.notes.append("some local effects were not followed to the outputs (cost limit)")
                rest = [f for f in findings[index:] if id(f) not in assumed]
                self.found.located += [Located(f, Comparison((), 0)) for f in rest]
                break
            self.found.located.append(Located(finding, reach.of(finding)))
        changes = {id(item.finding): item.change for item in self.found.located}
        for members in alike.values():
            reached = [changes[id(f)] for f in members if changes.get(id(f)) is not None]
            for finding in members:
                if id(finding) in assumed:
                    self.found.located.append(Located(finding, reached[0] if reached else None))
        self._check_masks(reach)
        order = {path: index for index, path in enumerate(train.calls)}
        self.found.located.sort(key=lambda item: order.get(item.finding.path, -1))
        if eval_is_random:
            self._ungated(reach)
        return reach

    def _check_masks(self, reach: Reach) -> None:
        """Masks along another axis than the first drop samples only if each value acts on one sample."""
        known: dict[tuple, bool] = {}
        for finding in (item.finding for item in self.found.located if item.change is not None):
            events = [event for group in finding.events.values() for event in group]
            if finding.cause == "stochastic_depth" and any(mask_axis(event) for event in events):
                alike = tuple((key.place, key.at) for key in finding.events)
                if alike not in known and self.call.left >= 2:
                    known[alike] = reach.one_sample_each(finding)
                if not known.get(alike, True):
                    finding.cause = "random_noise"

    def locate_without_values(self) -> None:
        """Sites by what is called, where there are no values to compare."""
        train, evaluation = self.found.traces[True], self.found.traces[False]
        for key, events in added_events(train, evaluation).items():
            finding = Finding(key.path, frozenset(), _word_without_reader(events[0]), 0.0, {key: events})
            self.found.located.append(Located(finding, Comparison((), 0)))
        self.found.ungated = {
            k: e for k, e in evaluation.active().items() if k.kind not in ("statistics", "reseed")
        }
        self.found.notes.append("meta tensors have no values: judged by the calls made, not by their effect")

    def bisect(self, flags: bool) -> list[Finding]:
        """The smallest modules whose own train() and eval() change their output, when no read tells.

        For a mode that is kept elsewhere than in `training`. flags: whether `training` itself may count, too.
        """
        differing: dict[str, Comparison] = {}
        with self.bench.fresh() as lent, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lent.model.train()
            paths = [path for path in self.found.traces[True].calls if "<" not in path]
            twins = lent.twins()
            setting = Setting({}, set(twins), self.draws, self.call, twins=twins)

            def visit(
                tracer: Tracer, path: str, module: nn.Module, run: Callable[[], Any], arguments: Any
            ) -> None:
                del todo[path]
                replay = ReplayBench(tracer, module, run, arguments, {}, setting)
                change = compare(replay.toggled(True, flags), replay.toggled(False, flags))
                if change.differs:
                    differing[path] = change

            todo = dict.fromkeys(paths[:_BISECTED], 1)
            tracer = _ReplayTracer(lent.model, todo, visit)
            seed_everything(self.seed)
            with contextlib.suppress(Exception), tracer.active():
                self.call(lent.model)
        smallest = [
            path
            for path in differing
            if not any(other.startswith(path + "." if path else "") for other in differing if other != path)
        ]
        return [
            Finding(
                path,
                frozenset(),
                "branch",
                differing[path].amount,
                detail="mode kept elsewhere than in .training",
            )
            for path in smallest
        ]

    def _ungated(self, reach: Reach) -> None:
        for key, events in self.found.traces[False].active().items():
            if key.kind == "statistics" or key.kind == "reseed":
                continue
            if self.call.left < 2 or reach.of_draws(False, frozenset({key})):
                self.found.ungated[key] = events


class _ReplayTracer(Tracer):
    """Lets the model run as it is and stops at the first calls of the modules to replay.

    visit: called with this tracer, which it must not hold: a cycle would keep the copy of the model alive.
    """

    def __init__(self, model: nn.Module, todo: dict[str, int], visit: Callable[..., None]) -> None:
        super().__init__(model, functions=False)
        self.todo, self.visit = todo, visit

    def on_read(self, owner: nn.Module) -> None:
        pass

    def on_call(self, module: nn.Module, args: tuple, kwargs: dict, run: Callable[..., Any]) -> Any:
        path = self.path(module)
        if path in self.todo:
            # Hooks of an activation checkpoint around this call must not see what its replays save.
            with torch.autograd.graph.saved_tensors_hooks(_same, _same):
                self.visit(self, path, module, lambda: module(*args, **kwargs), (args, kwargs))
        self.stack.append(module)
        try:
            return run(module, *args, **kwargs)
        finally:
            self.stack.pop()


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _has_scripts(model: nn.Module) -> bool:
    kinds = (torch.jit.ScriptModule, torch.jit.ScriptFunction)
    return any(isinstance(item, kinds) for item in reachable([model]))


def _word_without_reader(event: Any) -> str:
    if issubclass(event.module_type, _DropoutNd):
        return "module_dropout"
    if mask_axis(event) is not None:
        return "stochastic_depth"
    return WORDS.get(event.kind, "random_noise")

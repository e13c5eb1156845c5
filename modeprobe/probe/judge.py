"""From measurements to the answer: effect, randomness, causes, and everything beside them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from modeprobe.probe.attribute import Attribution, Located
from modeprobe.probe.call import told
from modeprobe.probe.events import Event, Key
from modeprobe.probe.generation import Generation
from modeprobe.probe.instrument import flag_of
from modeprobe.probe.observe import Observation
from modeprobe.probe.report import BatchNormInfo, Failure, Idle, Mutation, Part, Report, Site
from modeprobe.probe.verdict import verdict
from modeprobe.probe.workbench import Workbench

_WORD = {True: "train", False: "eval"}


def judge(bench: Workbench, seen: Observation, found: Attribution, generation: Generation | None) -> Report:
    model = bench.model
    report = Report(type(model).__name__, modules=sum(1 for _ in model.modules()))
    report.parameters = sum(parameter.numel() for parameter in model.parameters())
    reached = [item for item in found.located if item.change is not None]
    _effect(report, seen, reached)
    report.train_is_random = seen.is_random(True) or any(item.finding.varies for item in reached)
    report.eval_is_random = seen.is_random(False)
    if seen.without_values:
        report.train_is_random = any(_random(e) for e in found.traces[True].events)
        report.eval_is_random = any(_random(e) for e in found.traces[False].events)
    report.train_is_reproducible = seen.is_reproducible(True)
    report.eval_is_reproducible = seen.is_reproducible(False)
    if report.effect == "differs":
        report.sites = [_site(item) for item in reached]
        report.causes = frozenset(site.cause for site in report.sites) or frozenset({"opaque"})
        if not report.sites:
            report.notes.append(_opaque(found))
    report.ungated = [_ungated(key, events) for key, events in found.ungated.items()]
    report.idle = list(_idle(model, found, {site.path for site in report.sites}))
    report.readers = len(found.readers)
    report.mixed = [name for name, m in model.named_modules() if flag_of(m) is not flag_of(model)]
    report.mutations = list(_mutations(model, seen))
    report.batch_norms = [_norm(n, m, found) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]
    report.failures = _failures(seen)
    report.random_streams = sorted({s for run in seen.runs for s in run.streams})
    if generation is not None:
        report.generation_same = generation.same
        report.generation_detail = generation.detail
        report.checkpointing = generation.checkpointing
    if bench.strategy == "restore":
        report.notes.append(f"run on the model itself, with everything put back: {bench.reason}")
    report.notes += found.notes
    report.parts = list(_parts(model, report, found))
    report.verdict = verdict(report)
    return report


def _effect(report: Report, seen: Observation, reached: list[Located]) -> None:
    ran = {mode: (run := seen.first(mode)) is not None and run.error is None for mode in (True, False)}
    if seen.effect is not None:
        report.effect = "differs" if seen.effect.differs or seen.rare else "none"
        if seen.without_values:
            report.effect = "differs" if reached or seen.effect.differs else "none"
        report.amount = seen.effect.amount if report.effect == "differs" else 0.0
        report.output_differences = [d for d in seen.effect.differences if d.kind != "roundoff"]
        report.output_leaves = seen.effect.leaves
        report.main_output_same = _main_same(seen)
    elif ran[True] != ran[False]:
        report.effect = "differs"


def _main_same(seen: Observation) -> bool:
    """Whether the first tensor of the output is the same in both modes although something else is not."""
    run = seen.first(True)
    if seen.effect is None or not seen.effect.differs or run is None or not run.leaves:
        return False
    main = next((path for path, leaf in run.leaves.items() if isinstance(leaf, Tensor)), None)
    return main is not None and all(d.path != main or d.kind == "roundoff" for d in seen.effect.differences)


def _random(event: Event) -> bool:
    return event.active and event.kind in ("dropout", "attention", "depth", "draw")


def _opaque(found: Attribution) -> str:
    if not found.readers:
        return "no module reads its mode and no dropout, statistics or random call depends on it"
    return (
        "the modules that read their mode show no effect of their own; compiled or foreign code may hide it"
    )


def _site(item: Located) -> Site:
    finding = item.finding
    events = [event for group in finding.events.values() for event in group]
    place = next((key.place for key in finding.events), finding.place)
    p = next((event.p for event in events if event.p is not None), None)
    what = ", ".join(dict.fromkeys(key.name for key in finding.events)) or finding.detail
    path = next((key.path for key in finding.events), finding.path)
    file, line = place if place else ("", 0)
    reach = item.change.amount if item.change is not None else 0.0
    calls, owners = max(len(events), 1), tuple(sorted(finding.owners))
    return Site(path, what, finding.cause, p, file, line, ("train",), finding.amount, reach, calls, owners)


def _ungated(key: Key, events: list[Event]) -> Site:
    return Site(key.path, key.name, "", events[0].p, *key.place, ("train", "eval"), None, None, len(events))


def _idle(model: nn.Module, found: Attribution, active: set[str]) -> Iterator[Idle]:
    calls = found.traces[True].calls
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and name not in active:
            if module.p == 0:
                yield Idle(name, 0.0, "p = 0")
            elif not calls[name]:
                yield Idle(name, module.p, "never called")
            elif not found.traces[True].flags.get(name, True):
                yield Idle(name, module.p, "not in training mode")
            else:
                yield Idle(name, module.p, "does not reach the output")


def _kind(model: nn.Module, name: str) -> str:
    return "parameter" if name in dict(model.named_parameters()) else "buffer"


def _mutations(model: nn.Module, seen: Observation) -> Iterator[Mutation]:
    for mode in (True, False):
        run = seen.first(mode)
        if run is not None:
            yield from (Mutation(name, f"{_WORD[mode]}()", _kind(model, name)) for name in run.toggled)
            yield from (
                Mutation(name, f"forward in {_WORD[mode]} mode", _kind(model, name)) for name in run.mutated
            )


def _failures(seen: Observation) -> list[Failure]:
    found = [
        Failure(_WORD[run.mode], run.phase, told(run.error), seen.sometimes(run.mode))
        for run in seen.runs
        if run.error is not None
    ]
    return list(dict.fromkeys(found))


def _norm(name: str, module: _BatchNorm, found: Attribution) -> BatchNormInfo:
    counter = module.num_batches_tracked
    batches = None if counter is None or counter.is_meta else int(counter)
    left = None
    if module.running_mean is None:
        source = "the batch"
    elif batches == 0:
        source = "initial values (never updated)"
    elif module.momentum is None:
        source = "cumulative average"
    else:
        source = f"moving average (momentum {module.momentum:g})"
        left = None if batches is None else (1 - module.momentum) ** batches
    if found.traces[True].flags.get(name) is False:
        source += ", frozen: stays in eval mode under train()"
    return BatchNormInfo(name, type(module).__name__, source, module.momentum, batches, left)


def _parts(model: nn.Module, report: Report, found: Attribution) -> Iterator[Part]:
    """One entry per module for the tree: the word that says what it does."""
    effect = {site.path: site.cause for site in report.sites}
    always = {site.path for site in report.ungated}
    idle = {item.path for item in report.idle}
    calls = found.traces[True].calls
    for name, module in model.named_modules():
        role = effect.get(name) or ("ungated" if name in always else "")
        if not role:
            if name in idle:
                role = "idle"
            elif name in found.readers:
                role = "reads"
            elif isinstance(module, (_BatchNorm, _InstanceNorm)):
                role = "norm"
        yield Part(name, type(module).__name__, role, flag_of(module), calls[name])

"""From measurements to the answer: effect, randomness, causes, verdict."""

from __future__ import annotations

from torch.nn.modules.dropout import _DropoutNd

from modeprobe.probe.attribute import Attribution, Located
from modeprobe.probe.events import Event, Key
from modeprobe.probe.generation import Generation
from modeprobe.probe.observe import Observation
from modeprobe.probe.report import Failure, Idle, Mutation, Report, Site
from modeprobe.probe.workbench import Workbench


def judge(bench: Workbench, seen: Observation, found: Attribution, generation: Generation | None) -> Report:
    model = bench.model
    report = Report(type(model).__name__)
    if seen.effect is not None:
        report.effect = "differs" if seen.effect.differs else "none"
        report.amount = seen.effect.amount
    report.train_is_random = seen.is_random(True)
    report.eval_is_random = seen.is_random(False)
    report.train_is_reproducible = seen.is_reproducible(True)
    report.eval_is_reproducible = seen.is_reproducible(False)
    if report.effect == "differs":
        report.sites = [_site(item) for item in found.located if item.change is not None]
        report.causes = frozenset(site.cause for site in report.sites) or frozenset({"opaque"})
    report.ungated = [_ungated(key, events) for key, events in found.ungated.items()]
    calls = found.traces[True].calls
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd):
            if module.p == 0:
                report.idle.append(Idle(name, 0.0, "p = 0"))
            elif not calls[name]:
                report.idle.append(Idle(name, module.p, "never called"))
        if module.training is not model.training:
            report.mixed.append(name)
    for run in seen.runs:
        if run.error is not None:
            mode = "train" if run.mode else "eval"
            report.failures.append(Failure(mode, run.phase, f"{type(run.error).__name__}: {run.error}"))
    for flag, word in ((True, "train"), (False, "eval")):
        first = seen.first(flag)
        if first:
            report.mutations += [Mutation(name, f"{word}()") for name in first.toggled]
            report.mutations += [Mutation(name, f"forward in {word} mode") for name in first.mutated]
    report.verdict = verdict(report)
    return report


def _site(item: Located) -> Site:
    finding = item.finding
    events = [event for group in finding.events.values() for event in group]
    place = next((key.place for key in finding.events), None)
    p = next((event.p for event in events if event.p is not None), None)
    what = ", ".join(dict.fromkeys(key.name for key in finding.events)) or finding.detail
    return Site(
        next((key.path for key in finding.events), finding.path),
        what,
        finding.cause,
        p,
        place.file if place else "",
        place.line if place else 0,
        ("train",),
        finding.amount,
        max(len(events), 1),
    )


def _ungated(key: Key, events: list[Event]) -> Site:
    return Site(
        key.path,
        key.name,
        "",
        events[0].p,
        key.place.file,
        key.place.line,
        ("train", "eval"),
        None,
        len(events),
    )


_WORDS = {
    "module_dropout": "dropout modules",
    "functional_dropout": "functional dropout",
    "attention_dropout": "dropout inside attention",
    "stochastic_depth": "stochastic depth",
    "random_noise": "random noise",
    "batch_statistics": "batch statistics",
    "branch": "code behind the flag",
    "opaque": "something that could not be seen",
}


def verdict(report: Report) -> str:
    if report.effect == "unknown":
        return "could not run the model"
    if report.effect == "none":
        text = "eval() changes nothing here"
        if report.eval_is_random:
            text += ", but outputs are random in both modes"
        return text + "."
    counts = {cause: sum(site.cause == cause for site in report.sites) for cause in report.causes}
    listed = ", ".join(
        f"{_WORDS[cause]} ({counts[cause]})" if counts[cause] else _WORDS[cause]
        for cause in _WORDS
        if cause in counts
    )
    text = f"eval() changes the outputs: it turns off {listed}"
    if report.eval_is_random:
        text += "; outputs stay random in eval mode"
    return text + "."

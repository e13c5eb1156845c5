"""Which places in the model the difference comes from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from modeprobe.probe.call import Call
from modeprobe.probe.randomness import seed_everything
from modeprobe.probe.report import Site
from modeprobe.probe.trace import Event, Trace, Tracer
from modeprobe.probe.workbench import Workbench


@dataclass
class Attribution:
    traces: dict[bool, Trace] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    ungated: list[Site] = field(default_factory=list)
    errors: dict[bool, Exception] = field(default_factory=dict)


def attribute(bench: Workbench, call: Call, seed: int) -> Attribution:
    found = Attribution()
    for mode in (True, False):
        with bench.fresh() as lent:
            lent.model.train(mode)
            tracer = Tracer(lent.model)
            found.traces[mode] = tracer.trace
            seed_everything(seed)
            try:
                with tracer.active():
                    call(lent.model)
            except Exception as error:
                found.errors[mode] = error
    train, evaluation = found.traces[True], found.traces[False]
    in_eval = Counter(e.key for e in evaluation.events if e.active)
    merged: dict[tuple, list[Event]] = {}
    for event in train.events:
        if event.active:
            merged.setdefault(event.key, []).append(event)
    for key, events in merged.items():
        if in_eval[key]:
            if events[0].kind != "statistics":
                found.ungated.append(_site(events, "", ("train", "eval")))
        else:
            found.sites.append(_site(events, cause_of(events[0]), ("train",)))
    return found


def _site(events: list[Event], cause: str, modes: tuple[str, ...]) -> Site:
    event = events[0]
    return Site(
        event.path, event.name, cause, event.p, event.place.file, event.place.line, modes, None, len(events)
    )


def cause_of(event: Event) -> str:
    if issubclass(event.module_type, _DropoutNd):
        return "module_dropout"
    if event.kind == "dropout":
        return "functional_dropout"
    if event.kind == "attention":
        return "attention_dropout"
    if event.kind == "statistics":
        return "batch_statistics"
    if event.kind == "draw" and len(event.shape) != 1 and all(n == 1 for n in event.shape[1:]):
        return "stochastic_depth"
    return "random_noise"


def dropout_modules(model: nn.Module) -> dict[str, _DropoutNd]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _DropoutNd)}

"""The probe's front door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from modeprobe.probe.attribute import Attributor
from modeprobe.probe.call import Call
from modeprobe.probe.judge import judge
from modeprobe.probe.observe import SEEDS, observe
from modeprobe.probe.randomness import preserved
from modeprobe.probe.report import Report
from modeprobe.probe.workbench import Workbench


def probe(
    model: nn.Module,
    *args: Any,
    step: Callable[[nn.Module], Any] | None = None,
    gradients: bool = False,
    **kwargs: Any,
) -> Report:
    """Measure what `model.train()` and `model.eval()` change for the given inputs."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"probe(): model must be a torch.nn.Module, got {type(model).__name__}")
    call = Call(args, kwargs, step, gradients)
    with preserved():
        bench = Workbench(model)
        seen = observe(bench, call)
        mutated = frozenset(name for run in seen.runs for name in run.mutated)
        attributor = Attributor(bench, call, SEEDS[0], mutated)
        attributor.trace()
        findings, explained = attributor.replay()
        budget = 25 + 2 * len(attributor.found.readers)
        attributor.locate(findings, explained, budget, seen.is_random(False))
        report = judge(model, seen, attributor.found)
    report.forwards = call.forwards
    return report

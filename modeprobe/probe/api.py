"""The probe's front door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from modeprobe.probe.attribute import attribute
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
        found = attribute(bench, call, SEEDS[0])
        report = judge(model, seen, found)
    report.forwards = call.forwards
    return report

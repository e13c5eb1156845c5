"""The probe's front door."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from modeprobe.probe.attribute import Attributor, Located
from modeprobe.probe.call import Call
from modeprobe.probe.generation import GENERATION_PASSES, compare_generation, generates
from modeprobe.probe.judge import judge
from modeprobe.probe.leaves import Comparison
from modeprobe.probe.observe import Observation, observe
from modeprobe.probe.progress import Progress
from modeprobe.probe.randomness import preserved
from modeprobe.probe.report import Report
from modeprobe.probe.workbench import Workbench

_PASSES = 25


def probe(
    model: nn.Module,
    *args: Any,
    step: Callable[[nn.Module], Any] | None = None,
    gradients: bool = False,
    generate: bool | None = None,
    loader: Iterable[Any] | None = None,
    progress: bool | None = None,
    **kwargs: Any,
) -> Report:
    """Measure what `model.train()` and `model.eval()` change for the given inputs.

    The model is run on deep copies (or on itself, with everything put back, where it cannot be copied), in
    both modes at equal seeds, first without any instrumentation. What differs is then traced to modules and
    source lines. The model, its buffers, flags, hooks and gradients, and all random states are afterwards
    what they were before, also when the model raises.

    Args:
        model: any `torch.nn.Module`, in any mode, on any device.
        *args, **kwargs: inputs, passed on as `model(*args, **kwargs)`. They are cloned for every run.
        step: `step(model)` is run instead and its result taken as the output, for models that are not simply
            called, or whose forward has an argument named like one of the options here.
        gradients: also compare gradients with respect to the parameters, of the output named "loss" where
            there is one, else of the sum of the floating outputs.
        generate: compare greedy `model.generate(...)` in both modes; None does so where the model has such a
            method and takes `input_ids`, unless training is random and the passes are used up.
        loader: batches of data, for models with BatchNorm: also compare the running statistics with exact
            ones over them, as `mp.drift(model, loader)` does, in `report.drift`.
        progress: show progress on standard error; None shows it once the probe has run for two seconds.

    Returns:
        A `Report`: `effect` ("none", "differs", or "unknown" when the model could not be run), `causes`,
        `train_is_random`, `eval_is_random`, `sites`, `verdict` and more. `print(report)` to read it.

    Raises:
        TypeError: model is not a module, or neither inputs nor step fit it. Exceptions raised by the model
            are not raised but reported in `report.failures`.
        ValueError: model has parameters of lazy modules that no input has given a shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"probe(): model must be a torch.nn.Module, got {type(model).__name__}")
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ValueError("probe(): model has uninitialised (lazy) parameters: run it once on an input first")
    if step is not None and not callable(step):
        raise TypeError(f"probe(): step must be callable as step(model), got {type(step).__name__}")
    if step is not None and (args or kwargs):
        raise TypeError("probe(): give either inputs or step, not both")
    start = time.monotonic()
    call = Call(args, kwargs, step, gradients)
    with preserved(), Progress(progress) as show:
        bench = Workbench(model)
        seen = observe(bench, call, show)
        mutated = frozenset(name for run in seen.runs for name in run.mutated)
        attributor = Attributor(bench, call, seen.seed, mutated, show)
        attributor.trace()
        speaks = generates(bench, call, generate)
        # Where training is random, texts differ by chance: they take what passes are left.
        reserved = GENERATION_PASSES if speaks and (generate or not seen.is_random(True)) else 0
        call.limit = _PASSES + 2 * len(attributor.found.readers) - reserved
        if all(run.phase not in ("train()", "eval()") for run in seen.runs):
            _attribute(attributor, seen, call)
        speaks = speaks and (reserved > 0 or call.left >= GENERATION_PASSES)
        generation = compare_generation(bench, call, show) if speaks else None
        report = judge(bench, seen, attributor.found, generation)
    report.forwards = call.forwards
    report.seconds = time.monotonic() - start
    if loader is not None:
        from modeprobe.statistics import drift

        report.drift = drift(model, loader, progress=progress)
    return report


def _attribute(attributor: Attributor, seen: Observation, call: Call) -> None:
    if seen.without_values:
        attributor.locate_without_values()
        return
    findings, explained = attributor.replay()
    reach = attributor.locate(findings, explained, seen.is_random(False))
    found = attributor.found
    if seen.effect is not None and not seen.is_reproducible(False):
        # Equal seeds say nothing about a model that ignores them: take runs seeded call by call instead.
        seen.effect = reach.effect()
        if not reach.is_reproducible() and not seen.effect.structural:
            # Nor do these, say, of a model that looks at a clock: only calls made in one mode count.
            found.located = [item for item in found.located if item.finding.events]
            if all(item.change is None for item in found.located):
                seen.effect = Comparison((), seen.effect.leaves)
    reached = [item for item in found.located if item.change is not None]
    unlucky = not seen.is_random(True)  # the seeds drew the same
    seen.rare = any(
        item.change.differs and (item.finding.forced is not None or (item.finding.varies and unlucky))
        for item in found.located
        if item.change is not None
    )
    if seen.effect is None or not seen.effect.differs:
        return
    if reached:
        comparable = seen.is_reproducible(False) and all(item.finding.owners for item in reached)
        if comparable and call.left >= 5 and reach.kept_elsewhere():
            found.located += [Located(finding, Comparison((), 0)) for finding in attributor.bisect(False)]
    elif found.located:
        found.notes.append("effects were found at modules but not followed to the outputs")
        found.located = [Located(item.finding, Comparison((), 0)) for item in found.located]
    else:
        found.located = [Located(finding, Comparison((), 0)) for finding in attributor.bisect(True)]

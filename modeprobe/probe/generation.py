"""Greedy text in both modes, for models that have `generate`."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from modeprobe.probe.call import Call, told
from modeprobe.probe.leaves import clone_inputs, compare, flatten
from modeprobe.probe.observe import SEEDS
from modeprobe.probe.quiet import quiet
from modeprobe.probe.randomness import seed_everything
from modeprobe.probe.trace import Tracer
from modeprobe.probe.workbench import Workbench

_NEW_TOKENS = 4
GENERATION_PASSES = 2 * _NEW_TOKENS


@dataclass
class Generation:
    """same: whether greedy text (and its scores, where given) agrees; None when it could not be compared.

    checkpointing: lines behind the mode that mention activation checkpointing, which turns the cache off.
    """

    same: bool | None
    detail: str = ""
    checkpointing: list[str] = field(default_factory=list)


def generates(bench: Workbench, call: Call, wanted: bool | None) -> bool:
    """Whether text is to be compared. None: where the first input may be tokens."""
    if wanted is False or call.step is not None or not callable(getattr(bench.model, "generate", None)):
        return False
    first = call.kwargs.get("input_ids", call.args[0] if call.args else None)
    return wanted is True or isinstance(first, torch.Tensor)


def compare_generation(bench: Workbench, call: Call, tick: Callable[[str], None]) -> Generation:
    """Compare `model.generate(...)` for a few tokens in train and eval mode."""
    tick("comparing generated text")
    outputs: list[dict[str, Any]] = []
    traces: list[Tracer] = []
    for mode in (True, False):
        try:
            leaves, tracer = _generate(bench, call, mode)
        except Exception as error:
            word = "train" if mode else "eval"
            text = f"generate() raised in {word} mode: {told(error)}"
            return Generation(False if outputs else None, text) if not mode else Generation(None, text)
        outputs.append(leaves)
        traces.append(tracer)
    comparison = compare(outputs[0], outputs[1])
    if not comparison.differs:
        return Generation(True)
    return Generation(False, comparison.differences[0].path, _checkpointing(traces[0]))


def _generate(bench: Workbench, call: Call, mode: bool) -> tuple[dict[str, Any], Tracer]:
    with bench.fresh() as lent, quiet(), torch.no_grad():
        lent.model.train(mode)
        args, kwargs = clone_inputs((call.args, dict(call.kwargs)))
        seed_everything(SEEDS[0])
        tracer = Tracer(lent.model, functions=False)
        with tracer.active():
            output = lent.model.generate(  # type: ignore[operator]
                *args, **kwargs, do_sample=False, num_beams=1, max_new_tokens=_NEW_TOKENS
            )
        call.forwards += tracer.trace.calls[""]
        return flatten(output), tracer


def _checkpointing(tracer: Tracer) -> list[str]:
    places = {read.place for read in tracer.trace.reads}
    lines = [(place, linecache.getline(place.file, place.line)) for place in places]
    return sorted(f"{place.file}:{place.line}" for place, text in lines if "checkpoint" in text)

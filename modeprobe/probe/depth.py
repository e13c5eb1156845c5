"""Stochastic depth told from other chance: whole samples of a branch masked, whole layers left out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from modeprobe.probe.events import Event
from modeprobe.probe.leaves import compare, flatten
from modeprobe.probe.replay import Variant


def mask_axis(event: Event) -> int | None:
    """The axis along which a drawn mask of zeros and ones drops whole slices of a larger tensor."""
    return event.axis if event.kind == "draw" and event.scales and event.binary else None


def leaves_out_layers(runs: Sequence[Variant], steady: Variant, path: str) -> bool:
    """Whether chance only leaves out layers of module `path`, or takes fewer of its samples through them.

    No layer may run more often, or on more rows, than in `steady`: noise at a router moves rows from one
    expert to another. Runs of the same layers must agree: a draw that leaves out layers does nothing else.
    """
    everything, by_sample = steady.trace, False
    for run in runs:
        more = run.trace.calls - everything.calls or run.trace.rows - everything.rows
        fewer = [
            layer
            for layer, calls in run.trace.calls.items()
            if calls == everything.calls[layer] and run.trace.rows[layer] < everything.rows[layer]
        ]
        if more or (fewer and not _by_sample(fewer, run, steady, path)):
            return False
        by_sample = by_sample or bool(fewer)
    if by_sample or all(run.trace.calls == everything.calls for run in runs):
        return by_sample
    same_layers = ((a, b) for a, b in combinations(runs, 2) if a.trace.calls == b.trace.calls)
    return not any(compare(a.leaves, b.leaves).differs for a, b in same_layers)


def _by_sample(fewer: list[str], run: Variant, steady: Variant, path: str) -> bool:
    """Whether a layer that gets fewer rows gets all samples of module `path` in eval mode, and no more."""
    calls, rows = steady.trace.calls, steady.trace.rows
    whole = any(rows[layer] * calls[path] == rows[path] * calls[layer] for layer in fewer)
    return whole and not compare(run.leaves, steady.leaves).structural


def drops_branch(run: Variant, steady: Variant, arguments: Any) -> bool:
    """Whether the output is all zeros, or an input as it came, where it is neither in eval mode."""
    zero_or_input = [_zero_or_input(variant, arguments) for variant in (run, steady)]
    return zero_or_input == [True, False]


def _zero_or_input(variant: Variant, arguments: Any) -> bool:
    output = variant.leaves.get("")
    if not isinstance(output, Tensor):
        return False
    inputs = [leaf for leaf in flatten(arguments).values() if isinstance(leaf, Tensor)]
    return not output.any() or any(torch.equal(output, leaf) for leaf in inputs)

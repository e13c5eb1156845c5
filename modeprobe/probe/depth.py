"""Stochastic depth told from other chance: whole samples of a branch masked, whole layers left out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from modeprobe.probe.events import Event, Trace
from modeprobe.probe.leaves import compare, flatten
from modeprobe.probe.replay import Variant


def mask_axis(event: Event) -> int | None:
    """The axis along which a drawn mask of zeros and ones drops whole slices of a larger tensor.

    None for any other draw, for masks with several axes, and for those of the last axis (channels).
    """
    if not (event.kind == "draw" and event.scales and event.binary):
        return None
    axes = [axis for axis, n in enumerate(event.shape) if n > 1] or [0]
    return axes[0] if len(axes) == 1 and (axes[0] == 0 or axes[0] < len(event.shape) - 1) else None


def leaves_out_layers(runs: Sequence[Variant], steady: Variant, path: str) -> bool:
    """Whether chance only leaves out layers of module `path`, or takes fewer of its samples through them.

    No layer may run more often, or on more rows, than in `steady`: noise at a router moves rows from one
    expert to another. Runs of the same layers must agree: a draw that leaves out layers does nothing else.
    """
    if any(_runs_more(run.trace, steady.trace) for run in runs):
        return False
    if any(_takes_fewer_samples(run, steady, path) for run in runs):
        return True
    return any(run.trace.layers != steady.trace.layers for run in runs) and all(
        not compare(a.leaves, b.leaves).differs
        for a, b in combinations(runs, 2)
        if a.trace.layers == b.trace.layers
    )


def _runs_more(run: Trace, steady: Trace) -> bool:
    return any(
        run.calls[path] > steady.calls[path] or run.rows[path] > steady.rows[path] for path in run.calls
    )


def _takes_fewer_samples(run: Variant, steady: Variant, path: str) -> bool:
    """Whether a layer gets fewer rows than module `path`, though all of them in eval mode."""
    few, all_ = run.trace, steady.trace
    if not all_.calls[path] or compare(run.leaves, steady.leaves).structural:
        return False
    samples = all_.rows[path] / all_.calls[path]
    return any(
        few.calls[layer] == n and few.rows[layer] < all_.rows[layer] == n * samples
        for layer, n in all_.calls.items()
    )


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

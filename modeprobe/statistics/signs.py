"""Signs of the ways in which BatchNorm statistics go wrong, put in words."""

from __future__ import annotations

from math import exp
from statistics import median

from torch import nn

from modeprobe.statistics.report import LayerDrift

TINY = 8
LARGE = 2.3  # a running variance of ten times the data's
DROPOUT = ("Dropout", "DropPath", "StochasticDepth")


def find_signs(model: nn.Module, layers: list[LayerDrift], sizes: list[int], steps: int | None) -> list[str]:
    """One sentence per sign."""
    if not sizes:
        return ["The loader gave no batch."]
    signs = [*_batches(layers, sizes), *_counters(layers, steps), *_values(layers)]
    reused = [layer for layer in layers if layer.calls_per_forward > 1]
    signs += [
        f"{layer.name} is called {layer.calls_per_forward:g} times per forward: "
        "its statistics mix different inputs, and each call is an update."
        for layer in reused
    ]
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        signs.append(
            "Activation checkpointing is on: torch's BatchNorm then updates its statistics twice per step."
        )
    dropout = [
        name
        for name, module in model.named_modules()
        if type(module).__name__.startswith(DROPOUT)
        and float(getattr(module, "p", getattr(module, "drop_prob", 0)) or 0) > 0
    ]
    if dropout and any(layer.cause == "stale" for layer in layers):
        signs.append(
            f"Dropout ({dropout[0]}{' ...' if len(dropout) > 1 else ''}) was on when the averages were "
            'made and is off here: that alone shifts variances behind it. mode="train" tells the two apart.'
        )
    return signs


def _batches(layers: list[LayerDrift], sizes: list[int]) -> list[str]:
    signs = []
    usual = median(sizes)
    if usual <= TINY:
        signs.append(f"Batches are tiny (median {usual:g} samples): batch statistics are noisy.")
    if len(sizes) > 1 and sizes[-1] * 4 <= usual:
        signs.append(
            f"The last batch has {sizes[-1]} samples, not {usual:g}, but weighs as much in training."
        )
    if len(sizes) > 1 and sizes[-1] >= 4 * usual:
        signs.append(
            f"The last batch has {sizes[-1]} samples, not {usual:g}, but weighs no more in training."
        )
    ratios = [layer.between_ratio for layer in layers if layer.between_ratio is not None]
    if ratios and max(ratios) > 3:
        signs.append(
            f"Batches differ from each other {max(ratios):.1f} times more than shuffled ones could: "
            "the loader is sorted or grouped. Layers behind a BatchNorm are better recalibrated layerwise."
        )
    dominant = max(layers, key=lambda layer: layer.largest_share or 0)
    if len(sizes) > 3 and (dominant.largest_share or 0) > 0.5:
        signs.append(
            f"One batch (number {dominant.largest_batch}) alone makes {dominant.largest_share:.0%} of the "
            f"variance in {dominant.name}: look at it before recalibrating with this loader."
        )
    return signs


def _counters(layers: list[LayerDrift], steps: int | None) -> list[str]:
    """Updates per forward, which are 2 where a forward is repeated in the backward pass."""
    rates = {
        layer.name: layer.updates / max(layer.calls_per_forward, 1)
        for layer in layers
        if layer.updates and not layer.source.startswith(("frozen", "full pass"))
    }
    if not rates:
        return []
    signs = []
    least = min(rates, key=lambda name: rates[name])
    base = rates[least] if steps is None else float(steps)
    twice = [name for name, rate in rates.items() if base and rate / base > 1.05]
    if twice:
        factor = rates[twice[0]] / base
        more = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
        than = f"{least} ({rates[least]:g} updates)" if steps is None else f"the {steps} steps"
        signs.append(
            f"{twice[0]}{more} was updated {factor:.3g} times as often as {than}: "
            "a forward is repeated in the backward pass (activation checkpointing) or run without a step, "
            "or the other was frozen at times."
        )
    if steps and rates[least] / steps < 0.95:
        signs.append(f"{least} has {rates[least]:g} updates in {steps} steps: it was frozen at times.")
    return signs


def named(layers: list[LayerDrift]) -> str:
    """The first layer's name, and how many more there are."""
    return layers[0].name + (f" and {len(layers) - 1} more" if len(layers) > 1 else "")


def _values(layers: list[LayerDrift]) -> list[str]:
    signs = []
    broken = [layer for layer in layers if layer.nonfinite_buffers]
    if broken:
        signs.append(
            f"The buffers of {named(broken)} hold NaN or Inf ({broken[0].nonfinite_buffers} values)."
        )
    spoiled = [layer for layer in layers if layer.nonfinite_batches]
    if spoiled:
        count = spoiled[0].nonfinite_batches
        signs.append(
            f"{count} of the loader's batches gave NaN or Inf in {named(spoiled)} and were left out."
        )
    swollen = [layer for layer in layers if layer.ratio and median(layer.ratio) > LARGE]
    if swollen:
        factor = exp(median(swollen[0].ratio))
        signs.append(
            f"The running variance of {named(swollen)} is {factor:.2g} times the data's: "
            "outliers that this loader does not have entered the average, or the weights have shrunk since."
        )
    signs += [
        f"{layer.name}: {len(layer.dead)} of {layer.channels} channels are dead (variance < eps)."
        for layer in layers
        if layer.dead
    ]
    return signs

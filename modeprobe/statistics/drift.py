"""How far the running statistics are from the data's, why, and what that does to the outputs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from modeprobe.statistics.effect import measure_effect
from modeprobe.statistics.feed import Call, Feed, batch_size
from modeprobe.statistics.guard import unchanged
from modeprobe.statistics.layers import Layer, find_layers, normalising_with, unwrap
from modeprobe.statistics.measure import Measure
from modeprobe.statistics.pooled import compare, rms
from modeprobe.statistics.ranks import gather_sizes, group_of, together
from modeprobe.statistics.report import DriftReport, Effect, LayerDrift
from modeprobe.statistics.signs import find_signs
from modeprobe.statistics.trace import Trace

KEPT_BATCHES = 16  # of a loader that can be walked only once, for the effect on the outputs
EXACT = 1e-3


def drift(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    lower: str = "batch",
    effect: bool = True,
    metric: Callable[[Any, Any], float] | None = None,
    tolerance: float = 0.1,
    steps: int | None = None,
    batches: int | None = None,
    mode: str = "eval",
    call: Call | None = None,
    device: torch.device | str | None = None,
    process_group: Any = "auto",
    progress: bool | None = None,
) -> DriftReport:
    """Compare every BatchNorm layer's running statistics with exact ones of its inputs over `loader`.

    Nothing is changed: buffers, modes and random states are put back bit for bit.

    Per channel, with running mean r, running variance s, and the pooled mean m and unbiased variance v of
    all values together:

        mean shift            z = (r - m) / sqrt(v + eps)
        log variance ratio    l = log((s + eps) / (v + eps))
        KL divergence         (exp(-l) (1 + z^2) - 1 + l) / 2, of N(m, v + eps) from N(r, s + eps)

    and the layer's `size` is sqrt(mean over channels of z^2 + l^2 / 2). The difference has three parts that
    add up, each with a size of the same form:

        initial               what the initial (0, 1) still weighs, (1 - momentum)^updates
        not representative    from the moving average of these very batches, at these weights, in this order,
                              to the pooled statistics; or the size that chance alone would give it
        stale                 from the layer's moving average without its initial value to that of these
                              batches, beyond chance: weights moved, or training saw other data, or
                              another order

    The largest names the cause. Parts are told apart best when the loader gives batches as training did.

    Args:
        model, loader, batches, mode, call, device, process_group, progress: as in `recalibrate`.
        lower: which statistics the layers below use while a layer's input is measured. "batch": those of the
            batch, as in training. "running": their running statistics, as in evaluation; only a layerwise
            recalibration can make that drift zero.
        effect: also compare the model's outputs under running, full-pass and batch statistics. That walks
            the loader a second time with three forwards per batch (a loader that cannot be walked twice: over
            at most 16 of its batches, drawn by lot).
        metric: `metric(output, batch)` gives a number per batch (accuracy, loss ...), averaged by batch size.
        tolerance: sizes up to this count as fitting.
        steps: optimizer steps taken so far, to find statistics that were updated twice per step.

    Returns a `DriftReport`. With several ranks the data of all count together, and every rank gets the report
    of its own running statistics; a moving average over the loader is then the mean of the ranks'. Raises
    RuntimeError on all other ranks if one of them fails.
    """
    if lower not in ("batch", "running"):
        raise ValueError(f'lower must be "batch" or "running", got {lower!r}')
    if metric is not None and not effect:
        raise ValueError("metric needs effect=True")
    model = unwrap(model)
    feed = Feed(model, loader, call, device, batches, progress)
    layers = find_layers(model)
    if not layers:
        return DriftReport([], tolerance=tolerance)
    place = next((layer.running[0].device for layer in layers if layer.has_buffers), feed.device)
    trace = Trace(
        [layer.channels for layer in layers], place or torch.device("cpu"), [_rate(layer) for layer in layers]
    )
    sizes: list[int] = []
    kept: list[Any] = []
    lot = random.Random(0)

    keeps = [lower == "running" or bool(layer.frozen) or not layer.has_buffers for layer in layers]
    measure = Measure(layers, trace, keeps)

    def measured() -> Tensor:
        with normalising_with(layers, measure.provide, measure.instead):
            for number, batch in enumerate(feed.walk("BatchNorm drift")):
                sizes.append(batch_size(batch))
                if effect and feed.once:
                    place_in_kept = number if number < KEPT_BATCHES else lot.randint(0, number)
                    if place_in_kept < KEPT_BATCHES:
                        kept[place_in_kept : place_in_kept + 1] = [batch]
                feed.run(batch)
                trace.flush()
        return trace.packed()

    group = group_of(process_group)
    outcome: Effect | None = None
    with unchanged(model, mode):
        parts = together(measured, group)
        if group is not None:
            trace.take_in(parts)
            sizes = gather_sizes(sizes, group)
        if effect and sizes:
            walk = kept if feed.once else feed.walk("effect on the outputs")
            outcome = measure_effect(feed, layers, trace, walk, metric, group)
    rows = [_layer(i, layer, trace, sizes, tolerance) for i, layer in enumerate(layers)]
    return DriftReport(
        rows,
        effect=outcome,
        signs=find_signs(model, rows, sizes, steps),
        batches=len(sizes),
        samples=sum(sizes),
        lower=lower,
        tolerance=tolerance,
    )


def _rate(layer: Layer) -> float | None:
    return 0.0 if layer.frozen and layer.momentum is None else layer.momentum


def size(shift: Tensor, ratio: Tensor) -> float:
    """Root mean square over channels of shift^2 + ratio^2 / 2; NaN if a channel is not finite."""
    return float((shift.square() + ratio.square() / 2).mean().sqrt())


def _layer(i: int, layer: Layer, trace: Trace, sizes: list[int], tolerance: float) -> LayerDrift:
    pooled, module = trace.layer(i), layer.module
    calls = trace.calls[i]
    counter = module._buffers.get("num_batches_tracked")
    row = LayerDrift(
        layer.name,
        type(module).__name__,
        source="",
        momentum=layer.momentum,
        updates=None if counter is None else int(counter),
        channels=layer.channels,
        values=int(pooled.n.max()) if layer.channels else 0,
        calls=calls,
        calls_per_forward=calls / len(sizes) if sizes else 0.0,
        nonfinite_batches=int(trace.skipped[trace.span(i)].max()) if layer.channels else 0,
    )
    if not layer.has_buffers:
        row.source = "batch"
    elif layer.frozen:
        row.source = f"frozen: {layer.frozen}"
    elif row.updates == 0:
        row.source = "never updated"
    elif layer.momentum is None:
        row.source = "cumulative"
    else:
        row.source = f"moving average, {layer.momentum:g}"
    if not calls:
        row.cause = "not reached"
        return row
    variance = pooled.variance()
    row.dead = (variance < layer.eps).nonzero().flatten().tolist()
    span = trace.span(i)
    share = trace.most[span] / pooled.m2.clamp(min=1e-300)
    row.largest_share = float(share.median())
    row.largest_batch = int(trace.most_batch[span][share.argmax()])
    between = 1 - trace.within[span] / pooled.m2.clamp(min=1e-300)
    if calls == len(sizes) > 1 and sum(sizes) > len(sizes):
        row.between_ratio = float(between.median()) * (sum(sizes) - 1) / (len(sizes) - 1)
    if layer.has_buffers:
        _compare(row, i, layer, trace, variance, tolerance)
    return row


def _compare(row: LayerDrift, i: int, layer: Layer, trace: Trace, variance: Tensor, tolerance: float) -> None:
    """The figures that need running statistics."""
    pooled = trace.layer(i)
    mean = pooled.mean
    running = (layer.running[0].to(mean), layer.running[1].to(mean))
    shift, ratio = (value.cpu() for value in compare(*running, mean, variance, layer.eps))
    divergence = ((-ratio).exp() * (1 + shift.square()) - 1 + ratio) / 2
    row.shift, row.ratio, row.divergence = shift.tolist(), ratio.tolist(), divergence.tolist()
    row.mean_shift, row.mean_shift_max = rms(shift), float(shift.abs().nan_to_num(0).max())
    row.log_variance_ratio = rms(ratio)
    row.kl, row.kl_max = float(divergence.mean()), float(divergence.max())
    row.worst = divergence.nan_to_num(torch.inf).argsort(descending=True, stable=True)[:5].tolist()
    row.nonfinite_buffers = int(sum((~buffer.isfinite()).sum() for buffer in running))
    row.size = size(shift, ratio)
    if row.nonfinite_buffers:
        row.cause = "not finite"
        return
    if layer.frozen:
        row.cause = "fits" if row.size <= tolerance else "frozen"
        return
    if row.size < EXACT and row.updates:
        row.source, row.initial_weight, row.cause = "full pass", 0.0, "fits"
        return
    row.initial_weight = initial_weight(layer.momentum, row.updates)
    weight = min(row.initial_weight or 0.0, 1 - 1e-6)
    moving_mean, moving_variance = trace.moving(i)
    scale = (variance + layer.eps).sqrt()

    def part(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
        tiny = layer.eps * 1e-3
        logs = [(pair[1] + layer.eps).clamp(min=tiny).log() for pair in (a, b)]
        return size((a[0] - b[0]) / scale, logs[0] - logs[1])

    if weight > 0.5:  # hardly anything else is in there
        trained = (moving_mean, moving_variance)
    else:
        trained = (running[0] / (1 - weight), (running[1] - weight) / (1 - weight))
    memory = _memory(layer.momentum, row.updates)
    mean_noise, variance_noise = trace.noise(i)
    relative = mean_noise / scale.square() + variance_noise / scale.square().square() / 2
    row.noise = math.sqrt(memory * float(relative.mean()))
    row.initial = part((running[0], running[1]), trained)
    row.not_representative = part((moving_mean, moving_variance), (mean, variance))
    row.stale = part(trained, (moving_mean, moving_variance))
    if row.size <= tolerance:
        row.cause = "fits"
        return
    beyond = math.sqrt(max(0.0, row.stale**2 - 2 * row.noise**2))
    causes = {
        "initial value": row.initial,
        "not representative": max(row.not_representative, row.noise),
        "stale": beyond,
    }
    row.cause = max(causes, key=lambda name: causes[name])


def initial_weight(momentum: float | None, updates: int | None) -> float | None:
    """What the initial value still weighs in a moving average: (1 - momentum)^updates."""
    if updates is None:
        return None
    if momentum is None:
        return float(updates == 0)
    return float((1 - momentum) ** updates)


def _memory(momentum: float | None, updates: int | None) -> float:
    """Sum of squared weights: the variance of an average of batches, per variance of one."""
    if momentum is None:
        return 1 / max(updates or 1, 1)
    return momentum / (2 - momentum) if 0 <= momentum < 2 else 1.0

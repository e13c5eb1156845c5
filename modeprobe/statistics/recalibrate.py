"""Exact running statistics from a pass over data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from modeprobe.statistics.feed import Call, Feed
from modeprobe.statistics.guard import unchanged
from modeprobe.statistics.layers import (
    Instead,
    Layer,
    Provider,
    Selection,
    batch_or_pooled,
    find_layers,
    normalising_with,
    select,
    unwrap,
)
from modeprobe.statistics.measure import Measure
from modeprobe.statistics.pooled import Moments, Pool, compare, rms
from modeprobe.statistics.ranks import exchange, group_of, merge_ranks
from modeprobe.statistics.report import RecalibratedLayer, RecalibrationReport


class _Enough(Exception):
    """The layer being measured has been reached: the rest of the forward is not needed."""


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layers: Selection = None,
    layerwise: bool = False,
    momentum: float | None = None,
    last: int | None = None,
    batches: int | None = None,
    nonfinite: str = "skip",
    mode: str = "eval",
    call: Call | None = None,
    device: torch.device | str | None = None,
    process_group: Any = "auto",
    progress: bool | None = None,
) -> RecalibrationReport:
    """Set the running statistics of the BatchNorm layers to the exact moments of their inputs over `loader`.

    Counts, means and sums of squared deviations are merged by Chan's formula, so that the result is
    `var_mean` of all values together, however they are cut into batches (1, 2, 1024, class-sorted, a layer
    called twice). `running_var` gets the unbiased variance, as in training. The buffers are written in place,
    all at once and only at the end: an exception or KeyboardInterrupt before leaves the model bitwise as it
    was. Modes and random states are restored. The forwards run without gradients.

    Which activations are measured. With `layerwise=False` there is one pass, and every layer being
    recalibrated normalises with the statistics of the current batch, as in training: a layer is given the
    population of activations behind *mini-batch-normalised* lower layers. With `layerwise=True` the layers
    are measured one after the other, in the order of their first call, each behind lower layers that already
    use their *new* statistics: exactly the population that evaluation will see, whatever the batches are.
    That takes a pass to find the order and one per layer (which stops at its layer). Use it when batches are
    small or sorted. Frozen layers use their buffers in both. A layer that a forward calls more than once
    normalises with batch statistics while it is measured. A batch of one value per channel has no variance:
    it is normalised with what is pooled so far.

    Args:
        model: any module; DistributedDataParallel, DataParallel and torch.compile are looked through.
        loader: iterable of batches. A tensor is the input; the first item of a tuple or list is; a mapping
            gives keyword arguments. Anything else: see `call`. Must be iterable again if `layerwise`.
        layers: which to recalibrate: names, modules, or a predicate of (name, module). By default all that
            are not frozen. Frozen is: a FrozenBatchNorm class; the policy "frozen"; a layer in evaluation
            inside a model in training; in a model in evaluation, a layer none of whose parameters requires
            a gradient while others of the model do.
        momentum: None weighs all values equally. Otherwise the weight of what came before shrinks by
            (1 - momentum) with each batch: a moving average of moments that has no initial value.
        last: use only the last so many calls of each layer.
        batches: stop after so many batches.
        nonfinite: "skip" leaves a batch out of the channels where it gives NaN or Inf; "raise" raises.
        mode: of the other layers: "eval" (dropout off, as evaluation will be), "train", or "keep".
        call: `call(model, batch)` runs one forward.
        device: where batches are moved; by default the model's device.
        process_group: ranks to merge over: "auto" is the default group if torch.distributed is initialised.
            Ranks may have any number of batches, also none. None: only this process.
        progress: bar on standard error; by default if that is a terminal.

    Returns a `RecalibrationReport`. `num_batches_tracked` becomes the number of calls merged.

    Raises ValueError for wrong arguments and if a channel had no finite value or only one, and RuntimeError
    on all other ranks if one of them fails. Nothing is written then.
    """
    if momentum is not None and not 0 < momentum < 1:
        raise ValueError(f"momentum must be between 0 and 1, or None, got {momentum}")
    if last is not None and last < 1:
        raise ValueError(f"last must be at least 1, got {last}")
    if nonfinite not in ("skip", "raise"):
        raise ValueError(f'nonfinite must be "skip" or "raise", got {nonfinite!r}')
    model = unwrap(model)
    feed = Feed(model, loader, call, device, batches, progress)
    if layerwise and feed.once:
        raise ValueError(
            "layerwise=True walks the loader once per layer; pass one that can be iterated again"
        )
    every = find_layers(model)
    chosen = [layer for layer in select(every, layers) if layer.has_buffers]
    group = group_of(process_group)
    results: dict[int, Measured] = {}
    if chosen:
        with unchanged(model, mode):
            measure = _layer_by_layer if layerwise else _one_pass
            results = measure(feed, chosen, group, {"momentum": momentum, "last": last})
    return _write(every, chosen, results, nonfinite, layerwise)


class Measured:
    """One layer's moments, calls and skipped calls; and what it normalises with once it is done."""

    def __init__(self, moments: Moments, calls: int, skipped: Tensor):
        self.moments, self.calls, self.skipped = moments, calls, skipped
        self.statistics = moments.mean, moments.variance()


def _pool(chosen: list[Layer], options: dict) -> Pool:
    return Pool([layer.channels for layer in chosen], chosen[0].running[0].device, **options)


def _collect(pool: Pool, error: BaseException | None, group: Any) -> list[Measured]:
    """What the pool holds, merged over ranks. On a failed rank: tell the others, then go on raising."""
    moments, skipped = pool.result(), pool.skipped
    calls = torch.tensor(pool.calls, device=pool.device)
    if group is not None:
        sizes = torch.tensor(pool.channels, device=pool.device)
        extra = torch.stack([skipped, calls.repeat_interleave(sizes).to(pool.dtype)])
        moments, extra = merge_ranks(moments, extra, error, group)
        skipped = extra[0]
        calls = extra[1][torch.tensor(pool.starts[:-1], device=pool.device)] if pool.channels else calls
    counts = [int(count) for count in calls.tolist()]
    return [
        Measured(pool.layer(i, moments), counts[i], skipped[pool.span(i)]) for i in range(len(pool.channels))
    ]


def _pass(
    feed: Feed,
    chosen: list[Layer],
    hooks: tuple[Provider, Instead | None],
    pool: Pool,
    group: Any,
    text: str,
) -> list[Measured]:
    """One walk over the loader; what the pool then holds. Other ranks are told if this one fails."""
    try:
        with normalising_with(chosen, *hooks):
            for batch in feed.walk(text):
                with suppress(_Enough):
                    feed.run(batch)
                pool.flush()
    except Exception as error:
        if group is not None:
            _collect(pool, error, group)
        raise
    return _collect(pool, None, group)


def _one_pass(feed: Feed, chosen: list[Layer], group: Any, options: dict) -> dict[int, Measured]:
    pool = _pool(chosen, options)
    measure = Measure(chosen, pool)
    hooks = measure.provide, measure.instead
    return dict(enumerate(_pass(feed, chosen, hooks, pool, group, "BatchNorm statistics")))


def _layer_by_layer(feed: Feed, chosen: list[Layer], group: Any, options: dict) -> dict[int, Measured]:
    order, repeated = _order_of_calls(feed, chosen, group)
    results: dict[int, Measured] = {}
    for target in order:
        pool = _pool(chosen, options)

        def provide(i: int, x: Tensor, target: int = target, pool: Pool = pool) -> tuple[Tensor, Tensor]:
            done = results.get(i)
            if done is not None:
                return done.statistics
            n, mean, m2 = pool.measure(i, x)
            if i == target:
                pool.add(i, n, mean, m2)
                if i not in repeated:
                    raise _Enough
            return batch_or_pooled(n, mean, m2, chosen[i], lambda: pool.layer(i))

        text = f"BatchNorm statistics, layer {len(results) + 1} of {len(order)}"
        results[target] = _pass(feed, chosen, (provide, None), pool, group, text)[target]
    return results


def _order_of_calls(feed: Feed, chosen: list[Layer], group: Any) -> tuple[list[int], set[int]]:
    """The layers by their first call, and those that some forward calls more than once; over the whole
    loader, because a forward need not call every layer, and over all ranks, which must agree."""
    pool = _pool(chosen, {})
    position = torch.full((len(chosen),), torch.inf, dtype=torch.float64)
    repeats = torch.zeros(len(chosen), dtype=torch.float64)
    seen: set[int] = set()

    measure = Measure(chosen, pool)

    def instead(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        position[i] = min(float(position[i]), position.isfinite().sum().item())
        repeats[i] += i in seen
        seen.add(i)
        return measure.instead(i, args, kwargs)

    try:
        with normalising_with(chosen, measure.provide, instead):
            for batch in feed.walk("order of the BatchNorm layers"):
                seen.clear()
                feed.run(batch)
                pool.flush()
    except Exception as error:
        if group is not None:
            exchange(None, error, group)
        raise
    if group is not None:
        told = torch.stack(exchange(torch.stack([position, repeats]), None, group))
        position, repeats = told[:, 0].amin(0), told[:, 1].sum(0)
    reached = [i for i in range(len(chosen)) if position[i].isfinite()]
    order = sorted(reached, key=lambda i: float(position[i]))
    return order, {i for i in order if repeats[i]}


def _write(
    every: list[Layer],
    chosen: list[Layer],
    results: dict[int, Measured],
    nonfinite: str,
    layerwise: bool,
) -> RecalibrationReport:
    """Check everything, then write all buffers in one call."""
    buffers: list[Tensor] = []
    values: list[Tensor] = []
    done: dict[Layer, RecalibratedLayer] = {}
    for i, measured in results.items():
        layer, moments, calls = chosen[i], measured.moments, measured.calls
        if not calls:
            continue
        variance, left_out = measured.statistics[1], int(measured.skipped.max().item())
        _check(layer, moments, variance, calls, left_out if nonfinite == "raise" else 0)
        shift, ratio = compare(*layer.running, moments.mean, variance, layer.eps)
        buffers += layer.running
        values += [moments.mean, variance]
        counter = layer.module._buffers.get("num_batches_tracked")
        if counter is not None:
            buffers.append(counter)
            values.append(torch.tensor(calls))
        done[layer] = RecalibratedLayer(
            layer.name, "recalibrated", int(moments.n.max()), calls, left_out, rms(shift), rms(ratio)
        )
    values = [value.to(buffer.device, buffer.dtype) for buffer, value in zip(buffers, values, strict=True)]
    if buffers:
        with torch.no_grad():  # one call: no interrupt falls between two buffers
            torch._foreach_copy_(buffers, values)
    rows = [done.get(layer) or RecalibratedLayer(layer.name, _state(layer, chosen)) for layer in every]
    left_out_rows = [row for row in rows if row.left_out]
    if left_out_rows:
        row = left_out_rows[0]
        warnings.warn(
            f"{row.name}: {row.left_out} of {row.calls} batches gave NaN or Inf and were left out",
            RuntimeWarning,
            stacklevel=3,
        )
    return RecalibrationReport(rows, layerwise)


def _check(layer: Layer, moments: Moments, variance: Tensor, calls: int, left_out: int) -> None:
    fewest = float(moments.n.min())
    if left_out:
        what = f"{left_out} of {calls} batches gave NaN or Inf"
    elif fewest == 0:
        what = f"a channel had no finite batch of {calls}"
    elif not bool(variance.isfinite().all()):
        what = f"a variance needs more than one value per channel, got {fewest:g}"
    else:
        return
    raise ValueError(f"{layer.name or 'model'}: {what}; nothing was written")


def _state(layer: Layer, chosen: list[Layer]) -> str:
    """Why a layer was not recalibrated."""
    if layer in chosen:
        return "not reached"
    if not layer.has_buffers:
        return "no running statistics"
    return f"frozen: {layer.frozen}" if layer.frozen else "not selected"

"""Layers that are measured: moments into the pool, and the batch's statistics to normalise with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modeprobe import nn as own
from modeprobe.functional.batch_norm import epilogue
from modeprobe.nn.batch_norm import _BatchNorm
from modeprobe.ops import backend
from modeprobe.ops.batch_norm import operators
from modeprobe.reference import accumulate_dtype
from modeprobe.statistics.layers import Layer, batch_or_pooled
from modeprobe.statistics.pooled import Pool, batch_moments, too_far

# Only exact classes: a subclass may do more in its forward.
KINDS = {
    getattr(package, name)
    for package in (nn, own)
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
}


class Measure:
    """The two hooks of `normalising_with` for a pass that measures all `layers` into `pool`.

    keeps   layers that go on normalising with their own statistics; the others take the batch's
    """

    def __init__(self, layers: list[Layer], pool: Pool, keeps: list[bool] | None = None):
        self.layers, self.pool = layers, pool
        self.keeps = keeps or [False] * len(layers)
        self.fusable = [
            not keeps
            and pool.device.type == "cpu"
            and type(layer.module) in KINDS
            and "forward" not in vars(layer.module)
            and getattr(layer.module, "backend", None) in (None, "auto")
            for layer, keeps in zip(layers, self.keeps, strict=True)
        ]

    def provide(self, i: int, x: Tensor) -> tuple[Tensor, Tensor] | None:
        n, mean, m2 = self.pool.measure(i, x)
        self.pool.add(i, n, mean, m2)
        if self.keeps[i]:
            return None
        return batch_or_pooled(n, mean, m2, self.layers[i], lambda: self.pool.layer(i))

    def instead(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The layer's output from one call that measures and normalises, writing float64 statistics into the
        pool's slot: the CPU's training kernel, which keeps a channel in cache between the two. None where
        that is not possible."""
        trusted = self.pool.trusts(i)
        if not self.fusable[i] or trusted is False or len(args) != 1 or kwargs.keys() - {"residual"}:
            return None
        x, module = args[0], self.layers[i].module
        if not _usable(x, module, self.layers[i].channels) or backend.resolve("cpu") != "native":
            return None
        module._check_input_dim(x)  # type: ignore[operator]
        n = x.numel() // x.size(1)
        if n < 2:
            return None
        mean, variance = self.pool.slot(i)
        train = operators("native").batch_norm_train
        if isinstance(module, _BatchNorm):

            def normalise(
                x, _mean, _var, weight, bias, _training, _momentum, eps, *, activation, negative_slope,
                residual, dropout_p, **_counters,
            ):  # fmt: skip
                tail = epilogue(x, activation, negative_slope, residual, dropout_p, None)
                return train(x, weight, bias, mean, variance, None, None, 1.0, eps, *tail)[0]

            output = module._batch_norm(x, kwargs.get("residual"), normalise)
        elif kwargs:
            return None
        else:
            weight, bias = module._parameters["weight"], module._parameters["bias"]
            output = train(x, weight, bias, mean, variance, None, None, 1.0, module.eps)[0]
        if trusted is None and bool(too_far(mean, variance, 1).any()):
            self.pool.add(i, *batch_moments(x))
        else:
            self.pool.add_slot(i, n)
        return output


def _usable(x: Any, module: nn.Module, channels: int) -> bool:
    """Whether the kernel takes this input; what it does not is left to the layer, errors included."""
    if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" or not x.is_floating_point():
        return False
    if x.dim() < 2 or x.size(1) != channels or torch._C._are_functorch_transforms_active():
        return False
    allowed = (x.dtype, accumulate_dtype(x))
    return all(p is None or p.dtype in allowed for p in module._parameters.values())

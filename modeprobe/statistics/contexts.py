"""Choose which statistics BatchNorm normalises with, for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def _flags(model: nn.Module, training: bool, track: bool | None) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    try:
        for layer in layers:
            layer.training = training
            if track is not None:
                layer.track_running_stats = track
        yield
    finally:
        for layer, (was_training, was_tracking) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = was_training, was_tracking


def frozen_statistics(model: nn.Module):
    """Inside the block every BatchNorm layer of `model`, torch's or modeprobe's, normalises with its running
    statistics and does not update them, in training too; dropout and the rest keep their modes, and weights
    still get gradients. Layers without running statistics have only the batch's, as ever.

    The layers' `training` flags are false inside; calling `model.train()` there undoes the freeze. On
    leaving, flags are as they were on entering.
    """
    return _flags(model, False, None)


def batch_statistics(model: nn.Module):
    """Inside the block every BatchNorm layer of `model`, torch's or modeprobe's, normalises with the
    statistics of the batch and leaves its buffers alone, also in evaluation; dropout and the rest keep their
    modes. More than one value per channel is needed, as in training.

    On leaving, flags are as they were on entering.
    """
    return _flags(model, True, False)

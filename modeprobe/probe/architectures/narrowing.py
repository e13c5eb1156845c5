"""Narrower models, for those that run at millions of parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from modeprobe.probe.architectures import models as _models
from modeprobe.probe.architectures.configurations import Source
from modeprobe.probe.architectures.fitting import fitting
from modeprobe.probe.leaves import compare, drained, flatten

_SECONDS = 10  # of the processor's time
# Of what the wide model's output changes with its inputs or its mode, this share must be left; or this much.
_SHARE, _ENOUGH = 0.1, 0.01

Inputs = dict[str, Any]


def narrowed(model: Any, inputs: Inputs, source: Source, show: Callable[[str], None]) -> nn.Module:
    """The model with its widths divided, as far as it still runs on these inputs, in the same modes.

    And as far as its output still depends on what it did: in a model that is too narrow all values may end
    at the same bound, and nothing would have an effect.
    """
    if not hasattr(getattr(model, "config", None), "to_dict"):  # parts of a whole need not have one
        return model
    show(f"looking for a smaller {type(model).__name__}")
    until = time.process_time() + _SECONDS
    try:
        changes = _changes(model, inputs)
    except Exception:  # it runs with some seeds only
        return model
    wanted = {name: min(_SHARE * change, _ENOUGH) for name, change in changes.items()}
    smallest: nn.Module = model

    def fits(values: dict[str, Any]) -> bool:
        nonlocal smallest
        if time.process_time() > until:
            return False
        other = _models.again(type(model), model.config, values, source)
        if other is None or parameters(other) >= parameters(smallest):
            return False
        try:
            changes = _changes(other, inputs)
        except Exception:
            return False
        if any(changes.get(name, -1.0) < least for name, least in wanted.items()):
            return False
        smallest = other
        return True

    values = model.config.to_dict()
    for _ in fitting(values, values, fits):
        pass
    return smallest


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _changes(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """How much the output changes with the inputs and with the mode; not with what the model raises at."""
    first = _output(model, inputs, train=False)
    swapped = {
        name: value.flip(0) if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in inputs.items()
    }
    found: dict[str, float] = {}
    for name, values, train in (("inputs", swapped, False), ("mode", inputs, True)):
        try:
            comparison = compare(first, _output(model, values, train))
        except Exception:
            continue
        change = math.inf if comparison.structural else comparison.amount
        found[name] = math.inf if math.isnan(change) else change
    return found


def _output(model: nn.Module, inputs: Inputs, train: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        return flatten(drained(model.train(train)(**inputs)))

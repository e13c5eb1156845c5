"""Tiny, randomly initialised models of the installed transformers, built from their configuration alone.

The only part of the probe that knows transformers. Nothing is downloaded.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from modeprobe.probe.architectures import models as _models
from modeprobe.probe.architectures import parts as _parts
from modeprobe.probe.architectures.agreement import agreeing, disagreeing
from modeprobe.probe.architectures.inputs import InputMaker
from modeprobe.probe.quiet import quiet

_REPAIRS = 4
_REFUSED = 4  # inputs by whose failures the sizes of a model are made to agree
_SIZES = 4  # or classes of a whole that runs, in search of a part that it calls
_SECONDS = 60  # of the processor's time, after which nothing else is tried
_SLICE = 12  # of them for a model's inputs, and for the models in which its sizes agree
_RUNS = 8  # of a model, until one runs in train mode too, or of a whole, until one reaches the part

Found = tuple[nn.Module, dict[str, Any]]


class ArchitectureError(Exception):
    """No tiny model of this type could be built and run; the message says what was tried."""


def model_types() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def build(model_type: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of this type in train mode, and keyword arguments that it accepts.

    Raises:
        ArchitectureError: the type is unknown, too large at every size, or needs inputs of another kind.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if model_type not in model_types():
        import difflib

        close = difflib.get_close_matches(model_type, model_types(), 3)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ArchitectureError(f"unknown model type {model_type!r} in the installed transformers{hint}")
    tried = _Tried(model_type)
    with quiet():
        found = _first(_running(model_type, seed, tried)) or _first(_as_part(model_type, seed, tried))
    if found is None:
        raise ArchitectureError(str(tried))
    model, inputs = found
    return model.train(), inputs


def _first(running: Iterator[Found]) -> Found | None:
    """The first that also runs in train mode, else the first."""
    found = None
    for model, inputs in itertools.islice(running, _RUNS):
        if _failure(model, inputs, train=True) is None:
            return model, inputs
        found = found or (model, inputs)
    return found


class _Tried:
    """Why a model type could not be built, or did not run on the inputs tried."""

    def __init__(self, model_type: str, until: float | None = None) -> None:
        self.model_type = model_type
        self.ran = False
        self.until = until or time.process_time() + _SECONDS
        self.instead = ""
        self.reasons: list[str] = []
        self.refused: list[tuple[int, dict[str, Any], Exception]] = []  # with the repairs that were left
        self.wholes: list[str] = []

    def long_enough(self) -> bool:
        return time.process_time() > self.until

    def __str__(self) -> str:
        if self.instead:
            return self.instead
        what = (
            "was built, but none of the inputs tried fit it"
            if self.ran
            else "could not be built from its configuration"
        )
        late = [f"nothing more was tried after {_SECONDS} s of the processor's time"] * self.long_enough()
        reasons = "\n  ".join([*list(dict.fromkeys(self.reasons))[:4], *self.wholes, *late])
        return (
            f"a tiny {self.model_type} {what}:\n  {reasons}\n"
            "Probe it by package.module:factory and --input instead, "
            "with a configuration and inputs of your own."
        )


def _running(model_type: str, seed: int, tried: _Tried, complete: bool = False) -> Iterator[Found]:
    """Models of this type with inputs that they run on, the smallest first."""
    try:
        config = _models.configuration(model_type, complete)
    except Exception as error:
        tried.instead = f"transformers has no default configuration of {model_type}: {_short(error)}"
        return
    for model in _models.models(config, seed):
        if tried.long_enough():
            return
        if isinstance(model, ImportError) and not str(model.name).startswith("transformers."):
            tried.instead = f"{model_type} needs a package: {_short(model)}"
            return
        if isinstance(model, Exception):
            tried.reasons.append(_short(model))
            continue
        if not tried.ran:
            tried.ran, tried.reasons = True, []
        for runs in _models.runnable(model):
            before, tried.refused = len(tried.reasons), []
            ran = False
            for inputs in _accepted(runs, tried):
                ran = True
                yield runs, inputs
            if len(tried.reasons) == before:
                tried.reasons.append(f"{type(runs).__name__}.forward() does not say what it takes")
            if not ran and runs is model:
                yield from _agreed(model, seed, tried)


def _agreed(model: nn.Module, seed: int, tried: _Tried) -> Iterator[Found]:
    """Models like this one, in which the sizes agree that the failures name, with the inputs that failed."""
    seen: set[str] = set()
    until = time.process_time() + _SLICE

    def attempt(model: Any, inputs: dict[str, Any], failure: Exception) -> Iterator[Found]:
        for values in agreeing(model.config.to_dict(), str(failure)):
            if repr(values) in seen or time.process_time() > until:
                continue
            seen.add(repr(values))
            other = _models.like(model, values, seed)
            if other is None:
                continue
            left = _failure(other, inputs)
            if left is None:
                yield other, inputs
            elif str(left) != str(failure):  # one step further
                yield from attempt(other, inputs, left)

    refused: dict[str, tuple[int, dict[str, Any], Exception]] = {}
    for entry in tried.refused:
        refused.setdefault(str(entry[-1]), entry)
    # Those first that repairs of the inputs brought furthest.
    for _, inputs, failure in sorted(refused.values(), key=lambda entry: entry[0])[:_REFUSED]:
        yield from attempt(model, inputs, failure)


def _as_part(model_type: str, seed: int, tried: _Tried) -> Iterator[Found]:
    """The module of this type in a model that holds one, with the arguments that it gets there."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    for whole in _parts.wholes(kind):
        ran = False
        running = _running(whole, seed, _Tried(whole, tried.until + _SECONDS / 2), complete=True)
        sizes = itertools.groupby(running, key=lambda found: id(found[0]))
        for _, same in itertools.islice(sizes, _SIZES):
            found = list(itertools.islice(same, _RUNS))
            ran = ran or bool(found)
            for model, inputs in itertools.chain(found, _extended(found[:2], seed, tried)):
                for part, arguments in _parts.recorded(model, inputs, kind):
                    if _failure(part, arguments) is None:
                        yield part, arguments
        tried.wholes.append(f"{whole}, which holds it, {'runs without it' if ran else 'does not run either'}")


def _extended(found: list[Found], seed: int, tried: _Tried) -> Iterator[Found]:
    """With one more input each, also where the model then fails after the part that it is for."""
    for model, inputs in found:
        for more in InputMaker(model).extended(inputs):
            yield model, more
            failure = _failure(model, more)
            if failure is not None:
                tried.refused = [(0, more, failure)]
                yield from _agreed(model, seed, tried)


def _accepted(model: nn.Module, tried: _Tried) -> Iterator[dict[str, Any]]:
    """The inputs that the model runs on; why it did not run on the others is added to the reasons."""
    maker = InputMaker(model)
    seen = set()
    until = time.process_time() + _SLICE

    def attempt(inputs: dict[str, Any], repairs: int) -> Iterator[dict[str, Any]]:
        kinds = frozenset((name, *_kind(value)) for name, value in inputs.items())
        if kinds in seen or tried.long_enough() or time.process_time() > until:
            return
        seen.add(kinds)
        failure = _failure(model, inputs)
        if failure is None:
            yield inputs
            return
        tried.reasons.append(_short(failure))
        if disagreeing(str(failure)):
            tried.refused.append((repairs, inputs, failure))
        for other in _repaired(maker, inputs, failure, tried) if repairs else ():
            yield from attempt(other, repairs - 1)

    for inputs in maker.candidates():
        yield from attempt(inputs, _REPAIRS)


def _kind(value: Any) -> tuple[str, int]:
    """What makes another value of an input worth a try: its shape, or smaller integers."""
    integers = isinstance(value, torch.Tensor) and value.dtype == torch.long and value.numel() > 0
    return str(getattr(value, "shape", value)), int(value.max()).bit_length() if integers else 0


def _repaired(
    maker: InputMaker, inputs: dict[str, Any], failure: Exception, tried: _Tried
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    try:
        found.extend(maker.repaired(inputs, failure))
    except Exception as error:  # the inputs are of a kind that a repair did not expect
        tried.reasons.append(_short(error))
    return found


def _failure(model: nn.Module, inputs: dict[str, Any], train: bool = False) -> Exception | None:
    try:
        with torch.no_grad():
            model.train(train)(**inputs)
    except Exception as error:
        return error
    return None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

"""The search for a tiny model that runs, and for inputs that it runs on."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from modeprobe.probe.architectures import models as _models
from modeprobe.probe.architectures import parts as _parts
from modeprobe.probe.architectures.agreement import agreeing, answerable
from modeprobe.probe.architectures.configurations import Source
from modeprobe.probe.architectures.inputs import InputMaker
from modeprobe.probe.architectures.narrowing import narrowed, parameters

_SECONDS = 60  # of the processor's time, after which nothing else is tried
_SLICE = 12  # of them for the models in which the sizes of one that failed agree
_GLANCE = 2  # of them for the latter, before a model is run that is not tiny
_PATIENCE = 20  # of them for a tiny model, where there is a larger one
_SLOW = 2  # of them for a failure, after which no larger inputs are tried
_TINY = (
    4_000_000  # parameters; before more are run, the sizes of smaller models that failed are made to agree
)
_REPAIRS = 4  # of inputs, one upon the other
_REFUSED = 12  # inputs by whose failures the sizes of a model are made to agree
_SIZES = 4  # or classes of a whole that runs, in search of a part that it calls
_RUNS = 8  # of a model, until one runs in train mode too, or of a whole, until one reaches the part

Found = tuple[nn.Module, dict[str, Any]]
_Refused = tuple[int, dict[str, Any], Exception]  # repairs that were left, inputs, failure


def find(source: Source, show: Callable[[str], None]) -> Found | str:
    """The first model that runs in both modes, else the first that runs, with inputs; or what was tried."""
    tried = _Tried(source.model_type, show=show)
    if source.make_inputs is not None:
        tried.maker = partial(_Given, source.make_inputs)
    found = _first(_running(source, tried))
    if found is None and source == Source(source.model_type, source.seed):
        found = _first(_as_part(source, tried))
    if found is None:
        return str(tried)
    return found if parameters(found[0]) <= _TINY else (narrowed(*found, source, show), found[1])


def _first(running: Iterator[Found]) -> Found | None:
    """The first that also runs in train mode, else the first."""
    found = None
    for model, inputs in itertools.islice(running, _RUNS):
        if _failure(model, inputs, train=True) is None:
            return model, inputs
        found = found or (model, inputs)
    return found


class _Given:
    """Inputs as they are given, without repairs."""

    def __init__(self, make_inputs: Callable[[nn.Module], dict[str, Any]], model: nn.Module) -> None:
        self.make_inputs = make_inputs
        self.model = model

    def candidates(self) -> Iterator[dict[str, Any]]:
        yield self.make_inputs(self.model)

    def repaired(self, inputs: dict[str, Any], error: Exception) -> Iterator[dict[str, Any]]:
        yield from ()


class _Tried:
    """Why a model type could not be built, or did not run on the inputs tried."""

    def __init__(
        self, model_type: str, until: float | None = None, show: Callable[[str], None] = lambda text: None
    ) -> None:
        self.model_type = model_type
        self.show = show
        self.ran = False
        self.start = time.process_time()
        self.until = until or self.start + _SECONDS
        self.maker: Callable[[nn.Module], InputMaker | _Given] = InputMaker
        self.instead = ""
        self.reasons: list[str] = []
        self.refused: list[_Refused] = []
        self.slow: float = math.inf  # elements of inputs that took too long to fail
        self.wholes: list[str] = []

    def seconds(self) -> float:
        return time.process_time() - self.start

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
            "Give values that it lacks by --set, or a config.json for its type, and inputs by --input; "
            "or probe a model of your own by package.module:factory."
        )


def _running(source: Source, tried: _Tried, complete: bool = False) -> Iterator[Found]:
    """Models of this type with inputs that they run on, the smallest first."""
    try:
        config = source.start(complete)
    except Exception as error:
        lacking = "configuration with these values" if source.kept else "default configuration"
        tried.instead = f"transformers has no {lacking} of {source.model_type}: {_short(error)}"
        return
    refusing: list[tuple[type[nn.Module], Any, list[_Refused]]] = []
    large: list[Found] = []
    hurried = 0

    def enough() -> bool:
        return tried.long_enough() or (bool(large) and tried.seconds() > _PATIENCE)

    def agreed(entries: list[tuple[type[nn.Module], Any, list[_Refused]]], seconds: float) -> Iterator[Found]:
        for entry in entries:
            if enough():
                return
            for found in _agreed(*entry, source, time.process_time() + seconds):
                if parameters(found[0]) <= _TINY:
                    yield found
                elif len(large) < _RUNS:
                    large.append(found)

    for model in _models.models(config, source):
        if enough() or (refusing and tried.seconds() > _SECONDS - 2 * _SLICE):
            break
        if isinstance(model, ImportError) and not str(model.name).startswith("transformers."):
            tried.instead = f"{source.model_type} needs a package: {_short(model)}"
            return
        if isinstance(model, Exception):
            tried.reasons.append(_short(model))
            continue
        if not tried.ran:
            tried.ran, tried.reasons = True, []
        count = parameters(model)
        tried.show(f"looking for inputs of a {type(model).__name__} with {count:,} parameters")
        if count > _TINY:
            yield from agreed(refusing[hurried:], _GLANCE)
            hurried = len(refusing)
        for runs in _models.runnable(model):
            before, ran = len(tried.reasons), False
            tried.refused = []
            for inputs in _accepted(runs, tried):
                ran = True
                yield runs, inputs
            if len(tried.reasons) == before:
                tried.reasons.append(f"{type(runs).__name__}.forward() does not say what it takes")
            if not ran and runs is model and tried.refused:
                refusing.append((type(model), model.config, tried.refused))
    yield from agreed(refusing, _SLICE)
    yield from large


def _agreed(
    kind: type[nn.Module], config: Any, refused: list[_Refused], source: Source, until: float
) -> Iterator[Found]:
    """Models like the one that failed, in which the sizes agree that the failures name, with its inputs."""
    seen: set[str] = set()

    def attempt(config: Any, inputs: dict[str, Any], failure: Exception) -> Iterator[Found]:
        for values in agreeing(config.to_dict(), str(failure)):
            if repr(values) in seen or time.process_time() > until:
                continue
            seen.add(repr(values))
            model: Any = _models.again(kind, config, values, source)
            if model is None:
                continue
            left = _failure(model, inputs)
            if left is None:
                yield model, inputs
            elif str(left) != str(failure):  # one step further
                yield from attempt(model.config, inputs, left)

    first: dict[str, _Refused] = {}
    for entry in refused:
        first.setdefault(str(entry[-1]), entry)
    # Those first that repairs of the inputs brought furthest.
    for _, inputs, failure in sorted(first.values(), key=lambda entry: entry[0])[:_REFUSED]:
        yield from attempt(config, inputs, failure)


def _as_part(source: Source, tried: _Tried) -> Iterator[Found]:
    """The module of this type in a model that holds one, with the arguments that it gets there."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[source.model_type]
    for whole in _parts.wholes(kind):
        ran = False
        holding = Source(whole, source.seed)
        within = _Tried(whole, tried.until + _SECONDS / 2, tried.show)
        running = _running(holding, within, complete=True)
        sizes = itertools.groupby(running, key=lambda found: id(found[0]))
        for _, same in itertools.islice(sizes, _SIZES):
            found: list[Found] = []
            for model, inputs in itertools.islice(same, _RUNS):
                ran = True
                found.append((model, inputs))
                yield from _part(model, inputs, kind)
            for model, inputs in _extended(found[:2], holding):
                yield from _part(model, inputs, kind)
        tried.wholes.append(f"{whole}, which holds it, {'runs without it' if ran else 'does not run either'}")


def _part(whole: nn.Module, inputs: dict[str, Any], kind: type) -> Iterator[Found]:
    for part, arguments in _parts.recorded(whole, inputs, kind):
        if _failure(part, arguments) is None:
            yield part, arguments


def _extended(found: list[Found], source: Source) -> Iterator[Found]:
    """With one more input each, also where the model then fails after the part that it is for."""
    for model, inputs in found:
        for more in InputMaker(model).extended(inputs):
            yield model, more
            failure = _failure(model, more)
            if failure is not None:
                until = time.process_time() + _SLICE / 4
                yield from _agreed(type(model), model.config, [(0, more, failure)], source, until)


def _accepted(model: nn.Module, tried: _Tried) -> Iterator[dict[str, Any]]:
    """The inputs that the model runs on; why it did not run on the others is added to the reasons."""
    maker = tried.maker(model)
    seen = set()

    def attempt(inputs: dict[str, Any], repairs: int) -> Iterator[dict[str, Any]]:
        kinds = frozenset((name, *_kind(value)) for name, value in inputs.items())
        size = sum(value.numel() for value in inputs.values() if isinstance(value, torch.Tensor))
        start = time.process_time()
        if kinds in seen or size > tried.slow or tried.long_enough():
            return
        seen.add(kinds)
        failure = _failure(model, inputs)
        if failure is not None and time.process_time() - start > _SLOW:
            tried.slow = size
        if failure is None:
            yield inputs
            return
        tried.reasons.append(_short(failure))
        if answerable(str(failure)):
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
    maker: InputMaker | _Given, inputs: dict[str, Any], failure: Exception, tried: _Tried
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

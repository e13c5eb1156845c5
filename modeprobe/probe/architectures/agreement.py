"""Configurations whose sizes agree, and that lack no field, by what a model says when it fails."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from modeprobe.probe.architectures.sizes import usual

Values = dict[str, Any]

# What a layer is built for, and what it was given.
_BUILT, _GIVEN = r"(?P<built>\d+)", r"(?P<given>\d+)"
_DISAGREEING = tuple(
    re.compile(pattern)
    for pattern in (
        rf"cannot be multiplied \(\d+x{_GIVEN} and {_BUILT}x\d+\)",
        rf"batch2 tensor to be: \[\d+, {_GIVEN}\] but got: \[\d+, {_BUILT}\]",
        rf"to have {_BUILT} channels, but got {_GIVEN} channels",
        rf"should contain {_GIVEN} elements not {_BUILT}",
        rf"normalized_shape=\[{_BUILT}\].*got input of size\[.*?{_GIVEN}\]",
        rf"[Ee]xpected size {_BUILT} but got size:? {_GIVEN}",
        rf"tensor a \({_GIVEN}\) must match .* tensor b \({_BUILT}\)",
    )
)
_LACKING = re.compile(r"[Cc]ould not find an? `(\w+)` argument in the config")
_WIDTH = re.compile(
    r"^(?!.*(vocab|image|patch|kernel|window)_)"
    r".*(dims?|hidden\w*|channels?|filters|sizes?|latents|features|widths?)$"
)


def answerable(failure: str) -> bool:
    """Whether other values can be read from the failure."""
    return bool(disagreeing(failure) or _LACKING.search(failure))


def disagreeing(failure: str) -> list[tuple[int, int]]:
    """The pairs of sizes that the failure says should be the same: what a layer is built for, what it got."""
    found = (pattern.search(failure) for pattern in _DISAGREEING)
    pairs = ((int(match["built"]), int(match["given"])) for match in found if match)
    return [(built, given) for built, given in pairs if built != given]


def agreeing(values: Values, failure: str) -> Iterator[Values]:
    """With the field that the failure says is lacking, or a width that is one of its sizes made the other.

    Which of the two is at fault is not said, nor which of several equal widths. What a layer is built for
    goes first: when that is changed, all before it still runs.
    """
    lacking = _LACKING.search(failure)
    if lacking and (value := usual(lacking[1])) is not None:
        yield _completed(values, lacking[1], value)
    for built, given in disagreeing(failure):
        for was, becomes in ((built, given), (given, built)):
            places = list(_places(values, was))
            choices = [{place} for place in places] + ([set(places)] if len(places) > 1 else [])
            yield from (_changed(values, chosen, becomes) for chosen in choices)


def _completed(values: Values, name: str, value: Any) -> Values:
    found = {
        field: _completed(held, name, value) if isinstance(held, dict) and "model_type" in held else held
        for field, held in values.items()
    }
    return {**found, name: value if found.get(name) is None else found[name]}


def _places(values: Values, was: int, before: tuple = ()) -> Iterator[tuple]:
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from _places(value, was, (*before, name))
        elif _WIDTH.search(name) and not isinstance(value, bool):
            if value == was:
                yield (*before, name)
            elif isinstance(value, (list, tuple)):
                yield from ((*before, name, index) for index, item in enumerate(value) if item == was)


def _changed(values: Values, places: set[tuple], becomes: int, before: tuple = ()) -> Values:
    found: Values = {}
    for name, value in values.items():
        path = (*before, name)
        if isinstance(value, dict) and "model_type" in value:
            found[name] = _changed(value, places, becomes, path)
        elif isinstance(value, (list, tuple)):
            found[name] = [becomes if (*path, index) in places else item for index, item in enumerate(value)]
        else:
            found[name] = becomes if path in places else value
    return found

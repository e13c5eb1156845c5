"""The smallest configuration that a model can still be built from, between two that are given."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from modeprobe.probe.architectures.sizes import LAYERS

_REDUCTIONS = 3
_ANY_WIDTH = re.compile(r"(dim|dims|hidden\w*|channels?|filters|size|sizes|latents|features|width|rank)$")

Values = dict[str, Any]
_Path = tuple[str, ...]


def fitting(values: Values, small: Values, builds: Callable[[Values], bool]) -> Iterator[Values]:
    """With as many of the small values as it can be built with; then with its large widths divided."""
    found = _most(values, small, builds)
    for _ in range(_REDUCTIONS):
        yield found
        found = _most(found, _reduced(found), builds)


def _most(values: Values, small: Values, builds: Callable[[Values], bool]) -> Values:
    """With as many of the small values as a model can be built from, found by halving what is refused."""
    # Those of one part stay together, its depth and its lists by layer above all.
    paths = sorted(_differing(values, small), key=lambda path: (path[:-1], path[-1] not in LAYERS))
    pending, found = [paths] if paths else [], values
    while pending:
        tried = pending.pop()
        mixed = _mixed(found, small, set(tried))
        if builds(mixed):
            found = mixed
        elif len(tried) > 1:
            middle = len(tried) // 2
            pending += [tried[middle:], tried[:middle]]
    return found


def _differing(values: Values, small: Values) -> Iterator[_Path]:
    for name, value in values.items():
        other = small.get(name)
        if isinstance(value, dict) and isinstance(other, dict) and "model_type" in value:
            yield from ((name, *path) for path in _differing(value, other))
        elif value != other:
            yield (name,)


def _mixed(values: Values, small: Values, paths: set[_Path], before: _Path = ()) -> Values:
    """The values, but the small ones at these paths."""
    mixed: Values = {}
    for name, value in values.items():
        path = (*before, name)
        other = small.get(name)
        if isinstance(value, dict) and isinstance(other, dict) and "model_type" in value:
            mixed[name] = _mixed(value, other, paths, path)
        elif path not in paths:
            mixed[name] = value
        elif name in small:
            mixed[name] = other
    return mixed


def _reduced(values: Values) -> Values:
    """With a quarter of every large width, whatever its name."""

    def less(value: Any) -> Any:
        if isinstance(value, list):
            return [less(item) for item in value]
        whole = isinstance(value, int) and not isinstance(value, bool)
        return value // 4 if whole and value >= 32 and value % 4 == 0 else value

    return {
        name: _reduced(value)
        if isinstance(value, dict) and "model_type" in value
        else less(value)
        if _ANY_WIDTH.search(name)
        else value
        for name, value in values.items()
    }

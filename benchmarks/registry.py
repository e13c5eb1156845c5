"""What is measured: a work is an operation with its shape, type, layout, bytes and reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import zip_longest
from typing import Any

MODES = ("forward", "backward", "forward_backward", "evaluation", "step")
EAGER, GRAPH = ", eager calls", ", CUDA graph"  # how a group's name ends where a work is measured both ways


class Unavailable(Exception):
    """A provider cannot do this work here; the message says why."""


@dataclass
class Candidate:
    """A provider's way to do a work.

    ``run`` does the work once and returns what ``Problem.verify`` looks at. ``forward`` does the part
    that saves tensors for the backward pass, for the memory figure; None when there is none.
    """

    run: Callable[[], Any]
    forward: Callable[[], Any] | None = None
    context: Callable[[], AbstractContextManager] = nullcontext
    note: str = ""


def with_context(candidate: Candidate, context: Callable[[], AbstractContextManager]) -> Candidate:
    """The candidate with ``context`` entered around its own."""
    inner = candidate.context

    @contextmanager
    def both() -> Iterator[None]:
        with context(), inner():
            yield

    candidate.context = both
    return candidate


@dataclass
class Problem:
    """A work on a device: how each provider is set up, and how a result is judged.

    Args:
        candidates: a setup per provider; it raises :class:`Unavailable` with a reason where the
            provider has no such operation.
        verify: what is wrong with a result, in words; None when nothing is.
        floors: plain passes over the same tensor; not verified.
    """

    candidates: dict[str, Callable[[], Candidate]]
    verify: Callable[[Any], str | None]
    floors: dict[str, Callable[[], Candidate]] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """One row of the tables.

    Args:
        family: what is done, such as ``"dropout"``.
        mode: one of ``MODES``.
        shape: of the input.
        dtype: of the input, without ``torch.``.
        passes: how often the operation has to read or write a tensor of the input's size. The bytes
            of a work are ``passes`` times the bytes of its input.
        setup: builds the problem on a device.
        layout: ``"contiguous"`` or ``"channels_last"``.
        unit: the floor that is one plain pass with the same kind of output: ``"x.clone()"`` for a fresh
            one, ``"y.copy_(x)"`` for one that exists.
        groups: the charts it belongs to.
        compiled: whether torch.compile is among the peers.
        count: how often the work occurs in what its groups stand for.
        replays: on a GPU the work is measured a second time, as ``replay``.
        replayed: it is that second time: each provider's calls replayed from a CUDA graph.
    """

    family: str
    mode: str
    shape: tuple[int, ...]
    dtype: str
    passes: float
    setup: Callable[[Work, str], Problem] = field(compare=False, repr=False)
    layout: str = "contiguous"
    unit: str = "x.clone()"
    groups: tuple[str, ...] = ()
    compiled: bool = False
    count: int = 1
    replays: bool = False
    replayed: bool = False

    @property
    def name(self) -> str:
        parts = [self.family, self.mode, shape_name(self.shape), self.dtype]
        if self.layout != "contiguous":
            parts.append(self.layout)
        if self.replayed:
            parts.append("graph")
        return "/".join(parts)

    @property
    def replay(self) -> Work:
        groups = (group.removesuffix(EAGER) + GRAPH for group in self.groups if group.endswith(EAGER))
        return replace(self, groups=tuple(groups), replays=False, replayed=True)

    @property
    def ways(self) -> tuple[Work, ...]:
        """The work, and its replay where there is one: what the rows of one measurement are about."""
        return (self, self.replay) if self.replays else (self,)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return round(self.passes * self.elements * item_size(self.dtype))


def item_size(dtype: str) -> int:
    return {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[dtype]


def shape_name(shape: tuple[int, ...]) -> str:
    """``2^20`` for a flat power of two from 1024 on, otherwise sizes joined by x."""
    if len(shape) == 1 and shape[0] >= 1024 and shape[0] & (shape[0] - 1) == 0:
        return f"2^{shape[0].bit_length() - 1}"
    return "x".join(map(str, shape))


def distinct(works: Iterable[Work]) -> list[Work]:
    """Works by name, the first of each; groups and peers of later ones with the same name are added."""
    found: dict[str, Work] = {}
    for work in works:
        earlier = found.get(work.name)
        if earlier is None:
            found[work.name] = work
            continue
        found[work.name] = replace(
            earlier,
            groups=tuple(dict.fromkeys((*earlier.groups, *work.groups))),
            compiled=earlier.compiled or work.compiled,
            replays=earlier.replays or work.replays,
            count=max(earlier.count, work.count),
        )
    return list(found.values())


def all_works(device: str) -> Iterator[Work]:
    """Every work for ``device``, "cpu" or "cuda"."""
    from . import works_batch_norm, works_dropout, works_models

    # In turns, so that a run that ends early has figures of both families.
    for pair in zip_longest(works_dropout.target_works(device), works_batch_norm.target_works(device)):
        yield from filter(None, pair)
    yield from works_models.model_works(device)
    yield from works_batch_norm.layer_works(device)
    for module in (works_dropout, works_batch_norm):
        yield from module.size_works(device)


def select(works: Iterable[Work], pattern: str | None = None) -> list[Work]:
    """The distinct works whose name matches a shell pattern, or contains it.

    Raises:
        ValueError: no work matches; the message lists what there is.
    """
    every = distinct(works)
    if pattern is None:
        return every
    chosen = [work for work in every if fnmatch(work.name, pattern) or pattern in work.name]
    if not chosen:
        families = ", ".join(sorted({work.family for work in every}))
        raise ValueError(
            f"works: no work matches {pattern!r}; families are {families}, a full name is {every[0].name}"
        )
    return chosen

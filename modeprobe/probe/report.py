"""The probe's answer as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CAUSES = (
    "module_dropout",
    "functional_dropout",
    "attention_dropout",
    "stochastic_depth",
    "random_noise",
    "batch_statistics",
    "branch",
    "opaque",
)


@dataclass(frozen=True)
class Site:
    """One place in the model where the mode, or chance, has an effect.

    path: module path; what: the call or module; cause: a word of CAUSES ("" for a site that does not depend
    on the mode); p: drop probability; file, line: source; modes: in which modes it acts;
    amount: relative change of the module's own output, None when not measured.
    """

    path: str
    what: str
    cause: str
    p: float | None
    file: str
    line: int
    modes: tuple[str, ...]
    amount: float | None = None
    calls: int = 1


@dataclass(frozen=True)
class Idle:
    """A dropout module without effect: `why` is "p = 0", "never called" or "not in training mode"."""

    path: str
    p: float
    why: str


@dataclass(frozen=True)
class Mutation:
    """State that changed. when: "train()", "eval()", "forward in train mode" or "forward in eval mode"."""

    name: str
    when: str


@dataclass(frozen=True)
class BatchNormInfo:
    """One batch-normalisation layer. source: where its statistics come from in eval mode."""

    path: str
    kind: str
    source: str
    momentum: float | None
    batches: int | None
    initial_weight_left: float | None


@dataclass(frozen=True)
class Failure:
    """An exception in the model: in which mode and phase it was raised."""

    mode: str
    phase: str
    error: str


@dataclass
class Report:
    """What train() and eval() change. `str(report)` is for reading, `to_json()` for programs."""

    model: str
    effect: str = "unknown"
    causes: frozenset[str] = frozenset()
    train_is_random: bool = False
    eval_is_random: bool = False
    train_is_reproducible: bool = True
    eval_is_reproducible: bool = True
    verdict: str = ""
    amount: float = 0.0
    sites: list[Site] = field(default_factory=list)
    ungated: list[Site] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    mutations: list[Mutation] = field(default_factory=list)
    batch_norms: list[BatchNormInfo] = field(default_factory=list)
    output_differences: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    forwards: int = 0

    def __str__(self) -> str:
        from modeprobe.probe.text import to_text

        return to_text(self)

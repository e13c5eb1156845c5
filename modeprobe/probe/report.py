"""The probe's answer as data."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeprobe.statistics.report import DriftReport

from modeprobe.probe.leaves import LeafDifference

SCHEMA = "modeprobe.report/1"

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

    path: module path; what: the call, or what changes; cause: a word of CAUSES ("" for a site that does not
    depend on the mode); p: drop probability; file, line: source; modes: in which modes it acts;
    amount: change of the module's own output, reach: change of the model's output, both as the largest
    difference divided by the largest magnitude (None: not measured); calls: how often it acts in one forward;
    owners: paths of the modules whose flag gates it.
    """

    path: str
    what: str
    cause: str
    p: float | None
    file: str
    line: int
    modes: tuple[str, ...]
    amount: float | None = None
    reach: float | None = None
    calls: int = 1
    owners: tuple[str, ...] = ()


@dataclass(frozen=True)
class Idle:
    """A dropout module without effect.

    why: "p = 0", "never called", "not in training mode" or "does not reach the output".
    """

    path: str
    p: float
    why: str


@dataclass(frozen=True)
class Mutation:
    """State that changed. when: "train()", "eval()", "forward in train mode" or "forward in eval mode"."""

    name: str
    when: str
    kind: str = "buffer"

    @property
    def expected(self) -> bool:
        """Buffers that a forward in train mode updates, such as running statistics."""
        return self.kind == "buffer" and self.when == "forward in train mode"


@dataclass(frozen=True)
class BatchNormInfo:
    """One batch-normalisation layer.

    source: where its statistics come from in eval mode; batches: how many it has seen;
    initial_weight_left: weight (1 - momentum)^batches that the initial values (0, 1) still have.
    """

    path: str
    kind: str
    source: str
    momentum: float | None
    batches: int | None
    initial_weight_left: float | None


@dataclass(frozen=True)
class Failure:
    """An exception in the model: its mode and phase. sometimes: with other seeds there was none."""

    mode: str
    phase: str
    error: str
    sometimes: bool = False


@dataclass(frozen=True)
class Part:
    """A module in the tree. role: a word of CAUSES, "ungated", "idle", "reads", "norm" or ""."""

    path: str
    kind: str
    role: str
    training: bool
    calls: int


@dataclass(repr=False)
class Report:
    """What train() and eval() change. `print(report)` to read it; `to_json()` for programs.

    effect: "none", "differs", or "unknown" when the model could not be run. causes: words of CAUSES.
    train_is_random, eval_is_random: outputs change with the seed, or cannot be reproduced under one.
    sites: places with an effect on the outputs. ungated: random calls that stay on in eval mode.
    idle: dropout modules without effect. mixed: modules whose mode disagrees with the model's.
    mutations: state that a forward or a toggle changes. readers: number of modules that read their mode.
    generation_same: whether greedy text agrees in both modes (None: not compared).
    """

    model: str
    effect: str = "unknown"
    causes: frozenset[str] = frozenset()
    train_is_random: bool = False
    eval_is_random: bool = False
    train_is_reproducible: bool = True
    eval_is_reproducible: bool = True
    verdict: str = ""
    amount: float = 0.0
    modules: int = 0
    parameters: int = 0
    readers: int = 0
    sites: list[Site] = field(default_factory=list)
    ungated: list[Site] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    mutations: list[Mutation] = field(default_factory=list)
    batch_norms: list[BatchNormInfo] = field(default_factory=list)
    drift: DriftReport | None = None  # of the running statistics, where a loader was given
    output_leaves: int = 0
    output_differences: list[LeafDifference] = field(default_factory=list)
    main_output_same: bool = False
    random_streams: list[str] = field(default_factory=list)
    generation_same: bool | None = None
    generation_detail: str = ""
    checkpointing: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    forwards: int = 0
    seconds: float = 0.0
    parts: list[Part] = field(default_factory=list)

    @property
    def suspicious(self) -> list[str]:
        """What is rarely meant: random in eval, ungated sites, mixed modes, state changed silently."""
        found = []
        if self.eval_is_random:
            found.append("random in eval mode")
        if self.ungated:
            found.append("ungated random calls")
        if self.mixed:
            found.append("mixed modes")
        if any(not mutation.expected for mutation in self.mutations):
            found.append("state changed by a forward or by toggling the mode")
        if self.generation_same is False and not self.train_is_random:
            found.append("generate() depends on the mode")
        return found

    @property
    def exit_code(self) -> int:
        """0: nothing differs, 1: differs, 2: suspicious, 3: could not be run."""
        if self.effect == "unknown":
            return 3
        if self.suspicious:
            return 2
        return 1 if self.effect == "differs" or self.generation_same is False else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the layout named by the key "schema"."""
        data = {"schema": SCHEMA, **dataclasses.asdict(self)}
        data["causes"] = sorted(self.causes, key=CAUSES.index)
        data["suspicious"] = self.suspicious
        data["exit_code"] = self.exit_code
        return _plain(data)

    def to_json(self, indent: int | None = 2) -> str:
        """Versioned JSON (see docs/probe.md); infinities and NaN become null."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def to_markdown(self) -> str:
        from modeprobe.probe.text import to_markdown

        return to_markdown(self)

    def to_html(self) -> str:
        """One self-contained page with the module tree coloured by what each part does."""
        from modeprobe.probe.html import to_html

        return to_html(self)

    def __str__(self) -> str:
        from modeprobe.probe.text import to_text

        return to_text(self)

    __repr__ = __str__  # what a prompt and a failed assertion show

    def __rich__(self) -> Any:
        from modeprobe.probe.text import to_rich

        return to_rich(self)

    def _repr_html_(self) -> str:
        from modeprobe.probe.html import to_fragment

        return to_fragment(self)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

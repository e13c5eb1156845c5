"""Records of what a forward pass does with its mode, and which torch functions are dropout or statistics."""

from __future__ import annotations

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
# Lines of torch that only pass a call on.
_PLUMBING = (
    "overrides.py",
    "functional.py",
    "_python_dispatch.py",
    "eval_frame.py",
    "_ops.py",
    "_compile.py",
    "module.py",
)


class Place(NamedTuple):
    """A line of source."""

    file: str
    line: int


class Key(NamedTuple):
    """Identity of an event across runs: the same call site in the same module.

    at: which of the calls in that line.
    """

    kind: str
    name: str
    path: str
    place: Place
    at: int = 0


@dataclass
class Event:
    """One call that is random or uses batch statistics.

    kind: "dropout", "attention" (dropout inside scaled-dot-product attention), "depth" (a function for
    stochastic depth), "statistics", "draw" (any other random draw), "reseed" (a global random state is set).
    active: whether it does something (p > 0 and training; batch statistics in use; a value drawn).
    silenced: it was told to do nothing.
    binary, scales, steers: for a draw, whether its values are turned into a mask of zeros and ones, whether
    they multiply a larger tensor, and whether they decide a Python branch. axis: of that tensor, the only one
    along which the values vary, unless it is the last (0 for a single value).
    """

    key: Key
    module_type: type
    active: bool
    p: float | None
    shape: tuple[int, ...] = ()
    silenced: bool = False
    binary: bool = False
    scales: bool = False
    axis: int | None = None
    steers: bool = False

    @property
    def kind(self) -> str:
        return self.key.kind

    @property
    def scalar(self) -> bool:
        return all(n == 1 for n in self.shape)

    @property
    def coin(self) -> bool:
        """A draw that may decide what runs: one value, or several that Python code takes one by one."""
        return self.scalar or self.steers or (self.key.name.startswith("numpy.") and len(self.shape) == 1)


class Read(NamedTuple):
    """One line that reads the mode of module `owner` while module `path` executes (None: no module)."""

    owner: str
    path: str | None
    place: Place


@dataclass
class Trace:
    """All records of one run.

    calls, rows: how often each module was called, by path, and on how many rows of its first tensor in all.
    flags: each module's mode.
    """

    events: list[Event] = field(default_factory=list)
    reads: Counter[Read] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    flags: dict[str, bool] = field(default_factory=dict)
    types: dict[str, type] = field(default_factory=dict)
    error: Exception | None = None

    @property
    def layers(self) -> tuple[Counter[str], Counter[str]]:
        """Which modules ran, and on how much."""
        return self.calls, self.rows

    def active(self) -> dict[Key, list[Event]]:
        found: dict[Key, list[Event]] = {}
        for event in self.events:
            if event.active:
                found.setdefault(event.key, []).append(event)
        return found


def caller_place() -> Place:
    return call_site()[0]


def call_site() -> tuple[Place, int]:
    """The innermost line of the model's own code, and where in its bytecode; inside torch only where nothing
    else is on the stack."""
    frame: Any = sys._getframe(1)
    inner: tuple[Place, int] | None = None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_HERE):
            if frame.f_code.co_name == "__call__" and name.endswith("call.py"):
                break
        elif not name.startswith((_TORCH, "<frozen")):
            return Place(name, frame.f_lineno), frame.f_lasti
        elif inner is None and not name.endswith(_PLUMBING):
            inner = Place(name, frame.f_lineno), frame.f_lasti
        frame = frame.f_back
    return inner or (Place("", 0), 0)


class Signature(NamedTuple):
    """Where a dropout function takes p and its mode, the mode by default, and the kind of its events."""

    p: int = 1
    training: int = 2
    default: bool = True
    kind: str = "dropout"


# torch's and modeprobe's own.
_DROPOUTS = {
    **dict.fromkeys(
        """dropout dropout_ dropout1d dropout2d dropout3d feature_dropout feature_dropout_
        native_dropout""".split(),  # noqa: SIM905
        Signature(),
    ),
    **dict.fromkeys(
        """alpha_dropout alpha_dropout_ feature_alpha_dropout
        feature_alpha_dropout_""".split(),  # noqa: SIM905
        Signature(default=False),
    ),
    "bias_dropout_add": Signature(p=3, training=4),
    "softmax_dropout": Signature(training=3),
    "drop_path": Signature(kind="depth"),
}
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})

# Functions that always draw; others are recognised by the random state they move.
DRAWS = frozenset(
    """rand randn randint randperm rand_like randn_like randint_like bernoulli bernoulli_ normal normal_
    uniform_ multinomial exponential_ random_ cauchy_ geometric_ log_normal_ poisson binomial gumbel_softmax
    fractional_max_pool2d fractional_max_pool3d""".split()  # noqa: SIM905
)


def argument(args: tuple, kwargs: dict, index: int, names: tuple[str, ...], default: Any) -> Any:
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[index] if len(args) > index else default


def recurrent_dropout_index(args: tuple) -> int | None:
    """Position of `dropout` in the arguments of torch.lstm and its kin (its only float)."""
    return next((i for i, value in enumerate(args) if isinstance(value, float)), None)


def classify(name: str, args: tuple, kwargs: dict) -> tuple[str, bool, float | None] | None:
    """(kind, active, p) of a torch function that is known by name, None for any other."""
    if name in _DROPOUTS:
        signature = _DROPOUTS[name]
        p = float(argument(args, kwargs, signature.p, ("p",), 0.5))
        training = argument(args, kwargs, signature.training, ("training", "train"), signature.default)
        return signature.kind, bool(training) and p > 0, p
    if name in _RECURRENT:
        index = recurrent_dropout_index(args)
        if index is None:
            return None
        return "dropout", bool(args[index + 1]) and args[index] > 0 and args[index - 1] > 1, args[index]
    if name == "scaled_dot_product_attention":
        p = float(argument(args, kwargs, 4, ("dropout_p",), 0.0))
        return "attention", p > 0, p
    if name == "multi_head_attention_forward":
        p = float(argument(args, kwargs, 10, ("dropout_p",), 0.0))
        active = p > 0 and bool(argument(args, kwargs, 13, ("training",), True))
        # Without weights to return, torch calls scaled_dot_product_attention; else F.dropout on the weights.
        weights = argument(args, kwargs, 15, ("need_weights",), True)
        return "dropout" if weights else "attention", active, p
    if name in ("batch_norm", "native_batch_norm"):
        return "statistics", bool(argument(args, kwargs, 5, ("training",), False)), None
    if name == "instance_norm":
        return "statistics", bool(argument(args, kwargs, 5, ("use_input_stats",), True)), None
    return None


def mode_index(name: str) -> int:
    """Position of the mode in the arguments of a dropout function."""
    return _DROPOUTS[name].training


def is_recurrent(name: str) -> bool:
    return name in _RECURRENT

"""Where measured runs take place: on deep copies, or on the model itself with everything put back."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modeprobe.probe.call import told
from modeprobe.probe.randomness import preserved
from modeprobe.probe.state import Snapshot, bitwise_equal, shared_state, slots


@dataclass
class Lent:
    """A model to run, and the values its tensors had before (by name). Empty once it is given back."""

    model: nn.Module
    before: dict[str, Tensor]

    def twins(self) -> dict[int, Tensor]:
        """The values before, by the id of the tensor in `model`."""
        return {id(t): self.before[name] for name, t in named_tensors(self.model).items()}

    def changed(self) -> tuple[str, ...]:
        """Names of parameters and buffers whose values differ from before."""
        now = named_tensors(self.model)
        names = [
            name
            for name, tensor in now.items()
            if name not in self.before or not bitwise_equal(tensor, self.before[name])
        ]
        return tuple(names + [name for name in self.before if name not in now])


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class Workbench:
    """Gives out the model in its original state, once per run.

    strategy: "copy" (each run has its own deep copy) or "restore" (runs use the model itself, and all it
    reaches is put back afterwards); `reason` says why a copy was not possible.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.strategy = "copy"
        self.reason = ""
        self._last: Callable[[], nn.Module | None] = lambda: None
        if _is_compiled(model):
            self.strategy, self.reason = "restore", "a compiled model would be compiled again for every copy"
            return
        if any(True for module in model.modules() for _ in slots(module)):
            self.strategy, self.reason = "restore", "a deep copy of a module leaves out its __slots__"
            return
        try:
            with preserved():
                trial = self._copy()
        except Exception as error:
            self.strategy, self.reason = "restore", told(error)
            return
        if shared_state(model, trial):
            self.strategy, self.reason = (
                "restore",
                "a deep copy still refers to the original (closure or hook)",
            )

    @contextmanager
    def fresh(self) -> Iterator[Lent]:
        with preserved():
            snapshot = None
            if self.strategy == "copy":
                lent = Lent(self._copy(), named_tensors(self.model))
            else:
                snapshot = Snapshot([self.model])
                named = named_tensors(self.model).items()
                lent = Lent(self.model, {name: snapshot.values(tensor) for name, tensor in named})
            try:
                yield lent
            finally:
                vars(lent).clear()  # the borrower's variable must not keep a copy alive
                if snapshot is not None:
                    snapshot.restore()

    def _copy(self) -> nn.Module:
        """A deep copy, made when the last one is gone: never are there two at a time."""
        if self._last() is not None:
            gc.collect()  # a copy in a reference cycle
        made = copy.deepcopy(self.model)
        self._last = weakref.ref(made)
        return made


def _is_compiled(model: nn.Module) -> bool:
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    optimized = getattr(dynamo, "OptimizedModule", ())
    return any(
        isinstance(module, optimized) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )

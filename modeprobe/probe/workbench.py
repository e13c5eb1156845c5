"""Where measured runs take place: on deep copies, or on the model itself with everything put back."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modeprobe.probe.randomness import preserved
from modeprobe.probe.state import Snapshot, bitwise_equal, shared_state


@dataclass(frozen=True)
class Lent:
    """A model to run, and the values its tensors had before (by name)."""

    model: nn.Module
    before: dict[str, Tensor]

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
        if _is_compiled(model):
            self.strategy, self.reason = "restore", "a compiled model would be compiled again for every copy"
            return
        try:
            with preserved():
                trial = copy.deepcopy(model)
        except Exception as error:
            self.strategy, self.reason = "restore", f"{type(error).__name__}: {error}"
            return
        if shared_state(model, trial):
            self.strategy, self.reason = (
                "restore",
                "a deep copy still refers to the original (closure or hook)",
            )

    @contextmanager
    def fresh(self) -> Iterator[Lent]:
        with preserved():
            if self.strategy == "copy":
                yield Lent(copy.deepcopy(self.model), named_tensors(self.model))
                return
            snapshot = Snapshot([self.model])
            before = {name: snapshot.values(tensor) for name, tensor in named_tensors(self.model).items()}
            try:
                yield Lent(self.model, before)
            finally:
                snapshot.restore()


def _is_compiled(model: nn.Module) -> bool:
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    optimized = getattr(dynamo, "OptimizedModule", ())
    return any(
        isinstance(module, optimized) or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )

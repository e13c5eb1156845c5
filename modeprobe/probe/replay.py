"""Local replay: one module, one captured input, one random state; only the mode it reads is flipped.

The rest of the model is in eval mode, so that whatever changes is due to this module's own reading of the
mode. Each event has its own seed (trace.Control), so that a draw in one mode cannot shift another draw.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from modeprobe.probe.call import Call, told, without_frames
from modeprobe.probe.events import Key, Trace
from modeprobe.probe.instrument import flag_of, set_flag
from modeprobe.probe.leaves import drained, flatten
from modeprobe.probe.randomness import (
    RandomState,
    generator_state,
    preserved,
    private_generators,
    reseed_generator,
    seed_everything,
)
from modeprobe.probe.state import Snapshot, reachable
from modeprobe.probe.trace import Control, Tracer

SALT = 7


@dataclass
class Variant:
    """Output and events of one replay.

    unseen: random streams that moved without an event: generators of the model's own, functions captured
    before they could be intercepted. written: the module's own floating buffers that it wrote.
    """

    leaves: dict[str, Any]
    trace: Trace
    unseen: tuple[str, ...]
    written: tuple[str, ...] = ()


@dataclass
class Setting:
    """What all replays of one pass share.

    eval_flags: of the scratch model, by module. mutable: tensors that its forward writes to (by id).
    draws: names of functions found to draw. call: counts passes through the whole model. below: whether
    operators below Python are to be watched. twins: the values that its tensors started with (by id).
    """

    eval_flags: dict[nn.Module, bool]
    mutable: set[int]
    draws: set[str]
    call: Call
    below: bool = False
    twins: Mapping[int, Tensor] = field(default_factory=dict)


class ReplayBench:
    """Runs variants of one module call on a scratch model and puts everything back after each."""

    def __init__(
        self,
        tracer: Tracer,
        module: nn.Module,
        run: Callable[[], Any],
        arguments: Any,
        owners: dict[nn.Module, bool],
        setting: Setting,
    ) -> None:
        self.tracer, self.module, self.run, self.arguments = tracer, module, run, arguments
        self.owners, self.setting = owners, setting
        roots = [module, arguments, *owners]
        self.generators = private_generators(reachable(roots))

        def keep(tensor: Tensor) -> bool:
            return not isinstance(tensor, nn.Parameter) or id(tensor) in setting.mutable

        self.snapshot = Snapshot(roots, keep, setting.twins)
        self.state = RandomState()

    @property
    def is_whole(self) -> bool:
        return self.module is self.tracer.model

    @property
    def exhausted(self) -> bool:
        """Whether more runs would leave too few passes to follow what was found."""
        return self.is_whole and self.setting.call.left <= 11

    def variant(
        self,
        flipped: bool,
        *,
        silent: frozenset[Key] = frozenset(),
        salt: int = SALT,
        resalt: Mapping[Key, int] = types.MappingProxyType({}),
        force: int | None = None,
        forced: frozenset[Key] | None = None,
        functions: bool = True,
        shifted: frozenset[str] = frozenset(),
    ) -> Variant:
        """flipped: owners keep the mode they have in training; otherwise they are in eval mode.

        salt: seeds every event. resalt: seeds the events of these call sites instead.
        shifted: these buffers of the module start with other values.
        """
        control = Control(
            salt if functions else None, silent, resalt, force, forced, draws=self.setting.draws
        )
        tracer = Tracer(
            self.tracer.model, control, functions, below=functions and self.setting.below, like=self.tracer
        )
        if self.is_whole:
            self.setting.call.count()
        private = [generator_state(g) for g in self.generators]
        with preserved(), self._flags(flipped):
            self.state.restore()
            start = None
            if functions:
                seed_everything(salt)
                for generator in self.generators if salt != SALT else ():
                    reseed_generator(generator, salt)
                private = [generator_state(g) for g in self.generators]
                start = RandomState()
            for name in shifted:
                self.module._buffers[name].data.add_(1)  # type: ignore[union-attr]
            try:
                with tracer.active():
                    leaves = flatten(drained(self.run()))
            except Exception as error:
                leaves = {"": f"raised {told(error)}"}
                tracer.trace.error = without_frames(error)
            pairs = zip(private, self.generators, strict=True)
            unseen = ["the model's own generator" for before, g in pairs if before != generator_state(g)]
            if start is not None:
                unseen += start.moved()
            written = self._written()
            self.snapshot.restore()
        return Variant(leaves, tracer.trace, tuple(unseen), written)

    def _written(self) -> tuple[str, ...]:
        named = self.module._buffers.items()
        floating = {
            name: buffer for name, buffer in named if buffer is not None and buffer.is_floating_point()
        }
        return tuple(name for name, buffer in floating.items() if self.snapshot.changed(buffer))

    def toggled(self, mode: bool, flags: bool = True) -> dict[str, Any]:
        """Output of an uninstrumented run after the module's own train(mode).

        flags: False takes the flags back to eval mode afterwards, so that only a mode kept elsewhere counts.
        """
        if self.is_whole:
            self.setting.call.count()
        with preserved():
            self.state.restore()
            try:
                self.module.train(mode) if mode else self.module.eval()
                for module in self.module.modules() if not flags else ():
                    set_flag(module, False)
                with Tracer(self.tracer.model, functions=False, like=self.tracer).active():
                    return flatten(drained(self.run()))
            except Exception as error:
                return {"": f"raised {told(error)}"}
            finally:
                self.snapshot.restore()

    @contextmanager
    def _flags(self, flipped: bool) -> Iterator[None]:
        saved = [(module, flag_of(module)) for module in self.setting.eval_flags]
        owners = [(module, flag_of(module)) for module in self.owners]
        for module, flag in self.setting.eval_flags.items():
            set_flag(module, flag)
        for module, flag in self.owners.items():
            set_flag(module, flag if flipped else not flag)
        try:
            yield
        finally:
            for module, flag in saved + owners:
                set_flag(module, flag)

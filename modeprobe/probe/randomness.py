"""Random states of torch (all devices), Python and numpy: read, put back, set."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _accelerator() -> Any:
    """torch.cuda once it is in use, else None."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda
    return None


def numpy_random() -> Any:
    """numpy.random where numpy is loaded, else None: numpy loads it on first use, maybe in a forward."""
    return importlib.import_module("numpy.random") if "numpy" in sys.modules else None


class RandomState:
    """Every global random state at one moment. Two states compare equal when all streams stand alike."""

    def __init__(self) -> None:
        self.torch = torch.get_rng_state()
        device = _accelerator()
        self.device = device.get_rng_state_all() if device else None
        self.python = random.getstate()
        numpy = numpy_random()
        self.numpy = numpy.get_state() if numpy else None

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        device = _accelerator()
        if device and self.device is not None:
            device.set_rng_state_all(self.device)
        random.setstate(self.python)
        if self.numpy is not None:
            numpy_random().set_state(self.numpy)

    def moved(self) -> tuple[str, ...]:
        """Names of the streams that have moved since: "torch", "python", "numpy"."""
        now = RandomState()
        names = []
        pairs = zip(self.device or [], now.device or [], strict=False)
        same_device = all(torch.equal(a, b) for a, b in pairs)
        if not (torch.equal(self.torch, now.torch) and same_device):
            names.append("torch")
        if self.python != now.python:
            names.append("python")
        if self.numpy is not None and now.numpy is not None:
            ours, theirs = self.numpy, now.numpy
            if ours[0] != theirs[0] or bool((ours[1] != theirs[1]).any()) or ours[2:] != theirs[2:]:
                names.append("numpy")
        return tuple(names)


def seed_everything(seed: int) -> None:
    # torch.manual_seed would queue a call, with a stack trace, for every device that is not yet in use.
    torch.default_generator.manual_seed(seed)
    device = _accelerator()
    if device:
        device.manual_seed_all(seed)
    random.seed(seed)
    numpy = numpy_random()
    if numpy:
        numpy.seed(seed % 2**32)


def stream_position() -> tuple:
    """Cheap fingerprint of torch's default generators: it changes when a value is drawn."""
    device = _accelerator()
    offsets = [g.get_offset() for g in device.default_generators] if device else ()
    return (torch.get_rng_state().numpy().tobytes(), *offsets)


def private_generators(items: Iterable[Any]) -> list[Any]:
    """Generators of torch, Python and numpy among `items`, each with its own random stream."""
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    numpy = numpy_random()
    if numpy:
        kinds = (*kinds, numpy.Generator, numpy.RandomState)
    return [item for item in items if isinstance(item, kinds)]


def generator_state(generator: Any) -> str:
    if isinstance(generator, torch.Generator):
        return str(generator.get_state().tolist())
    if isinstance(generator, random.Random):
        return str(generator.getstate())
    if hasattr(generator, "bit_generator"):
        return str(generator.bit_generator.state)
    return str([str(part) for part in generator.get_state()])


def reseed_generator(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif hasattr(generator, "bit_generator"):
        fresh = numpy_random().Generator(type(generator.bit_generator)(seed))
        generator.bit_generator.state = fresh.bit_generator.state
    else:
        generator.seed(seed)


@contextmanager
def preserved() -> Iterator[RandomState]:
    """Put every random state back at the end, also after an exception."""
    state = RandomState()
    try:
        yield state
    finally:
        state.restore()

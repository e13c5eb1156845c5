"""Batches from any loader into any model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[nn.Module, Any], Any]


def tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, first to last."""
    if isinstance(batch, Tensor):
        yield batch
    elif is_dataclass(batch) and not isinstance(batch, Mapping):
        yield from tensors(list(vars(batch).values()))
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from tensors(value)


def batch_size(batch: Any) -> int:
    """Length of the first tensor's first dimension; 1 where there is none."""
    first = next((tensor for tensor in tensors(batch) if tensor.dim()), None)
    return 1 if first is None else first.size(0)


def to_device(batch: Any, device: torch.device | None) -> Any:
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(value, device) for value in batch)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch


def call_model(model: nn.Module, batch: Any) -> Any:
    """A tensor is the input; of a tuple or list the first item is (the rest are targets); a mapping gives
    keyword arguments."""
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("loader: an empty tuple came as a batch")
        batch = batch[0]
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch)


def model_device(model: nn.Module) -> torch.device | None:
    """Where the model lives, if that is one place."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


@contextmanager
def progress_bar(total: int | None, text: str, show: bool | None) -> Iterator[Callable[[], Any]]:
    """A step function. `show=None`: a bar if standard error is a terminal."""
    if show is False or (show is None and not sys.stderr.isatty()):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=total)
        yield lambda: progress.advance(task)


class Feed:
    """A model and its loader, which can be walked again unless it is an iterator (`once`)."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        call: Call | None = None,
        device: torch.device | str | None = None,
        batches: int | None = None,
        progress: bool | None = None,
    ):
        if isinstance(loader, (Tensor, Mapping, str)) or not isinstance(loader, Iterable):
            raise TypeError(
                f"loader must be an iterable of batches, got {type(loader).__name__}; a single batch: [batch]"
            )
        if batches is not None and batches < 1:
            raise ValueError(f"batches must be at least 1, got {batches}")
        self.model, self.loader, self.limit, self.progress = model, loader, batches, progress
        self.call = call or call_model
        self.device = torch.device(device) if device is not None else model_device(model)
        self.once = isinstance(loader, Iterator)

    def __len__(self) -> int:
        count = len(self.loader)  # type: ignore[arg-type]
        return count if self.limit is None else min(count, self.limit)

    def walk(self, text: str) -> Iterator[Any]:
        """The batches, on the model's device."""
        try:
            total: int | None = len(self)
        except TypeError:
            total = self.limit
        with progress_bar(total, text, self.progress) as step:
            for batch in islice(iter(self.loader), self.limit):
                yield to_device(batch, self.device)
                step()

    def run(self, batch: Any) -> Any:
        return self.call(self.model, batch)

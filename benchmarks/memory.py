"""Bytes that a forward pass keeps for its backward pass, and the peak of a CUDA run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that autograd saves during ``forward``, inputs included.

    Parameters are left out: they live anyway. Storages are held until the end of the count, so that
    none is counted twice because memory was given out again.
    """
    sizes: dict[int, int] = {}
    held: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            held.append(tensor)
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())


def peak_bytes(run: Callable[[], Any]) -> int:
    """Bytes allocated on the current CUDA device at the worst moment of ``run``, above those before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before

"""Merging moments across the ranks of torch.distributed, in rank order, the same bits on every rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modeprobe.statistics.pooled import Moments, merge


def group_of(process_group: Any) -> Any:
    """The process group to merge over; None where there is nothing to merge ("auto": the default group, if
    torch.distributed is initialised)."""
    distributed: Any = sys.modules.get("torch.distributed")
    if process_group is None or distributed is None or not distributed.is_available():
        return None
    if isinstance(process_group, str):
        if process_group != "auto":
            raise ValueError(f'process_group must be "auto", None or a process group, got {process_group!r}')
        if not distributed.is_initialized():
            return None
        process_group = distributed.group.WORLD
    return process_group if distributed.get_world_size(process_group) > 1 else None


def exchange(values: Tensor | None, error: BaseException | None, group: Any) -> list[Tensor]:
    """Every rank's `values` (same shape on each), in rank order. A rank that failed says so, and the
    others raise instead of waiting for it.

    Raises RuntimeError on every other rank if one passes an `error`.
    """
    import torch.distributed as dist

    device = torch.device("cpu")
    if "nccl" in str(dist.get_backend(group)) and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    size = 0 if values is None else values.numel()
    mine = torch.tensor([0 if error else 1, size], dtype=torch.int64, device=device)
    told = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(told, mine, group=group)
    failed = [rank for rank, state in enumerate(told) if not int(state[0])]
    if failed:
        if error is not None:
            return []
        raise RuntimeError(f"rank {', '.join(map(str, failed))} failed in its pass; nothing was written")
    if any(int(state[1]) != size for state in told):
        raise RuntimeError("the ranks hold different BatchNorm layers; no statistics were written")
    assert values is not None
    sent = values.to(device).contiguous()
    parts = [torch.empty_like(sent) for _ in told]
    dist.all_gather(parts, sent, group=group)
    return [part.to(values.device) for part in parts]


def merge_ranks(
    moments: Moments, extra: Tensor, error: BaseException | None, group: Any
) -> tuple[Moments, Tensor]:
    """The moments of all ranks' values together, and the sum of `extra` (n, channels)."""
    parts = exchange(None if error else torch.cat([torch.stack(moments), extra]), error, group)
    if not parts:
        return moments, extra
    total, added = Moments(*parts[0][:3]), parts[0][3:]
    for part in parts[1:]:
        total, added = merge(total, Moments(*part[:3])), added + part[3:]
    return total, added


def together(work: Callable[[], Tensor], group: Any) -> list[Tensor]:
    """What `work` gives on every rank, in rank order; a rank where it raises lets the others raise, too."""
    try:
        values = work()
    except Exception as error:
        if group is not None:
            exchange(None, error, group)
        raise
    return [values] if group is None else exchange(values, None, group)


def gather_sizes(sizes: list[int], group: Any) -> list[int]:
    """The batch sizes of all ranks in the order in which training saw them: step by step, rank by rank."""
    count = torch.tensor([float(len(sizes))])
    longest = int(max(float(part) for part in exchange(count, None, group)))
    padded = torch.tensor([*sizes, *[-1] * (longest - len(sizes))], dtype=torch.float64)
    steps = torch.stack(exchange(padded, None, group)).T.flatten()
    return [int(size) for size in steps.tolist() if size >= 0]

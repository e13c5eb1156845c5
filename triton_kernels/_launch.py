"""Launches that find the compiled kernel themselves: Triton takes longer for that than for a small kernel."""

from typing import Any

import torch

_MOST = 4096  # kernels remembered; shapes that change with every call must not fill the memory
_remembered: dict[tuple, Any] = {}
_PLAIN = frozenset((int, bool, str, type(None)))  # told from tensors without asking torch


def _kind(argument: Any) -> Any:
    """What Triton compiles for: of a tensor the dtype and whether it starts at 16 bytes, else the value."""
    if type(argument) not in _PLAIN and isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument


def launch(kernel: Any, grid: tuple[int, ...], num_warps: int, *args: Any) -> None:
    """``kernel[grid](*args, num_warps=num_warps)`` on the current device, where the tensors are.

    ``args`` are all of the kernel's, in order, the first a tensor. Numbers are told apart by value, which is
    finer than what Triton goes by, so that none of its rules need to be known here.
    """
    about = (id(kernel), num_warps, args[0].get_device(), *map(_kind, args))
    compiled = _remembered.get(about)
    if compiled is not None:
        compiled[(*grid, 1, 1)](*args)  # takes the first three
        return
    compiled = kernel[grid](*args, num_warps=num_warps)  # None where it is interpreted
    if compiled is not None and len(args) == len(kernel.arg_names):
        if len(_remembered) >= _MOST:
            _remembered.clear()
        _remembered[about] = compiled

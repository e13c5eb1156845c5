"""What launchers of Triton kernels take for granted: the current device, and vectors without gaps."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Arguments of one dimension whose elements a kernel expects side by side.
_VECTORS = ("key", "weight", "bias", "mean", "variance", "running_mean", "running_var")


def prepared(launch: Callable[..., Any], mutated: Sequence[str] = ()) -> Callable[..., Any]:
    """``launch`` on the device of its first argument, whichever is current: Triton asks for the current one.

    Vectors with strides are copied, and those named in ``mutated`` copied back.
    """
    names = list(inspect.signature(launch).parameters)
    vectors = [at for at, name in enumerate(names) if name in _VECTORS]

    @functools.wraps(launch)
    def call(*args: Any) -> Any:
        dense = list(args)
        with torch.cuda.device_of(args[0]):
            for at in vectors:
                if at < len(args) and args[at] is not None:
                    dense[at] = args[at].contiguous()
            result = launch(*dense)
            for at in vectors:
                if at < len(args) and names[at] in mutated and dense[at] is not args[at]:
                    args[at].copy_(dense[at])
        return result

    return call

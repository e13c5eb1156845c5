"""How launchers of Triton kernels become operators, and what they take for granted: the current device, and
vectors without gaps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Arguments of one dimension whose elements a kernel expects side by side.
_VECTORS = ("key", "weight", "bias", "mean", "variance", "running_mean", "running_var")

# Not torch.library.custom_op, which wraps every call in some 50 us of Python.
_library = torch.library.Library("modeprobe_triton", "FRAGMENT")


def prepared(launch: Callable[..., Any], mutated: Sequence[str] = ()) -> Callable[..., Any]:
    """``launch`` on the device of its first argument, whichever is current: Triton asks for the current one.

    Vectors with strides are copied, and those named in ``mutated`` copied back.
    """
    names = list(inspect.signature(launch).parameters)
    vectors = [at for at, name in enumerate(names) if name in _VECTORS]

    def call(*args: Any) -> Any:
        strided = [
            at for at in vectors if at < len(args) and args[at] is not None and not args[at].is_contiguous()
        ]
        if not strided:
            return launch(*args)
        dense = list(args)
        for at in strided:
            dense[at] = args[at].contiguous()
        result = launch(*dense)
        for at in strided:
            if names[at] in mutated:
                args[at].copy_(dense[at])
        return result

    def call_there(*args: Any) -> Any:
        device = args[0].get_device()
        if device < 0 or device == torch.cuda.current_device():
            return call(*args)
        with torch.cuda.device(device):
            return call(*args)

    return call_there


def register(name: str, launch: Callable[..., Any], schema: str, fake: Callable[..., Any]) -> Any:
    """The operator ``modeprobe_triton::name``, opaque to torch.compile as the compiled ones are."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, torch.compiler.disable(launch), "CompositeExplicitAutograd")
    torch.library.register_fake(f"modeprobe_triton::{name}", fake, lib=_library)
    return getattr(torch.ops.modeprobe_triton, name).default

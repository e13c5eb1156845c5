"""Run a model and leave it as it was: modes, buffers, random states."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def versions(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def random_states(model: nn.Module) -> Iterator[None]:
    """Restore the generators of torch (CPU and the model's devices), Python and NumPy (if it is loaded)."""
    devices = {
        p.device for p in (*model.parameters(), *model.buffers()) if p.device.type not in ("cpu", "meta")
    }
    accelerators = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}
    cpu, python = torch.get_rng_state(), random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if numpy:
            numpy.random.set_state(numpy_state)
        for device, state in accelerators.items():
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def unchanged(model: nn.Module, mode: str) -> Iterator[None]:
    """Run forwards of `model` without gradients in `mode` ("eval", "train" or "keep"; BatchNorm layers are
    always in evaluation, see `normalising_with`) and afterwards put back, bit for bit, every `training` flag,
    every buffer (the same objects) and the random states. A parameter that a forward rewrites in place is
    warned of: there is no copy of it.

    Flags are written directly: `train()` may be overridden, and is recursive.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    if mode not in ("eval", "train", "keep"):
        raise ValueError(f'mode must be "eval", "train" or "keep", got {mode!r}')
    modules = list(model.modules())
    flags = [module.training for module in modules]
    buffers = [
        (module, name, buffer, None if buffer is None else (versions(buffer), buffer.clone()))
        for module in modules
        for name, buffer in module._buffers.items()
    ]
    parameters = [(name, parameter, versions(parameter)) for name, parameter in model.named_parameters()]
    with ExitStack() as stack:
        stack.enter_context(random_states(model))
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # parts that are compiled would run without our hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in modules:
                if isinstance(module, _BatchNorm):
                    module.training = False
                elif mode != "keep":
                    module.training = mode == "train"
            yield
        finally:
            for module, flag in zip(modules, flags, strict=True):
                module.training = flag
            for module, name, buffer, copy in buffers:
                module._buffers[name] = buffer
                if buffer is not None and copy is not None and versions(buffer) != copy[0]:
                    buffer.copy_(copy[1])
            rewritten = [name for name, parameter, version in parameters if versions(parameter) != version]
            if rewritten:
                warnings.warn(
                    f"the forward rewrites parameters, which is not undone: {', '.join(rewritten[:5])}",
                    RuntimeWarning,
                    stacklevel=4,
                )

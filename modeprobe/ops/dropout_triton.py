"""The dropout operators on the Triton kernels, opaque to torch.compile as the compiled ones are."""

from __future__ import annotations

import torch
from torch import Tensor

from modeprobe.ops.dropout_reference import empty_output
from modeprobe.triton_kernels import dropout as kernels


@torch.library.custom_op("modeprobe_triton::dropout", mutates_args=())
def dropout(
    input: Tensor,
    key: Tensor,
    p: float,
    offset: int = 0,
    scaled: bool = True,
    p_tensor: Tensor | None = None,
) -> Tensor:
    return kernels.launch_dropout_forward(input, key, p if p_tensor is None else p_tensor, offset, scaled)


@dropout.register_fake
def _(input, key, p, offset=0, scaled=True, p_tensor=None):
    return empty_output(input)


@torch.library.custom_op("modeprobe_triton::dropout_", mutates_args=("input",))
def dropout_(
    input: Tensor,
    key: Tensor,
    p: float,
    offset: int = 0,
    scaled: bool = True,
    p_tensor: Tensor | None = None,
) -> None:
    rate = p if p_tensor is None else p_tensor
    y = kernels.launch_dropout_forward(input, key, rate, offset, scaled, out=input)
    if y is not input:
        input.copy_(y)


@torch.library.custom_op("modeprobe_triton::dropout_mask", mutates_args=())
def dropout_mask(
    key: Tensor, numel: int, p: float, offset: int = 0, p_tensor: Tensor | None = None
) -> Tensor:
    return kernels.launch_dropout_mask(key, numel, p if p_tensor is None else p_tensor, offset)


@dropout_mask.register_fake
def _(key, numel, p, offset=0, p_tensor=None):
    return key.new_empty((numel,), dtype=torch.bool)

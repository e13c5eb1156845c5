"""The dropout operators on the Triton kernels, opaque to torch.compile as the compiled ones are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modeprobe.ops.dropout_fake import FAKES
from modeprobe.triton_kernels import bias_dropout_add as fused
from modeprobe.triton_kernels import dropout as dropout_kernels
from modeprobe.triton_kernels import softmax_dropout as softmax
from modeprobe.triton_kernels import structured_dropout as structured


def _rate(p: float, p_tensor: Tensor | None) -> float | Tensor:
    return p if p_tensor is None else p_tensor


@torch.library.custom_op("modeprobe_triton::dropout", mutates_args=())
def dropout(
    input: Tensor,
    key: Tensor,
    p: float,
    offset: int = 0,
    scaled: bool = True,
    p_tensor: Tensor | None = None,
) -> Tensor:
    return dropout_kernels.launch_dropout_forward(input, key, _rate(p, p_tensor), offset, scaled)


@torch.library.custom_op("modeprobe_triton::dropout_", mutates_args=("input",))
def dropout_(
    input: Tensor,
    key: Tensor,
    p: float,
    offset: int = 0,
    scaled: bool = True,
    p_tensor: Tensor | None = None,
) -> None:
    dropout_kernels.launch_dropout_forward(input, key, _rate(p, p_tensor), offset, scaled, out=input)


@torch.library.custom_op("modeprobe_triton::dropout_mask", mutates_args=())
def dropout_mask(
    key: Tensor, numel: int, p: float, offset: int = 0, p_tensor: Tensor | None = None
) -> Tensor:
    return dropout_kernels.launch_dropout_mask(key, numel, _rate(p, p_tensor), offset)


@torch.library.custom_op("modeprobe_triton::fold_in", mutates_args=())
def fold_in(key: Tensor, n: int, n_tensor: Tensor | None = None) -> Tensor:
    return dropout_kernels.launch_fold_in(key, n if n_tensor is None else n_tensor)


@torch.library.custom_op("modeprobe_triton::structured_dropout", mutates_args=())
def structured_dropout(
    input: Tensor,
    key: Tensor,
    p: float,
    shared_dims: Sequence[int],
    offset: int = 0,
    scaled: bool = True,
    p_tensor: Tensor | None = None,
) -> Tensor:
    return structured.launch_structured_dropout(input, key, _rate(p, p_tensor), shared_dims, offset, scaled)


@torch.library.custom_op("modeprobe_triton::alpha_dropout", mutates_args=())
def alpha_dropout(
    input: Tensor,
    key: Tensor,
    p: float,
    shared_dims: Sequence[int],
    linear: bool = False,
    offset: int = 0,
    p_tensor: Tensor | None = None,
) -> Tensor:
    rate = _rate(p, p_tensor)
    if shared_dims:
        return structured.launch_feature_alpha_dropout(input, key, rate, shared_dims, linear, offset)
    return dropout_kernels.launch_alpha_dropout(input, key, rate, offset, linear)


@torch.library.custom_op("modeprobe_triton::bias_dropout_add", mutates_args=())
def bias_dropout_add(
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    key: Tensor,
    p: float,
    offset: int = 0,
    p_tensor: Tensor | None = None,
) -> Tensor:
    return fused.launch_bias_dropout_add(input, bias, residual, key, _rate(p, p_tensor), offset)


@torch.library.custom_op("modeprobe_triton::bias_dropout_add_backward", mutates_args=())
def bias_dropout_add_backward(
    grad_output: Tensor, key: Tensor, p: float, offset: int = 0, p_tensor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return fused.launch_bias_dropout_add_backward(grad_output, key, _rate(p, p_tensor), offset)


@torch.library.custom_op("modeprobe_triton::softmax_dropout", mutates_args=())
def softmax_dropout(
    scores: Tensor,
    mask: Tensor | None,
    key: Tensor,
    p: float,
    save: bool,
    offset: int = 0,
    p_tensor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return softmax.launch_softmax_dropout(scores, mask, key, _rate(p, p_tensor), save, offset)


@torch.library.custom_op("modeprobe_triton::softmax_dropout_backward", mutates_args=())
def softmax_dropout_backward(
    grad_output: Tensor,
    probabilities: Tensor,
    key: Tensor,
    p: float,
    offset: int = 0,
    p_tensor: Tensor | None = None,
) -> Tensor:
    return softmax.launch_softmax_dropout_backward(
        grad_output, probabilities, key, _rate(p, p_tensor), offset
    )


for _name, _fake in FAKES.items():
    globals()[_name].register_fake(_fake)

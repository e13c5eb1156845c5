"""Batch normalisation by the compiled kernels with nothing beside: the commonest calls, in the fewest steps.

A small layer takes a GPU less time than it takes the host to start it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from modeprobe import _extension, reference
from modeprobe.ops import backend
from modeprobe.ops.batch_norm import differentiable_backward
from modeprobe.ops.eager import eager

_native = _extension.loaded()
# `_op` is the operator without a frame of Python around it.
_train: Any = torch.ops.modeprobe.batch_norm_train.default._op if _native else None
_eval: Any = torch.ops.modeprobe.batch_norm_eval.default._op if _native else None
_gradients: Any = torch.ops.modeprobe.batch_norm_backward.default._op if _native else None
_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_graph_task = torch._C._current_graph_task_id


class PlainBatchNorm(Function):
    """What :class:`modeprobe.ops.batch_norm.PackedBatchNorm` does without an epilogue, for weight and bias of
    one dtype: the bias's values are not needed, and weight stands for its shape."""

    @staticmethod
    def forward(ctx, x, weight, bias, buffers):
        mean, variance, counter, momentum, eps = buffers
        y, statistics, _ = _train(x, weight, bias, mean, variance, counter, None, momentum, eps)
        ctx.save_for_backward(x, statistics, weight)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, grad):
        x, statistics, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        if _grad_enabled():
            ctx.bias_dtype = None if weight is None else weight.dtype
            ctx.arguments = True, ctx.eps, reference.NONE, 0.01, 0.0, "native"
            saved = x, statistics, weight, None, None, None, None
            return differentiable_backward(ctx, saved, reference.mean_and_variance, grad)
        gx, gw, gb, _ = _gradients(
            grad, x, statistics, weight, weight, True, need_x, need_weight or need_bias, False
        )
        return gx if need_x else None, gw if need_weight else None, gb if need_bias else None, None


_plain = eager(PlainBatchNorm)


def plain(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    counter: Tensor | None,
) -> Tensor | None:
    """The output; None, and nothing done, where something else has a say: another backend, a transform of
    ``torch.func``, a recomputation, the gradient of an evaluation. Arguments that the operators refuse
    themselves need not be checked before."""
    if (
        not backend.is_native(x)
        or _transforms_active()
        or _graph_task() != -1
        or forward_ad._current_level >= 0
    ):
        return None
    if _grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _plain(x, weight, bias, (mean, variance, counter, momentum, eps)) if training else None
    if training:
        return _train(x, weight, bias, mean, variance, counter, None, momentum, eps)[0]
    return _eval(x, mean, variance, weight, bias, eps)[0]

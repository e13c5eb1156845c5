"""Batch normalisation with statistics shared between processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modeprobe.ops import backend
from modeprobe.ops.batch_norm import (
    PLAIN,
    Epilogue,
    bias_of,
    differentiable_backward,
    operators,
    recomputing,
    updating,
)


def gather(values: Tensor, group: Any) -> Tensor:
    """``values`` (n,) of every process, stacked in the order of ranks."""
    import torch.distributed as dist

    world = dist.get_world_size(group)
    gathered = values.new_empty((world, values.numel()))
    # Its older name is deprecated; torch 2.10 has only that.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(gathered.view(-1), values, group=group)
    return gathered


def sum_over_processes(values: Tensor, group: Any) -> Tensor:
    import torch.distributed as dist

    total = values.clone()
    dist.all_reduce(total, group=group)
    return total


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes; what each does with it adds to the gradient, so it is its own backward."""

    @staticmethod
    def forward(ctx, values, group):
        ctx.group = group
        return sum_over_processes(values, group)

    @staticmethod
    def backward(ctx, grad):
        return _SumOverProcesses.apply(grad, ctx.group), None


class SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        residual,
        key,
        running_mean,
        running_var,
        num_batches_tracked,
        skipped_batches,
        momentum,
        eps,
        activation,
        slope,
        p,
        name,
        group,
    ):
        ops = operators(name)
        epilogue = Epilogue(residual, activation, slope, key, p)
        bits = epilogue.wants_sign_bits()
        moments = gather(ops.batch_norm_moments(x), group)
        mean, variance, count = updating(ops, "batch_norm_merge")(
            moments, running_mean, running_var, num_batches_tracked, skipped_batches, momentum
        )
        y, statistics, sign_bits = ops.batch_norm_eval(
            x, mean, variance, weight, bias, eps, *epilogue, True, bits
        )
        ctx.save_for_backward(
            x,
            statistics,
            weight,
            bias if epilogue.wants_input() else None,
            residual if epilogue.wants_input() else None,
            key,
            sign_bits if bits else None,
            count,
        )
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.arguments = True, eps, activation, slope, p, name
        ctx.group = group
        return y

    @staticmethod
    def backward(ctx, grad):
        *saved, count = ctx.saved_tensors
        x, statistics, weight, bias, residual, key, sign_bits = saved
        _, _, activation, slope, p, name = ctx.arguments
        group = ctx.group
        if torch.is_grad_enabled():

            def moments(x):
                return _shared_moments(x, statistics[0], count, group)

            return *differentiable_backward(ctx, tuple(saved), moments, grad), *[None] * 12
        bias = bias_of(ctx, bias, statistics, weight)
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        ops = operators(name)
        tail = (residual, activation, slope, key, p, sign_bits)
        sums = ops.batch_norm_backward_reduce(grad, x, statistics, weight, bias, *tail)
        grad_x = grad_residual = None
        plain = activation == PLAIN.activation and key is None
        if need_x or (need_residual and not plain):
            means = sum_over_processes(sums, group) / count.clamp(min=1)
            grad_x, grad_residual = ops.batch_norm_backward_input(
                grad, x, statistics, means, weight, bias, need_residual and not plain, *tail
            )
        return (
            grad_x if need_x else None,
            sums[1].to(weight.dtype) if need_weight else None,
            sums[0].to(ctx.bias_dtype) if need_bias else None,
            (grad if plain else grad_residual) if need_residual else None,
            *[None] * 12,
        )


def _shared_moments(x: Tensor, near: Tensor, count: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all processes, differentiable; `near` is the mean as a constant."""
    deviations = x.to(near.dtype).movedim(1, 0).flatten(1) - near[:, None]
    count = count.clamp(min=1)
    off = _SumOverProcesses.apply(deviations.sum(1), group) / count
    squares = _SumOverProcesses.apply((deviations - off[:, None]).square().sum(1), group)
    return near + off, squares / count


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    skipped_batches: Tensor | None,
    epilogue: Epilogue,
    group: Any,
) -> Tensor:
    """Training with the statistics of all processes of ``group``; arguments are taken as checked."""
    if recomputing():
        # The other processes recompute, too, and wait for this one: only the update is left out.
        running_mean = running_var = num_batches_tracked = skipped_batches = None
    residual = epilogue.residual
    if residual is x and torch.compiler.is_compiling():
        residual = residual.view_as(residual)  # Dynamo wants every tensor once
    return SyncBatchNorm.apply(
        x,
        weight,
        bias,
        residual,
        epilogue.key,
        running_mean,
        running_var,
        num_batches_tracked,
        skipped_batches,
        momentum,
        eps,
        epilogue.activation,
        epilogue.slope,
        epilogue.p,
        backend.resolve(x.device.type),
        group,
    )

"""Batch normalisation with statistics shared between processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modeprobe.ops import backend
from modeprobe.ops.batch_norm import PLAIN, Epilogue, operators, recomputing


def gather(values: Tensor, group: Any) -> Tensor:
    """``values`` (n,) of every process, stacked in the order of ranks."""
    import torch.distributed as dist

    world = dist.get_world_size(group)
    gathered = values.new_empty((world, values.numel()))
    dist.all_gather_into_tensor(gathered.view(-1), values, group=group)
    return gathered


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
        mean, variance, count = ops.batch_norm_merge(
            moments, running_mean, running_var, num_batches_tracked, skipped_batches, momentum
        )
        y, statistics, sign_bits = ops.batch_norm_eval(
            x, mean, variance, weight, bias, eps, *epilogue, True, bits
        )
        ctx.save_for_backward(
            x,
            statistics,
            weight,
            bias,
            residual if epilogue.wants_input() else None,
            key,
            sign_bits if bits else None,
            count,
        )
        ctx.arguments = activation, slope, p, name, group
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        import torch.distributed as dist

        x, statistics, weight, bias, residual, key, sign_bits, count = ctx.saved_tensors
        activation, slope, p, name, group = ctx.arguments
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        ops = operators(name)
        tail = (residual, activation, slope, key, p, sign_bits)
        sums = ops.batch_norm_backward_reduce(grad, x, statistics, weight, bias, *tail)
        grad_x = grad_residual = None
        plain = activation == PLAIN.activation and key is None
        if need_x or (need_residual and not plain):
            means = sums.clone()
            dist.all_reduce(means, group=group)
            means /= count.clamp(min=1)
            grad_x, grad_residual = ops.batch_norm_backward_input(
                grad, x, statistics, means, weight, bias, need_residual and not plain, *tail
            )
        return (
            grad_x if need_x else None,
            sums[1].to(weight.dtype) if need_weight else None,
            sums[0].to(bias.dtype) if need_bias else None,
            (grad if plain else grad_residual) if need_residual else None,
            *[None] * 12,
        )


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
    return SyncBatchNorm.apply(
        x,
        weight,
        bias,
        epilogue.residual,
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

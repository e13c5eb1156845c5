"""Batch normalisation: arguments checked here, kernels chosen in :mod:`modeprobe.ops.batch_norm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic

from modeprobe import mask
from modeprobe.ops import batch_norm as ops
from modeprobe.ops import plain_batch_norm as plain_ops
from modeprobe.ops import sync_batch_norm as sync_ops

_FLOATING = {
    torch.float16: (torch.float32, torch.float16),
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
}


def check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    few_values: bool = False,
) -> None:
    """Raise what :func:`batch_norm` documents; ``few_values`` allows fewer than two values per channel."""
    allowed = _FLOATING.get(input.dtype)
    if allowed is None:
        raise NotImplementedError(
            f'"batch_norm" not implemented for {input.dtype}: '
            "input must be float16, bfloat16, float32 or float64"
        )
    shape = input.shape
    if len(shape) < 2:
        raise IndexError(f"batch_norm: input must have shape (N, C, *), got {tuple(shape)}")
    channels = shape[1]
    device = input.device
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if tensor is None:
            continue
        if tensor.dim() != 1 or tensor.shape[0] != channels:
            if tensor.dim() == 1:
                raise RuntimeError(f"{name} should contain {channels} elements not {tensor.numel()}")
            raise RuntimeError(f"{name} must have shape ({channels},), got {tuple(tensor.shape)}")
        if tensor.dtype not in allowed:
            raise RuntimeError(
                f"mixed dtype: {name} must be {' or '.join(map(str, allowed))} for {input.dtype} input, "
                f"got {tensor.dtype}"
            )
        if tensor.device != device:
            raise RuntimeError(f"{name} must be on the input's device, {device}, got {tensor.device}")
    if (running_mean is None) is not (running_var is None):
        if not training:
            missing = "running_mean" if running_mean is None else "running_var"
            raise RuntimeError(f"{missing} must be defined in evaluation mode")
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if training:
        values = shape[0]
        for size in shape[2:]:
            values = values * size
        if values == 1 and not few_values:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    else:
        if running_mean is None:
            raise RuntimeError("running_mean must be defined in evaluation mode")
        if eps < 0.0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(f"batch_norm is not differentiable in {name}, which has requires_grad=True")


def check_counters(
    input: Tensor,
    running_mean: Tensor | None,
    training: bool,
    momentum: float | None,
    num_batches_tracked: Tensor | None,
    skipped_batches: Tensor | None,
) -> None:
    """Raise what :func:`batch_norm` documents of its counters."""
    if training and momentum is None and num_batches_tracked is None and running_mean is not None:
        raise ValueError("batch_norm: momentum=None averages over num_batches_tracked, which is None")
    for name, counter in (("num_batches_tracked", num_batches_tracked), ("skipped_batches", skipped_batches)):
        if counter is not None and (
            counter.dtype != torch.int64 or counter.numel() != 1 or counter.device != input.device
        ):
            raise ValueError(
                f"batch_norm: {name} must be one int64 on the input's device, {input.device}, "
                f"got {counter.dtype} of shape {tuple(counter.shape)} on {counter.device}"
            )


def epilogue(
    input: Tensor,
    activation: str | None,
    negative_slope: float,
    residual: Tensor | None,
    dropout_p: float,
    key: Tensor | None,
) -> ops.Epilogue:
    """The checked epilogue of a call.

    Raises:
        ValueError, TypeError: what :func:`batch_norm` documents.
    """
    if activation not in ops.ACTIVATIONS:
        names = ", ".join(map(repr, ops.ACTIVATIONS))
        raise ValueError(f"batch_norm: activation must be one of {names}, got {activation!r}")
    expected = input.shape, input.dtype, input.device
    if residual is not None and (residual.shape, residual.dtype, residual.device) != expected:
        raise ValueError(
            "batch_norm: residual must have shape, dtype and device of input, "
            f"({tuple(input.shape)}, {input.dtype}, {input.device}), "
            f"got ({tuple(residual.shape)}, {residual.dtype}, {residual.device})"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"batch_norm: dropout_p must be in [0, 1], got {dropout_p}")
    if dropout_p == 0.0:
        key = None
    elif key is None:
        key = mask.new_key(input.device)
    else:
        mask.check_key(key, "batch_norm")
        if key.device != input.device:
            raise ValueError(
                f"batch_norm: key must be on the input's device, {input.device}, got {key.device}"
            )
    return ops.Epilogue(residual, ops.ACTIVATIONS[activation], negative_slope, key, dropout_p)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    key: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    skipped_batches: Tensor | None = None,
) -> Tensor:
    """Batch normalisation like :func:`torch.nn.functional.batch_norm`, and what follows it in the same pass.

    ``y = dropout(activation(weight * (input - mean) / sqrt(var + eps) + bias + residual))`` with mean and
    biased variance over all dimensions but the second: those of the batch in training, the running ones
    otherwise. In training ``running = (1 - momentum) * running + momentum * batch``, the variance unbiased;
    momentum 1 assigns. A forward that runs inside a backward pass (activation checkpointing) normalises with
    the batch's statistics and leaves the running ones alone.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64; contiguous and channels_last inputs are used
            as they are, and the output has their strides.
        running_mean, running_var: (C,), float32 or input's dtype (float64 for float64), or None in training.
        weight, bias: (C,), dtypes as above, or None.
        training: normalise with the batch's statistics, and update the running ones.
        momentum: weight of the batch; None averages all batches that ``num_batches_tracked`` counts.
        eps: added to the variance; positive in training.
        activation: None, "relu", "leaky_relu", "silu", "gelu" or "gelu_tanh".
        negative_slope: of "leaky_relu".
        residual: added before the activation; shape, dtype and device of input.
        dropout_p: probability of the dropout after the activation, whatever ``training`` says.
        key: of that dropout, int64 (2,), see :func:`modeprobe.mask.key`; by default a fresh one.
        num_batches_tracked: int64 scalar, counts training batches on the device.
        skipped_batches: int64 scalar; if given, a batch with a non-finite mean or variance in any channel
            is counted here and leaves all other buffers alone. The output still carries its NaN.

    Returns:
        Shape and dtype of input.

    Raises:
        ValueError: fewer than two values per channel in training, eps out of range, only one running buffer,
            an unknown activation, a residual unlike input, dropout_p outside [0, 1], momentum None without
            num_batches_tracked.
        RuntimeError: a parameter or buffer with another number of channels, dtype or device; no running
            buffers in evaluation.
        IndexError: an input of fewer than two dimensions.
        NotImplementedError: an input that is not floating point.
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function(tensors):
        return handle_torch_function(
            batch_norm,
            tensors,
            input,
            running_mean,
            running_var,
            weight=weight,
            bias=bias,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            negative_slope=negative_slope,
            residual=residual,
            dropout_p=dropout_p,
            key=key,
            num_batches_tracked=num_batches_tracked,
            skipped_batches=skipped_batches,
        )
    if not isinstance(input, Tensor):
        raise TypeError(f"batch_norm(): argument 'input' must be Tensor, not {type(input).__name__}")
    if input.numel() == 0 and (input.dim() < 2 or input.size(1) == 0):
        # No channels: torch has an answer to some of these, an IndexError to others.
        return torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training)
    check(input, running_mean, running_var, weight, bias, training, eps)
    check_counters(input, running_mean, training, momentum, num_batches_tracked, skipped_batches)
    if activation is None and residual is None and dropout_p == 0.0:
        tail = ops.PLAIN
    else:
        tail = epilogue(input, activation, negative_slope, residual, dropout_p, key)
    return ops.batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        num_batches_tracked,
        skipped_batches,
        tail,
    )


def plain_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
) -> Tensor | None:
    """:func:`batch_norm` in half of its steps; None, and nothing done, where it takes all of them.

    Only what the compiled operators do not refuse themselves is looked at before.
    """
    if (
        running_mean is None
        or running_var is None
        or (num_batches_tracked is None and training)
        or has_torch_function_variadic(input, running_mean, running_var, weight, bias)
        or not isinstance(input, Tensor)
        or input.numel() <= running_mean.numel()
        or eps <= 0.0
    ):
        return None
    # A tensor on "meta" among the others makes the operator a fake one.
    allowed = _FLOATING.get(input.dtype, ())
    for buffer in (running_mean, running_var):
        if buffer.dtype not in allowed or buffer.is_meta or buffer.requires_grad:
            return None
    if weight is None or bias is None:
        if weight is not bias:
            return None
    elif weight.dtype not in allowed or weight.dtype is not bias.dtype or weight.is_meta or bias.is_meta:
        return None
    if num_batches_tracked is not None and num_batches_tracked.is_meta:
        return None
    try:
        return plain_ops.plain(
            input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked
        )
    except RuntimeError:
        check(input, running_mean, running_var, weight, bias, training, eps)
        if training:
            check_counters(input, running_mean, training, momentum, num_batches_tracked, None)
        raise


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    group: Any = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    key: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    skipped_batches: Tensor | None = None,
) -> Tensor:
    """:func:`batch_norm` in training, with mean and variance over the batches of all processes of ``group``.

    Every process of the group calls it, forward and backward; batches may differ in size and be empty.
    Gradients of weight and bias are those of the own batch, to be averaged as any other (by
    ``DistributedDataParallel``, say).

    Args:
        training: must be True; in evaluation there is nothing to share.
        group: a process group of ``torch.distributed``; None is the whole world.
        others: those of :func:`batch_norm`.

    Returns:
        Shape and dtype of input.

    Raises:
        ValueError: ``training`` is False; and what :func:`batch_norm` raises, but that one value per channel,
            or none, is enough in one process.
    """
    if not training:
        raise ValueError("sync_batch_norm: training must be True; use batch_norm in evaluation")
    check(input, running_mean, running_var, weight, bias, True, eps, few_values=True)
    check_counters(input, running_mean, True, momentum, num_batches_tracked, skipped_batches)
    return sync_ops.sync_batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        momentum,
        eps,
        num_batches_tracked,
        skipped_batches,
        epilogue(input, activation, negative_slope, residual, dropout_p, key),
        group,
    )

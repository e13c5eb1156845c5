"""Batch normalisation in plain torch: the readable truth.

Formulas: Ioffe and Szegedy, "Batch Normalization" (2015), with running statistics as in
:class:`torch.nn.BatchNorm2d`. Float64 input is computed in float64, anything else in float32. The functions
named ``batch_norm_*`` are the operators of ``csrc/library.cpp``, by signature and result, on any device;
where they update buffers, ``fold`` is what does it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modeprobe import mask

NONE, RELU, LEAKY_RELU, SILU, GELU, GELU_TANH = range(6)

COUNT_BASE = 1 << 24  # a count travels as two exact float32 digits


def accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values`` (C,) in a shape that broadcasts against ``x`` (N, C, *)."""
    return values.to(accumulate_dtype(x)).view(1, -1, *[1] * (x.dim() - 2))


def channels_innermost(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def empty_output(x: Tensor) -> Tensor:
    """Uninitialised, with the strides of ``x`` if contiguous or channels innermost, else contiguous."""
    if x.is_contiguous() or channels_innermost(x):
        return x.new_empty_strided(x.shape, x.stride())
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def activate(z: Tensor, activation: int, slope: float = 0.01) -> Tensor:
    if activation == RELU:
        return F.relu(z)
    if activation == LEAKY_RELU:
        return F.leaky_relu(z, slope)
    if activation == SILU:
        return F.silu(z)
    if activation in (GELU, GELU_TANH):
        return F.gelu(z, approximate="tanh" if activation == GELU_TANH else "none")
    return z


def _activation_gradient(grad: Tensor, z: Tensor, activation: int, slope: float) -> Tensor:
    # torch's own operators: Dynamo traces no torch.autograd.grad inside an autograd function.
    aten = torch.ops.aten
    if activation == RELU:
        return aten.threshold_backward(grad, z, 0)
    if activation == LEAKY_RELU:
        return aten.leaky_relu_backward(grad, z, slope, False)
    if activation == SILU:
        return aten.silu_backward(grad, z)
    return aten.gelu_backward(grad, z, approximate="tanh" if activation == GELU_TANH else "none")


def mean_and_variance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of ``x`` (N, C, *), in two passes."""
    values = x.to(accumulate_dtype(x)).movedim(1, 0).flatten(1)
    if values.shape[1] == 0:
        return values.new_zeros(values.shape[0]), values.new_zeros(values.shape[0])
    mean = values.mean(1)
    # The mean of the deviations is what rounding left of the mean.
    deviations = values - mean[:, None]
    rest = deviations.mean(1)
    return mean + rest, (deviations - rest[:, None]).square().mean(1)


def kept(x: Tensor, key: Tensor, p: float) -> Tensor:
    """The dropout mask of an output that is laid out as ``empty_output(x)``."""
    out = empty_output(x)
    return mask.keep_mask((x.numel(),), p, key).as_strided(out.shape, out.stride())


def normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: int = NONE,
    slope: float = 0.01,
    key: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``(y, z)``, z = weight * (x - mean) / sqrt(variance + eps) + bias + residual, y its epilogue.

    Differentiable in every tensor, to any order. Both are of the accumulating dtype.
    """
    z = (x.to(accumulate_dtype(x)) - per_channel(mean, x)) * per_channel((variance + eps).rsqrt(), x)
    if weight is not None:
        z = z * per_channel(weight, x)
    if bias is not None:
        z = z + per_channel(bias, x)
    if residual is not None:
        z = z + residual.to(z.dtype)
    y = activate(z, activation, slope)
    if key is not None:
        y = torch.where(kept(x, key, p), y * (1 / (1 - p) if p < 1 else 0.0), 0.0)
    return y, z


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: int = NONE,
    slope: float = 0.01,
    key: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """Batch normalisation of ``x`` (N, C, *) with its epilogue; leaves the running statistics alone."""
    if training or running_mean is None or running_var is None:
        mean, variance = mean_and_variance(x)
    else:
        mean, variance = running_mean.to(accumulate_dtype(x)), running_var.to(accumulate_dtype(x))
    y, _ = normalize(x, mean, variance, weight, bias, eps, residual, activation, slope, key, p)
    return y.to(x.dtype)


def fold(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    skipped_batches: Tensor | None,
    momentum: float | None,
    mean: Tensor,
    variance: Tensor,
    count: Tensor | int,
) -> None:
    """Fold a batch into the running buffers, without a look at any value from the host.

    A batch of fewer than two values per channel is only counted: it has no unbiased variance.
    """
    few = torch.as_tensor(count < 2, device=mean.device)
    take = torch.ones_like(few)
    if skipped_batches is not None:
        take = (mean.isfinite() & variance.isfinite()).all()
        skipped_batches += ~take
    if num_batches_tracked is not None:
        num_batches_tracked += take
    take = take & ~few
    factor: float | Tensor = 0.0
    if momentum is not None:
        factor = momentum
    elif num_batches_tracked is not None:
        factor = 1 / num_batches_tracked.to(mean.dtype)
    for buffer, batch in ((running_mean, mean), (running_var, variance * (count / (count - 1 + few)))):
        if buffer is None:
            continue
        old = buffer.to(mean.dtype)
        blended = torch.where(torch.as_tensor(factor == 1), batch, (1 - factor) * old + factor * batch)
        buffer.copy_(torch.where(take, blended, old))


def _sign_bits(z: Tensor, like: Tensor) -> Tensor:
    flat = torch.zeros((like.numel() + 7) // 8 * 8, dtype=torch.uint8, device=z.device)
    ordered = torch.empty_like(like, dtype=torch.uint8).copy_(~(z <= 0))
    flat[: like.numel()] = ordered.as_strided((like.numel(),), (1,))
    return (flat.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=z.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, like: Tensor) -> Tensor:
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1).flatten()
    return flat[: like.numel()].bool().as_strided(like.shape, like.stride())


def _results(
    x: Tensor, y: Tensor, z: Tensor, mean: Tensor, variance: Tensor, eps: float, save: bool, save_bits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    output = empty_output(x).copy_(y)
    if torch.compiler.is_compiling():
        # Dynamo of torch 2.11 loses the gradient of an output that an in-place operation returned.
        output = output.clone()
    statistics = torch.stack((mean, (variance + eps).rsqrt())) if save else mean.new_empty(0)
    bits = _sign_bits(z, output) if save_bits else torch.empty(0, dtype=torch.uint8, device=x.device)
    return output, statistics, bits


def batch_norm_train(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    num_batches_tracked,
    skipped_batches,
    momentum,
    eps,
    residual=None,
    activation=0,
    slope=0.01,
    key=None,
    p=0.0,
    save_sign_bits=False,
    fold=fold,
):
    mean, variance = mean_and_variance(input)
    y, z = normalize(input, mean, variance, weight, bias, eps, residual, activation, slope, key, p)
    count = input.numel() // max(1, input.shape[1])
    fold(running_mean, running_var, num_batches_tracked, skipped_batches, momentum, mean, variance, count)
    return _results(input, y, z, mean, variance, eps, True, save_sign_bits)


def batch_norm_eval(
    input,
    mean,
    variance,
    weight,
    bias,
    eps,
    residual=None,
    activation=0,
    slope=0.01,
    key=None,
    p=0.0,
    save=False,
    save_sign_bits=False,
):
    mean, variance = mean.to(accumulate_dtype(input)), variance.to(accumulate_dtype(input))
    y, z = normalize(input, mean, variance, weight, bias, eps, residual, activation, slope, key, p)
    return _results(input, y, z, mean, variance, eps, save, save_sign_bits)


def grad_of_z(
    grad_output, x, statistics, weight, bias, residual, activation, slope, key, p, sign_bits
) -> Tensor:
    """The gradient of z, through the epilogue."""
    grad = grad_output.to(statistics.dtype)
    if key is not None:
        grad = torch.where(kept(grad_output if x is None else x, key, p), grad, 0.0)
        grad = grad * (1 / (1 - p) if p < 1 else 0.0)
    if activation == NONE:
        return grad
    if sign_bits is not None and sign_bits.numel():
        like = empty_output(grad_output if x is None else x)
        return torch.where(
            unpack_bits(sign_bits, like), grad, grad * slope if activation == LEAKY_RELU else 0.0
        )
    mean, invstd = statistics
    z = (x.to(grad.dtype) - per_channel(mean, x)) * per_channel(invstd, x)
    z = z if weight is None else z * per_channel(weight, x)
    z = z if bias is None else z + per_channel(bias, x)
    z = z if residual is None else z + residual.to(z.dtype)
    return _activation_gradient(grad, z, activation, slope)


def _sums(dz: Tensor, x: Tensor, statistics: Tensor) -> Tensor:
    mean, invstd = statistics
    xhat = (x.to(dz.dtype) - per_channel(mean, x)) * per_channel(invstd, x)
    dims = [d for d in range(x.dim()) if d != 1]
    return torch.stack((dz.sum(dims), (dz * xhat).sum(dims)))


def _grad_input(dz: Tensor, x: Tensor, statistics: Tensor, weight: Tensor | None, means: Tensor) -> Tensor:
    mean, invstd = statistics
    xhat = (x.to(dz.dtype) - per_channel(mean, x)) * per_channel(invstd, x)
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    return (dz - per_channel(means[0], x) - xhat * per_channel(means[1], x)) * per_channel(scale, x)


def batch_norm_backward(
    grad_output,
    input,
    statistics,
    weight,
    bias,
    batch_statistics,
    need_input,
    need_affine,
    need_residual,
    residual=None,
    activation=0,
    slope=0.01,
    key=None,
    p=0.0,
    sign_bits=None,
):
    dz = grad_of_z(
        grad_output, input, statistics, weight, bias, residual, activation, slope, key, p, sign_bits
    )
    like = empty_output(grad_output if input is None else input)
    none = grad_output.new_empty(0)
    sums = statistics
    if need_affine or (need_input and batch_statistics):
        sums = _sums(dz, input, statistics)
    grad_input = none
    if need_input and batch_statistics:
        count = input.numel() // max(1, input.shape[1])
        grad_input = torch.empty_like(like).copy_(
            _grad_input(dz, input, statistics, weight, sums / max(1, count))
        )
    elif need_input:
        scale = statistics[1] if weight is None else statistics[1] * weight.to(statistics.dtype)
        grad_input = torch.empty_like(like).copy_(dz * per_channel(scale, grad_output))
    return (
        grad_input,
        sums[1].to(weight.dtype) if need_affine and weight is not None else statistics.new_empty(0),
        sums[0].to(bias.dtype) if need_affine and bias is not None else statistics.new_empty(0),
        torch.empty_like(like).copy_(dz) if need_residual else none,
    )


def batch_norm_moments(input):
    mean, variance = mean_and_variance(input)
    count = input.numel() // max(1, input.shape[1])
    split = mean.new_tensor([count % COUNT_BASE, count // COUNT_BASE])
    return torch.cat((mean, variance * count, split))


def batch_norm_merge(
    moments, running_mean, running_var, num_batches_tracked, skipped_batches, momentum, fold=fold
):
    channels = (moments.shape[1] - 2) // 2
    means, m2 = moments[:, :channels], moments[:, channels : 2 * channels]
    counts = (moments[:, -2] + moments[:, -1] * COUNT_BASE)[:, None]
    count = counts.sum(0)
    # Sets of no values are left out: their zeros are no means.
    mean = torch.where(counts > 0, means * (counts / count.clamp(min=1)), 0.0).sum(0)
    squares = torch.where(counts > 0, m2 + counts * (means - mean).square(), 0.0).sum(0)
    variance = squares / count.clamp(min=1)
    fold(running_mean, running_var, num_batches_tracked, skipped_batches, momentum, mean, variance, count)
    return mean, variance, count


def batch_norm_backward_reduce(
    grad_output,
    input,
    statistics,
    weight,
    bias,
    residual=None,
    activation=0,
    slope=0.01,
    key=None,
    p=0.0,
    sign_bits=None,
):
    dz = grad_of_z(
        grad_output, input, statistics, weight, bias, residual, activation, slope, key, p, sign_bits
    )
    return _sums(dz, input, statistics)


def batch_norm_backward_input(
    grad_output,
    input,
    statistics,
    means,
    weight,
    bias,
    need_residual,
    residual=None,
    activation=0,
    slope=0.01,
    key=None,
    p=0.0,
    sign_bits=None,
):
    dz = grad_of_z(
        grad_output, input, statistics, weight, bias, residual, activation, slope, key, p, sign_bits
    )
    like = empty_output(input)
    return (
        torch.empty_like(like).copy_(_grad_input(dz, input, statistics, weight, means)),
        torch.empty_like(like).copy_(dz) if need_residual else grad_output.new_empty(0),
    )

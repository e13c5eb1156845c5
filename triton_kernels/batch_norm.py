"""Launchers of batch normalisation: y = dropout(activation(weight * (x - mean) * invstd + bias + residual)).

x is (N, C, *) of any strides; contiguous tensors and those with channels innermost are taken as they lie, any
other is made contiguous. Per-channel tensors are (C); statistics are (2, C), mean and
invstd = 1 / sqrt(biased variance + eps), in float32 (float64 for float64 x). activation: 0 none, 1 relu,
2 leaky_relu with ``slope``, 3 silu, 4 gelu (erf), 5 gelu (tanh). The dropout mask is that of ``key`` and
``p``, indexed in the output's memory order; no key, no dropout. sign_bits: uint8 (ceil(numel / 8)), bit
i & 7 of byte i >> 3 says whether what enters the activation is > 0 at position i of x's memory. Outputs
that are not wanted are empty.
"""

import torch

from ._layout import as_layout, layout_of
from ._parameters import accumulate_dtype
from .batch_norm_backward import launch_batch_norm_input_gradient, launch_batch_norm_sums
from .batch_norm_forward import launch_batch_norm_normalize
from .batch_norm_on_chip import (
    launch_batch_norm_on_chip_backward,
    launch_batch_norm_on_chip_train,
    on_chip_tile,
)
from .batch_norm_statistics import (
    launch_batch_norm_merge,
    launch_batch_norm_moments,
    launch_batch_norm_statistics,
)

__all__ = [
    "launch_batch_norm_backward",
    "launch_batch_norm_backward_input",
    "launch_batch_norm_backward_reduce",
    "launch_batch_norm_eval",
    "launch_batch_norm_merge",
    "launch_batch_norm_moments",
    "launch_batch_norm_train",
]


def launch_batch_norm_train(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    num_batches_tracked: torch.Tensor | None,
    skipped_batches: torch.Tensor | None,
    momentum: float | None,
    eps: float,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    slope: float = 0.01,
    key: torch.Tensor | None = None,
    p: float = 0.0,
    save_sign_bits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, statistics, sign_bits) with the batch's statistics, folded into the buffers given; see
    :func:`launch_batch_norm_statistics`."""
    x, layout = layout_of(x)
    residual = None if residual is None else as_layout(residual, x)
    epilogue = (residual, activation, slope, key, p, save_sign_bits)
    elementwise = layout_of(x, whole_bytes=save_sign_bits)[1]
    # Where the update of a channel's buffers depends on what all channels see, no program can make it alone.
    if momentum is not None and skipped_batches is None:
        tile = on_chip_tile(x, elementwise)
        if tile is not None:
            buffers = (running_mean, running_var, num_batches_tracked)
            return launch_batch_norm_on_chip_train(
                x, elementwise, tile, weight, bias, *buffers, momentum, eps, *epilogue
            )
    statistics = launch_batch_norm_statistics(
        x, layout, running_mean, running_var, num_batches_tracked, skipped_batches, momentum, eps
    )
    y, signs = launch_batch_norm_normalize(
        x, elementwise, statistics[0], statistics[1], weight, bias, None, *epilogue
    )
    return y, statistics, signs


def launch_batch_norm_eval(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    slope: float = 0.01,
    key: torch.Tensor | None = None,
    p: float = 0.0,
    save: bool = False,
    save_sign_bits: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, statistics, sign_bits) with given statistics; save: whether ``statistics`` is wanted."""
    x, layout = layout_of(x, whole_bytes=save_sign_bits)
    acc = accumulate_dtype(x.dtype)
    if save:
        statistics = torch.stack((mean.to(acc), (variance.to(acc) + eps).rsqrt()))
    else:
        statistics = x.new_empty(0, dtype=acc)
    residual = None if residual is None else as_layout(residual, x)
    epilogue = (residual, activation, slope, key, p, save_sign_bits)
    y, signs = launch_batch_norm_normalize(x, layout, mean, variance, weight, bias, eps, *epilogue)
    return y, statistics, signs


def launch_batch_norm_backward(
    grad_output: torch.Tensor,
    x: torch.Tensor | None,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    batch_statistics: bool,
    need_input: bool,
    need_affine: bool,
    need_residual: bool,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    slope: float = 0.01,
    key: torch.Tensor | None = None,
    p: float = 0.0,
    sign_bits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad_input, grad_weight, grad_bias, grad_residual).

    batch_statistics: the forward was :func:`launch_batch_norm_train`. x may be None where only the input's
    gradient of an evaluation without activation is wanted. bias and residual are read to recompute
    z + residual, unless sign_bits spare that.
    """
    if x is None:
        dy, layout = layout_of(grad_output)
    else:
        x, layout = layout_of(x)
        dy = as_layout(grad_output, x)
    residual = _residual(residual, sign_bits, dy)
    epilogue = (residual, activation, slope, key, p, sign_bits)
    if need_input and (need_affine or batch_statistics):
        assert x is not None
        tile = on_chip_tile(x, layout)
        if tile is not None:
            needs = (batch_statistics, need_affine, need_residual)
            return launch_batch_norm_on_chip_backward(
                dy, x, layout, tile, statistics, weight, bias, *needs, *epilogue
            )
    sums = None
    grad_weight, grad_bias = statistics.new_empty(0), statistics.new_empty(0)
    if need_affine or (batch_statistics and need_input):
        assert x is not None
        sums = launch_batch_norm_sums(dy, x, layout, statistics, weight, bias, *epilogue)
        if need_affine:
            dtype = statistics.dtype if weight is None else weight.dtype
            # Copied, so that no result shares memory with another.
            grad_bias, grad_weight = sums[0].to(dtype), sums[1].to(dtype, copy=True)
    count = max(layout.batch * layout.spatial, 1)
    grad_input, grad_residual = launch_batch_norm_input_gradient(
        dy,
        x,
        layout,
        statistics,
        sums if batch_statistics else None,
        1.0 / count,
        weight,
        bias,
        need_input,
        need_residual,
        *epilogue,
    )
    return grad_input, grad_weight, grad_bias, grad_residual


def _residual(
    residual: torch.Tensor | None, sign_bits: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor | None:
    return None if residual is None or sign_bits is not None else as_layout(residual, like)


def launch_batch_norm_backward_reduce(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    slope: float = 0.01,
    key: torch.Tensor | None = None,
    p: float = 0.0,
    sign_bits: torch.Tensor | None = None,
) -> torch.Tensor:
    """acc (2, C): sum(dz) and sum(dz * (x - mean) * invstd), the gradients of bias and weight."""
    x, layout = layout_of(x)
    residual = _residual(residual, sign_bits, x)
    return launch_batch_norm_sums(
        as_layout(grad_output, x),
        x,
        layout,
        statistics,
        weight,
        bias,
        residual,
        activation,
        slope,
        key,
        p,
        sign_bits,
    )


def launch_batch_norm_backward_input(
    grad_output: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    means: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    need_residual: bool,
    residual: torch.Tensor | None = None,
    activation: int = 0,
    slope: float = 0.01,
    key: torch.Tensor | None = None,
    p: float = 0.0,
    sign_bits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_input, grad_residual); means (2, C): the sums of :func:`launch_batch_norm_backward_reduce`
    divided by the count, grad_input = weight * invstd * (dz - means[0] - (x - mean) * invstd * means[1])."""
    x, layout = layout_of(x)
    return launch_batch_norm_input_gradient(
        as_layout(grad_output, x),
        x,
        layout,
        statistics,
        means.contiguous(),
        1.0,
        weight,
        bias,
        True,
        need_residual,
        _residual(residual, sign_bits, x),
        activation,
        slope,
        key,
        p,
        sign_bits,
    )

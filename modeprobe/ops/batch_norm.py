"""Batch normalisation operators: fake kernels, autograd, and the backend that runs them.

Saved for the backward pass are the input, the statistics (mean and invstd, float32) and the parameters,
never a running buffer: these may change between the two passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from modeprobe import _extension, reference
from modeprobe.ops import backend
from modeprobe.ops.batch_norm_fake import FAKES
from modeprobe.ops.eager import eager

ACTIVATIONS = {
    None: reference.NONE,
    "relu": reference.RELU,
    "leaky_relu": reference.LEAKY_RELU,
    "silu": reference.SILU,
    "gelu": reference.GELU,
    "gelu_tanh": reference.GELU_TANH,
}

_backends: dict[str, Any] = {}


class Epilogue(NamedTuple):
    """What follows the normalisation: ``y = dropout(activation(z + residual))``."""

    residual: Tensor | None = None
    activation: int = reference.NONE
    slope: float = 0.01
    key: Tensor | None = None
    p: float = 0.0

    def wants_sign_bits(self) -> bool:
        # One bit per element, where recomputing z would keep the whole residual alive.
        return self.residual is not None and self.activation in (reference.RELU, reference.LEAKY_RELU)

    def wants_input(self) -> bool:
        return self.activation != reference.NONE and not self.wants_sign_bits()


PLAIN = Epilogue()


# Operators that update buffers, with the place of the first of these four among their arguments.
UPDATING = {"batch_norm_train": 3, "batch_norm_merge": 1}


def once(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    """``operator``, which leaves its buffers alone when it runs inside a backward pass."""
    first = UPDATING[name]

    def run(*args):
        if recomputing():
            args = *args[:first], *[None] * 4, *args[first + 4 :]
        return operator(*args)

    return run


_library = torch.library.Library("modeprobe", "FRAGMENT")

if _extension.loaded():
    for _name, _fake in FAKES.items():
        torch.library.register_fake(f"modeprobe::{_name}", _fake)
    _backends["native"] = SimpleNamespace(
        **{_name: getattr(torch.ops.modeprobe, _name).default for _name in FAKES}
    )
    for _name in UPDATING:
        _operator, _once = getattr(_backends["native"], _name), f"{_name}_once"
        _library.define(
            str(_operator._schema).removeprefix("modeprobe::").replace(_name, _once, 1),
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        torch.library.register_fake(f"modeprobe::{_once}", FAKES[_name])
        _library.impl(_once, once(_name, _operator), "CompositeExplicitAutograd")
        setattr(_backends["native"], _once, getattr(torch.ops.modeprobe, _once).default)

# The reference is plain torch, which a compiler sees through; only its update of the buffers is closed to it.
_library.define(
    "batch_norm_fold_once(Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, Tensor(d!)? skipped_batches, float? momentum, "
    "Tensor mean, Tensor variance, Tensor count) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "batch_norm_fold_once", "CompositeExplicitAutograd")
def _fold_once(*args: Any) -> None:
    if not recomputing():
        reference.fold(*args)


torch.library.register_fake("modeprobe::batch_norm_fold_once", lambda *args: None)


def _traced_fold(*args: Any) -> None:
    *buffers_and_moments, variance, count = args
    count = count if isinstance(count, Tensor) else variance.new_full((), count)
    torch.ops.modeprobe.batch_norm_fold_once(*buffers_and_moments, variance, count)


_backends["reference"] = SimpleNamespace(
    **{_name: getattr(reference, _name, None) for _name in FAKES},
    **{f"{_name}_once": partial(getattr(reference, _name), fold=_traced_fold) for _name in UPDATING},
)


def operators(name: str) -> Any:
    """The operators of backend ``name``, with the signatures of ``csrc/library.cpp``."""
    if name == "triton" and name not in _backends:
        from modeprobe.ops import batch_norm_triton

        _backends[name] = batch_norm_triton
    return _backends[name]


def updating(ops: Any, name: str) -> Any:
    """The operator ``name``, which updates buffers; in a compiled graph the form that asks when it runs
    whether it recomputes. An exported program keeps the operator that needs no Python."""
    # Not is_exporting(): before torch 2.13 Dynamo answers that with True whenever it compiles.
    if torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag:
        return getattr(ops, f"{name}_once", getattr(ops, name))
    return getattr(ops, name)


def _forward(ctx, x, weight, bias, residual, key, call):
    running_mean, running_var, counter, skipped, training, momentum, eps, activation, slope, p, name = call
    ops = operators(name)
    bits = recomputes = False
    if activation != reference.NONE:
        epilogue = Epilogue(residual, activation, slope, key, p)
        bits, recomputes = epilogue.wants_sign_bits(), epilogue.wants_input()
    tail = (residual, activation, slope, key, p)
    if training:
        y, statistics, sign_bits = updating(ops, "batch_norm_train")(
            x, weight, bias, running_mean, running_var, counter, skipped, momentum, eps, *tail, bits
        )
    else:
        y, statistics, sign_bits = ops.batch_norm_eval(
            x, running_mean, running_var, weight, bias, eps, *tail, True, bits
        )
    need = ctx.needs_input_grad
    ctx.save_for_backward(
        x if training or recomputes or need[1] or need[2] else None,
        statistics,
        weight,
        bias if recomputes else None,
        residual if recomputes else None,
        key,
        sign_bits if bits else None,
    )
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.arguments = training, eps, activation, slope, p, name
    return y


def bias_of(ctx, saved: Tensor | None, statistics: Tensor, weight: Tensor | None) -> Tensor | None:
    """The saved bias, or what has its shape and dtype: its values count only where z is recomputed."""
    if saved is not None or ctx.bias_dtype is None:
        return saved
    if weight is not None and weight.dtype is ctx.bias_dtype:
        return weight
    return statistics[0].to(ctx.bias_dtype)


def _backward(ctx, grad):
    """The gradients of x, weight, bias and residual."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return differentiable_backward(ctx, ctx.saved_tensors, reference.mean_and_variance, grad)
    x, statistics, weight, bias, residual, key, sign_bits = ctx.saved_tensors
    training, _, activation, slope, p, name = ctx.arguments
    bias = bias_of(ctx, bias, statistics, weight)
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    plain = activation == reference.NONE and key is None
    gx, gw, gb, gr = operators(name).batch_norm_backward(
        grad,
        x,
        statistics,
        weight,
        bias,
        training,
        need_x,
        need_weight or need_bias,
        need_residual and not plain,
        residual,
        activation,
        slope,
        key,
        p,
        sign_bits,
    )
    return (
        gx if need_x else None,
        gw if need_weight else None,
        gb if need_bias else None,
        (grad if plain else gr) if need_residual else None,
    )


class BatchNorm(torch.autograd.Function):
    """``batch_norm_train`` or ``batch_norm_eval``, differentiable; ``call`` is what ``_forward`` unpacks."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, key, *call):
        return _forward(ctx, x, weight, bias, residual, key, call)

    @staticmethod
    def backward(ctx, grad):
        return *_backward(ctx, grad), *[None] * 12


class PackedBatchNorm(torch.autograd.Function):
    """The same with ``call`` in one argument, as each costs time; a compiler must see all tensors."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, key, call):
        return _forward(ctx, x, weight, bias, residual, key, call)

    @staticmethod
    def backward(ctx, grad):
        return *_backward(ctx, grad), None, None


_packed = eager(PackedBatchNorm)


def differentiable_backward(
    ctx, saved: tuple, moments: Callable[[Tensor], tuple[Tensor, Tensor]], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients as differentiable functions of the saved tensors, for double backward; in training
    `moments` gives mean and biased variance of x."""
    x, statistics, weight, bias, residual, key, sign_bits = saved
    if bias is None and ctx.bias_dtype is not None:
        bias = statistics[0].detach().to(ctx.bias_dtype).requires_grad_()
    training, eps, activation, slope, p, _ = ctx.arguments
    need = ctx.needs_input_grad[:4]
    dz, linear = grad, activation == reference.NONE or sign_bits is not None
    if linear:
        # The epilogue's derivative does not depend on z: nothing of it is left to differentiate.
        dz = reference.grad_of_z(
            grad, x, statistics, weight, bias, None, activation, slope, key, p, sign_bits
        ).to(grad.dtype)
        activation, key = reference.NONE, None
    if x is None:
        scale = statistics[1] if weight is None else statistics[1] * weight.to(statistics.dtype)
        gx = (dz * reference.per_channel(scale, grad)).to(grad.dtype)
        return gx if need[0] else None, None, None, dz if need[3] else None
    if training:
        mean, variance = moments(x)
    else:
        mean, variance, eps = statistics[0], statistics[1].pow(-2), 0.0
    y, _ = reference.normalize(x, mean, variance, weight, bias, eps, residual, activation, slope, key, p)
    wanted = [
        t for t, needed in zip((x, weight, bias, residual), need, strict=True) if needed and t is not None
    ]
    found = iter(torch.autograd.grad(y.to(x.dtype), wanted, dz, create_graph=True) if wanted else ())
    grads = [next(found) if needed else None for needed in need[:3]]
    # A linear epilogue saves no residual: its gradient is dz.
    grads.append((dz if linear else next(found)) if need[3] else None)
    return tuple(grads)


def _vmapped(x: Tensor) -> set[int]:
    """The levels of ``torch.vmap`` that have given `x` a dimension."""
    functorch, levels = torch._C._functorch, set()
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            levels.add(functorch.maybe_get_level(x))
        x = functorch.get_unwrapped(x)
    return levels


def _transformable(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    skipped_batches: Tensor | None,
    epilogue: Epilogue,
) -> Tensor:
    """Plain torch operations, which ``torch.func`` and forward-mode derivatives see through."""
    if training:
        mean, variance = reference.mean_and_variance(x)
        buffers = running_mean, running_var, num_batches_tracked, skipped_batches
        if any(buffer is not None for buffer in buffers):
            compiling = torch.compiler.is_compiling()
            if not compiling and running_mean is not None and not _vmapped(x) <= _vmapped(running_mean):
                # torch's own words.
                raise RuntimeError(
                    "Batch norm got a batched tensor as input while the running_mean or running_var, which "
                    "will be updated in place, were not batched.\nIf you are using a module and do not need "
                    "eval mode, please set `track_running_stats` to be False."
                )
            count = x.numel() // max(1, x.shape[1])
            reference.fold(*buffers, momentum, mean.detach(), variance.detach(), count)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, variance = running_mean, running_var
    return reference.normalize(x, mean, variance, weight, bias, eps, *epilogue)[0].to(x.dtype)


def recomputing() -> bool:
    """Whether a backward pass is running: a forward inside it recomputes a batch that was counted before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None = None,
    skipped_batches: Tensor | None = None,
    epilogue: Epilogue = PLAIN,
) -> Tensor:
    """Batch normalisation on the backend in force; arguments are taken as checked."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _transformable(
            x,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            num_batches_tracked,
            skipped_batches,
            epilogue,
        )
    name = backend.resolve(x.device.type)
    if training and recomputing():
        running_mean = running_var = num_batches_tracked = skipped_batches = None
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (epilogue.residual is not None and epilogue.residual.requires_grad)
    ):
        residual, activation, slope, key, p = epilogue
        call = (
            running_mean,
            running_var,
            num_batches_tracked,
            skipped_batches,
            training,
            momentum,
            eps,
            activation,
            slope,
            p,
            name,
        )
        if torch.compiler.is_compiling():
            # Dynamo wants every tensor once.
            residual = residual.view_as(residual) if residual is x else residual
            return BatchNorm.apply(x, weight, bias, residual, key, *call)
        return _packed(x, weight, bias, residual, key, call)
    ops = operators(name)
    if training:
        return updating(ops, "batch_norm_train")(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked,
            skipped_batches,
            momentum,
            eps,
            *epilogue,
        )[0]
    return ops.batch_norm_eval(x, running_mean, running_var, weight, bias, eps, *epilogue)[0]

"""Dropout operators: fake kernels, autograd, and the backend that runs them.

Every operator is a pure function of its arguments, the key among them: nothing but the key is saved, and
forward and backward cannot disagree. Dropout in each of its forms is affine in its input, so its backward,
double backward and forward derivative are the operator itself without the constant part.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from modeprobe import _extension, mask
from modeprobe.ops import backend, dropout_reference
from modeprobe.ops.dropout_fake import FAKES
from modeprobe.ops.dropout_reference import is_dense
from modeprobe.ops.eager import eager

DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))

_backends: dict[str, Any] = {"reference": dropout_reference}

if _extension.loaded():
    for _name, _fake in FAKES.items():
        torch.library.register_fake(f"modeprobe::{_name}", _fake)
    _backends["native"] = SimpleNamespace(
        **{_name: getattr(torch.ops.modeprobe, _name).default for _name in FAKES}
    )


def operators(name: str) -> Any:
    """The operators of backend ``name``, with the signatures of ``csrc/library.cpp``."""
    if name == "triton" and name not in _backends:
        from modeprobe.ops import dropout_triton

        _backends[name] = dropout_triton
    return _backends[name]


def transforming() -> bool:
    """Whether ``torch.func`` transforms or forward-mode derivatives look at what runs now."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _memory_order(x: Tensor) -> list[int] | None:
    """The dimensions of ``x`` from the outermost in memory to the innermost; None for row-major.

    Positions in the mask count so. A gradient or a tangent has to be laid out like the tensor that the mask
    was applied to, or it meets another mask.
    """
    if x.is_contiguous() or not is_dense(x):
        return None
    strides = x.stride()
    return sorted(range(x.dim()), key=lambda d: -strides[d])


def _laid_out(x: Tensor, order: list[int] | None) -> Tensor:
    if order is None:
        return x if x.is_contiguous() else x.contiguous()
    return x.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])


def _counts_memory(operator: str, rest: tuple) -> bool:
    return operator == "dropout" or (operator == "alpha_dropout" and not rest[0])


class Masked(Function):
    """``operator(x, key, p, *rest, p_tensor)`` for dropout, structured_dropout and alpha_dropout."""

    @staticmethod
    def forward(x, key, p_tensor, p, rest, operator, name):
        return getattr(operators(name), operator)(x, key, p, *rest, p_tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, key, p_tensor, *ctx.arguments = inputs
        ctx.order = _memory_order(x)
        ctx.save_for_backward(key) if p_tensor is None else ctx.save_for_backward(key, p_tensor)

    @staticmethod
    def backward(ctx, grad):
        key, *p_tensor = ctx.saved_tensors
        if _counts_memory(ctx.arguments[2], ctx.arguments[1]):
            grad = _laid_out(grad, ctx.order)
        grad_x = derivative(grad, key, p_tensor[0] if p_tensor else None, *ctx.arguments)
        return grad_x, None, None, None, None, None, None


class MaskedTransforms(Masked):
    """The same for ``torch.func``; Dynamo takes no Function with a jvp."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        Masked.setup_context(ctx, inputs, output)
        _, key, p_tensor, *_ = inputs
        ctx.save_for_forward(key) if p_tensor is None else ctx.save_for_forward(key, p_tensor)

    @staticmethod
    def jvp(ctx, tangent, *_):
        key, *p_tensor = ctx.saved_tensors
        if _counts_memory(ctx.arguments[2], ctx.arguments[1]):
            tangent = _laid_out(tangent, ctx.order)
        return derivative(tangent, key, p_tensor[0] if p_tensor else None, *ctx.arguments)

    @staticmethod
    def vmap(info, in_dims, x, key, p_tensor, p, rest, operator, name):
        if in_dims[1] is None and in_dims[2] is None:
            return _same_mask(x, in_dims[0], key, p_tensor, p, rest, operator, name), 0

        def at(value, dim, index):
            return value if dim is None else value.select(dim, index)

        examples = []
        for b in range(info.batch_size):
            one, its_key, its_p = (
                at(value, dim, b) for value, dim in zip((x, key, p_tensor), in_dims[:3], strict=True)
            )
            examples.append(masked(one, its_key, its_p, p, rest, operator, name))
        return torch.stack(examples), 0


def _same_mask(x, dim, key, p_tensor, p, rest, operator, name):
    """A batch of examples under one mask: the mask of an example, shared along the batch."""
    x = x.movedim(dim, 0)
    order = list(range(x.dim()))
    if not _counts_memory(operator, rest):
        rest = ([0, *(d + 1 for d in rest[0])], *rest[1:])
    else:
        within = _memory_order(x[0] if x.shape[0] else x.new_empty(x.shape[1:]))
        if within is not None:
            order[1:] = [d + 1 for d in within]
        offset, *others = (rest[0], rest[1]) if operator == "dropout" else (rest[2], rest[1])
        if operator == "dropout":
            operator, rest = "structured_dropout", ([0], offset, *others)
        else:
            rest = ([0], *others, offset)
    y = masked(x.permute(order), key, p_tensor, p, rest, operator, name)
    return y.permute([order.index(d) for d in range(len(order))])


def derivative(tangent, key, p_tensor, p, rest, operator, name):
    """The linear part of :func:`masked`: its derivative, and its transpose."""
    if operator == "alpha_dropout":
        rest = (rest[0], True, rest[2])
    return masked(tangent, key, p_tensor, p, rest, operator, name)


_masked = eager(Masked)


def masked(
    x: Tensor, key: Tensor, p_tensor: Tensor | None, p: float, rest: tuple, operator: str, name: str
) -> Tensor:
    """``operator(x, key, p, *rest, p_tensor)`` of backend ``name``, differentiable by ``x``."""
    if torch.compiler.is_compiling():
        if x.requires_grad and torch.is_grad_enabled():
            return Masked.apply(x, key, p_tensor, p, rest, operator, name)
    elif transforming():
        return MaskedTransforms.apply(x, key, p_tensor, p, rest, operator, name)
    elif x.requires_grad and torch.is_grad_enabled():
        return _masked(x, key, p_tensor, p, rest, operator, name)
    return getattr(operators(name), operator)(x, key, p, *rest, p_tensor)


_on_cpu, _on_cuda = _extension.built_for("cpu"), _extension.built_for("cuda")
_native_dropout: Any = torch.ops.modeprobe.dropout.default._op if _on_cpu or _on_cuda else None
_cpu = torch.device("cpu")
_grad_enabled = torch.is_grad_enabled


class _FreshDropout(Function):
    """:class:`Masked` for the commonest call of all, on a contiguous tensor, in the fewest steps."""

    @staticmethod
    def forward(ctx, x, p):
        key = _fresh_key(x)
        ctx.save_for_backward(key)
        ctx.p = p
        return _native_dropout(x, key, p)

    @staticmethod
    def backward(ctx, grad):
        (key,) = ctx.saved_tensors
        if not grad.is_contiguous():
            grad = grad.contiguous()
        if _grad_enabled():
            return masked(grad, key, None, ctx.p, (0, True), "dropout", "native"), None
        return _native_dropout(grad, key, ctx.p), None


_fresh_dropout = eager(_FreshDropout)


def _fresh_key(x: Tensor) -> Tensor:
    return mask.new_key(_cpu if x.is_cpu else x.device)  # asking for the device costs as much as a sum


_transforms_active = torch._C._are_functorch_transforms_active


def fresh_dropout(x: Tensor, p: float) -> Tensor | None:
    """Inverted dropout under a fresh key by the compiled kernel; None where something else has a say.

    What :func:`masked` would do, in half of its time for a tensor of 16 elements.
    """
    if (
        not ((x.is_cpu and _on_cpu) or (x.is_cuda and _on_cuda))
        or ((backend._owned and backend._own.name) or backend._selected) not in ("auto", "native")
        or forward_ad._current_level >= 0
        or _transforms_active()
    ):
        return None
    if x.requires_grad and _grad_enabled():
        return _fresh_dropout(x, p) if x.is_contiguous() else None
    return _native_dropout(x, _fresh_key(x), p)


class DropoutInplace(Function):
    @staticmethod
    def forward(x, key, p_tensor, p, rest, operator, name):
        operators(name).dropout_(x, key, p, *rest, p_tensor)
        return x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_dirty(inputs[0])
        Masked.setup_context(ctx, inputs, output)

    backward = Masked.backward


def _may_be_refused(x: Tensor) -> bool:
    """Whether writing into ``x`` may be forbidden, or takes more than its memory: ``copy_`` knows.

    Autograd would refuse a leaf or a view after the operator has written into it, an inference tensor never;
    torch's fallback for a negated view takes no operator that returns nothing.
    """
    if x.is_neg() or (x.is_inference() and not torch.is_inference_mode_enabled()):
        return True
    return x.requires_grad and torch.is_grad_enabled() and (x.is_leaf or x._is_view())


def masked_(
    x: Tensor, key: Tensor, p_tensor: Tensor | None, p: float, rest: tuple, operator: str, name: str
) -> Tensor:
    """:func:`masked` written into ``x``."""
    compiling = torch.compiler.is_compiling()
    if operator != "dropout" or transforming() or (not compiling and _may_be_refused(x)):
        return x.copy_(masked(x, key, p_tensor, p, rest, operator, name))
    if x.requires_grad and torch.is_grad_enabled():
        return DropoutInplace.apply(x, key, p_tensor, p, rest, "dropout", name)
    operators(name).dropout_(x, key, p, *rest, p_tensor)
    if name != "reference" and not compiling and not x.is_inference():
        torch.autograd.graph.increment_version(x)  # operators of a library do not
    return x


def dropout_mask(key: Tensor, numel: int, p: float, offset: int, p_tensor: Tensor | None) -> Tensor:
    name = backend.resolve(key.device.type)
    return operators(name).dropout_mask(key, numel, p, offset, p_tensor)


class BiasDropoutAdd(Function):
    @staticmethod
    def forward(x, bias, residual, key, p_tensor, p, offset, name):
        return operators(name).bias_dropout_add(x, bias, residual, key, p, offset, p_tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, _, key, p_tensor, *ctx.arguments = inputs
        ctx.save_for_backward(key) if p_tensor is None else ctx.save_for_backward(key, p_tensor)

    @staticmethod
    def backward(ctx, grad):
        key, *p_tensor = ctx.saved_tensors
        p, offset, name = ctx.arguments
        rate = p_tensor[0] if p_tensor else None
        grad_x = grad_bias = None
        if ctx.needs_input_grad[1] and not (torch.is_grad_enabled() and grad.requires_grad):
            grad_x, grad_bias = operators(name).bias_dropout_add_backward(grad, key, p, offset, rate)
        elif ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_x = masked(grad.contiguous(), key, rate, p, (offset, True), "dropout", name)
            if ctx.needs_input_grad[1]:
                grad_bias = grad_x.sum_to_size(grad.shape[-1:])
        grad_residual = grad if ctx.needs_input_grad[2] else None
        return grad_x, grad_bias, grad_residual, None, None, None, None, None


_bias_dropout_add = eager(BiasDropoutAdd)


def bias_dropout_add(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    key: Tensor,
    p_tensor: Tensor | None,
    p: float,
    offset: int,
    name: str,
) -> Tensor:
    if not torch.compiler.is_compiling() and transforming():
        summed = x if bias is None else x + bias
        return residual + masked(summed, key, p_tensor, p, ((), offset, True), "structured_dropout", name)
    if torch.is_grad_enabled() and (
        x.requires_grad or residual.requires_grad or (bias is not None and bias.requires_grad)
    ):
        apply = _bias_dropout_add
        if torch.compiler.is_compiling():
            apply = BiasDropoutAdd.apply
            # Dynamo wants every tensor once.
            residual = residual.view_as(residual) if residual is x else residual
            bias = bias.view_as(bias) if bias is x or bias is residual else bias
        return apply(x, bias, residual, key, p_tensor, p, offset, name)
    return operators(name).bias_dropout_add(x, bias, residual, key, p, offset, p_tensor)


class SoftmaxDropout(Function):
    """Returns the probabilities, too: saved as an output, they are differentiable in a double backward."""

    @staticmethod
    def forward(scores, mask, key, p_tensor, p, offset, name):
        return operators(name).softmax_dropout(scores, mask, key, p, True, offset, p_tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, mask, key, p_tensor, *ctx.arguments = inputs
        ctx.mask_shape = None if mask is None else mask.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], key, *(() if p_tensor is None else (p_tensor,)))

    @staticmethod
    def backward(ctx, grad, grad_probabilities):
        probabilities, key, *p_tensor = ctx.saved_tensors
        p, offset, name = ctx.arguments
        rate = p_tensor[0] if p_tensor else None
        if grad is None and grad_probabilities is None:
            return (None,) * 7
        if grad is not None and grad_probabilities is None and not torch.is_grad_enabled():
            operator = operators(name).softmax_dropout_backward
            grad_scores = operator(grad, probabilities, key, p, offset, rate)
        else:
            total = grad_probabilities
            if grad is not None:
                dropped = masked(grad.contiguous(), key, rate, p, (offset, True), "dropout", name)
                total = dropped if total is None else total + dropped
            grad_scores = probabilities * (total - (total * probabilities).sum(-1, keepdim=True))
        grad_mask = grad_scores.sum_to_size(ctx.mask_shape) if ctx.needs_input_grad[1] else None
        return grad_scores, grad_mask, None, None, None, None, None


_softmax_dropout = eager(SoftmaxDropout)


def softmax_dropout(
    scores: Tensor,
    mask: Tensor | None,
    key: Tensor,
    p_tensor: Tensor | None,
    p: float,
    offset: int,
    name: str,
) -> Tensor:
    if not torch.compiler.is_compiling() and transforming():
        probabilities = dropout_reference.softmax(scores, mask).to(scores.dtype)
        return masked(probabilities, key, p_tensor, p, ((), offset, True), "structured_dropout", name)
    if torch.is_grad_enabled() and (scores.requires_grad or (mask is not None and mask.requires_grad)):
        apply = SoftmaxDropout.apply if torch.compiler.is_compiling() else _softmax_dropout
        return apply(scores, mask, key, p_tensor, p, offset, name)[0]
    return operators(name).softmax_dropout(scores, mask, key, p, False, offset, p_tensor)[0]

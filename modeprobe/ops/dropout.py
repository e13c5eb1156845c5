"""Dropout operators: fake kernels, autograd, and the backend that runs them.

Every operator is a pure function of its arguments, the key among them. Dropout is linear and a diagonal
matrix, so the operator is its own backward, double backward and forward derivative; only the key is saved.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from modeprobe import _extension
from modeprobe.ops import backend, dropout_reference
from modeprobe.ops.dropout_reference import empty_output

DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))

_NAMES = ("dropout", "dropout_", "dropout_mask")

_backends: dict[str, Any] = {"reference": dropout_reference}

if _extension.loaded():
    _backends["native"] = SimpleNamespace(
        **{name: getattr(torch.ops.modeprobe, name).default for name in _NAMES}
    )

    @torch.library.register_fake("modeprobe::dropout")
    def _(input, key, p, offset=0, scaled=True, p_tensor=None):
        return empty_output(input)

    @torch.library.register_fake("modeprobe::dropout_")
    def _(input, key, p, offset=0, scaled=True, p_tensor=None):
        return None

    @torch.library.register_fake("modeprobe::dropout_mask")
    def _(key, numel, p, offset=0, p_tensor=None):
        return key.new_empty((numel,), dtype=torch.bool)


def operators(name: str) -> Any:
    """The operators of backend ``name``, with the signatures of ``csrc/library.cpp``."""
    if name == "triton" and name not in _backends:
        from modeprobe.ops import dropout_triton

        _backends[name] = dropout_triton
    return _backends[name]


class Dropout(torch.autograd.Function):
    """``ops.dropout`` with a backward; ``ops`` is a namespace of operators."""

    @staticmethod
    def forward(ctx, x, key, p, offset, scaled, p_tensor, name):
        ctx.save_for_backward(key) if p_tensor is None else ctx.save_for_backward(key, p_tensor)
        ctx.arguments = p, offset, scaled, name
        return operators(name).dropout(x, key, p, offset, scaled, p_tensor)

    @staticmethod
    def backward(ctx, grad):
        key, *rest = ctx.saved_tensors
        p, offset, scaled, name = ctx.arguments
        grad_x = dropout(grad, key, p, offset, scaled, rest[0] if rest else None, name)
        return grad_x, None, None, None, None, None, None


class DropoutInplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, key, p, offset, scaled, p_tensor, name):
        ctx.mark_dirty(x)
        ctx.save_for_backward(key) if p_tensor is None else ctx.save_for_backward(key, p_tensor)
        ctx.arguments = p, offset, scaled, name
        operators(name).dropout_(x, key, p, offset, scaled, p_tensor)
        return x

    backward = Dropout.backward


def dropout(
    x: Tensor,
    key: Tensor,
    p: float,
    offset: int,
    scaled: bool,
    p_tensor: Tensor | None,
    name: str,
) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return Dropout.apply(x, key, p, offset, scaled, p_tensor, name)
    return operators(name).dropout(x, key, p, offset, scaled, p_tensor)


def dropout_(
    x: Tensor,
    key: Tensor,
    p: float,
    offset: int,
    scaled: bool,
    p_tensor: Tensor | None,
    name: str,
) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return DropoutInplace.apply(x, key, p, offset, scaled, p_tensor, name)
    operators(name).dropout_(x, key, p, offset, scaled, p_tensor)
    if not torch.compiler.is_compiling() and not x.is_inference():
        torch.autograd.graph.increment_version(x)
    return x


def dropout_mask(key: Tensor, numel: int, p: float, offset: int, p_tensor: Tensor | None) -> Tensor:
    name = backend.resolve(key.device.type)
    return operators(name).dropout_mask(key, numel, p, offset, p_tensor)

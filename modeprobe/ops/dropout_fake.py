"""Shapes, dtypes and strides of the dropout operators' results, for tracing without data."""

from __future__ import annotations

import torch

from modeprobe.ops.dropout_reference import empty_output


def _contiguous(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def dropout(input, key, p, offset=0, scaled=True, p_tensor=None):
    return empty_output(input)


def dropout_(input, key, p, offset=0, scaled=True, p_tensor=None):
    return None


def dropout_mask(key, numel, p, offset=0, p_tensor=None):
    return key.new_empty((numel,), dtype=torch.bool)


def fold_in(key, n, n_tensor=None):
    return torch.empty_like(key)


def structured_dropout(input, key, p, shared_dims, offset=0, scaled=True, p_tensor=None):
    return empty_output(input)


def alpha_dropout(input, key, p, shared_dims, linear=False, offset=0, p_tensor=None):
    return empty_output(input)


def bias_dropout_add(input, bias, residual, key, p, offset=0, p_tensor=None):
    return _contiguous(input)


def bias_dropout_add_backward(grad_output, key, p, offset=0, p_tensor=None):
    return _contiguous(grad_output), grad_output.new_empty(grad_output.shape[-1])


def softmax_dropout(scores, mask, key, p, save, offset=0, p_tensor=None):
    return _contiguous(scores), _contiguous(scores) if save else scores.new_empty(0)


def softmax_dropout_backward(grad_output, probabilities, key, p, offset=0, p_tensor=None):
    return _contiguous(grad_output)


FAKES = {
    fake.__name__: fake
    for fake in (
        dropout,
        dropout_,
        dropout_mask,
        fold_in,
        structured_dropout,
        alpha_dropout,
        bias_dropout_add,
        bias_dropout_add_backward,
        softmax_dropout,
        softmax_dropout_backward,
    )
}

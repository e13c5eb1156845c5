"""Shapes, dtypes and strides of the BatchNorm operators' results, for tracing without data."""

from __future__ import annotations

import torch

from modeprobe.reference import accumulate_dtype, empty_output


def _fake_forward(input, save, save_sign_bits):
    channels = input.shape[1]
    acc = accumulate_dtype(input)
    return (
        empty_output(input),
        input.new_empty((2, channels) if save else (0,), dtype=acc),
        input.new_empty(((input.numel() + 7) // 8 if save_sign_bits else 0,), dtype=torch.uint8),
    )


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
):
    return _fake_forward(input, True, save_sign_bits)


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
    return _fake_forward(input, save, save_sign_bits)


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
    like = grad_output if input is None else input

    def affine(parameter):
        if need_affine and parameter is not None:
            return parameter.new_empty((like.shape[1],))
        return statistics.new_empty((0,))

    return (
        empty_output(like) if need_input else like.new_empty((0,)),
        affine(weight),
        affine(bias),
        empty_output(like) if need_residual else like.new_empty((0,)),
    )


def batch_norm_moments(input):
    return input.new_empty((2 * input.shape[1] + 2,), dtype=accumulate_dtype(input))


def batch_norm_moments_double(input):
    return input.new_empty((2 * input.shape[1] + 2,), dtype=torch.float64)


def batch_norm_merge(moments, running_mean, running_var, num_batches_tracked, skipped_batches, momentum):
    channels = (moments.shape[1] - 2) // 2
    return moments.new_empty((channels,)), moments.new_empty((channels,)), moments.new_empty((1,))


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
    return torch.empty_like(statistics)


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
    return empty_output(input), empty_output(input) if need_residual else input.new_empty((0,))


FAKES = {
    fake.__name__: fake
    for fake in (
        batch_norm_train,
        batch_norm_eval,
        batch_norm_backward,
        batch_norm_moments,
        batch_norm_moments_double,
        batch_norm_merge,
        batch_norm_backward_reduce,
        batch_norm_backward_input,
    )
}

"""The BatchNorm operators on the Triton kernels, opaque to torch.compile as the compiled ones are."""

from __future__ import annotations

from typing import Any

from modeprobe.ops.batch_norm import UPDATING, once
from modeprobe.ops.batch_norm_fake import FAKES
from modeprobe.ops.triton_call import prepared, register
from modeprobe.triton_kernels import batch_norm as kernels

_EPILOGUE = "Tensor? residual=None, int activation=0, float slope=0.01, Tensor? key=None, float p=0.0"
_BUFFERS = (
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "Tensor(d!)? skipped_batches, float? momentum"
)
_BUFFER_NAMES = ("running_mean", "running_var", "num_batches_tracked", "skipped_batches")
_SAVED = "Tensor statistics, Tensor? weight, Tensor? bias"

# Those of csrc/library.cpp; signs of z + residual, where wanted, are the last result or argument.
_SCHEMAS = {
    "batch_norm_train": f"(Tensor input, Tensor? weight, Tensor? bias, {_BUFFERS}, float eps, {_EPILOGUE}, "
    "bool save_sign_bits=False) -> (Tensor, Tensor, Tensor)",
    "batch_norm_eval": "(Tensor input, Tensor mean, Tensor variance, Tensor? weight, Tensor? bias, "
    f"float eps, {_EPILOGUE}, bool save=False, bool save_sign_bits=False) -> (Tensor, Tensor, Tensor)",
    "batch_norm_backward": f"(Tensor grad_output, Tensor? input, {_SAVED}, bool batch_statistics, "
    f"bool need_input, bool need_affine, bool need_residual, {_EPILOGUE}, Tensor? sign_bits=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "batch_norm_moments": "(Tensor input) -> Tensor",
    "batch_norm_merge": f"(Tensor moments, {_BUFFERS}) -> (Tensor, Tensor, Tensor)",
    "batch_norm_backward_reduce": f"(Tensor grad_output, Tensor input, {_SAVED}, {_EPILOGUE}, "
    "Tensor? sign_bits=None) -> Tensor",
    "batch_norm_backward_input": "(Tensor grad_output, Tensor input, Tensor statistics, Tensor means, "
    f"Tensor? weight, Tensor? bias, bool need_residual, {_EPILOGUE}, Tensor? sign_bits=None) "
    "-> (Tensor, Tensor)",
}


def _register(name: str) -> Any:
    launch = prepared(getattr(kernels, f"launch_{name}"), _BUFFER_NAMES if name in UPDATING else ())
    return register(name, once(name, launch) if name in UPDATING else launch, _SCHEMAS[name], FAKES[name])


batch_norm_train = _register("batch_norm_train")
batch_norm_eval = _register("batch_norm_eval")
batch_norm_backward = _register("batch_norm_backward")
batch_norm_moments = _register("batch_norm_moments")
batch_norm_merge = _register("batch_norm_merge")
batch_norm_backward_reduce = _register("batch_norm_backward_reduce")
batch_norm_backward_input = _register("batch_norm_backward_input")

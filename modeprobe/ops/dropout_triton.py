"""The dropout operators on the Triton kernels, opaque to torch.compile as the compiled ones are."""

from __future__ import annotations

from typing import Any

from modeprobe.ops.dropout_fake import FAKES
from modeprobe.ops.triton_call import prepared, register

_P = "Tensor key, float p"
_PLACE = "int offset=0"
_RATE = "Tensor? p_tensor=None"
_GRAD = "Tensor grad_output"

# Those of csrc/library.cpp.
_SCHEMAS = {
    "dropout": f"(Tensor input, {_P}, {_PLACE}, bool scaled=True, {_RATE}) -> Tensor",
    "dropout_": f"(Tensor(a!) input, {_P}, {_PLACE}, bool scaled=True, {_RATE}) -> ()",
    "dropout_mask": f"(Tensor key, int numel, float p, {_PLACE}, {_RATE}) -> Tensor",
    "fold_in": "(Tensor key, int n, Tensor? n_tensor=None) -> Tensor",
    "structured_dropout": f"(Tensor input, {_P}, int[] shared_dims, {_PLACE}, bool scaled=True, {_RATE}) "
    "-> Tensor",
    "alpha_dropout": f"(Tensor input, {_P}, int[] shared_dims, bool linear=False, {_PLACE}, {_RATE}) "
    "-> Tensor",
    "bias_dropout_add": f"(Tensor input, Tensor? bias, Tensor residual, {_P}, {_PLACE}, {_RATE}) -> Tensor",
    "bias_dropout_add_backward": f"({_GRAD}, {_P}, {_PLACE}, {_RATE}) -> (Tensor, Tensor)",
    "softmax_dropout": f"(Tensor scores, Tensor? mask, {_P}, bool save, {_PLACE}, {_RATE}) "
    "-> (Tensor, Tensor)",
    "softmax_dropout_backward": f"({_GRAD}, Tensor probabilities, {_P}, {_PLACE}, {_RATE}) -> Tensor",
}


def _rate(p, p_tensor):
    return p if p_tensor is None else p_tensor


def _dropout(input, key, p, offset=0, scaled=True, p_tensor=None):
    from modeprobe.triton_kernels import dropout as kernels

    return kernels.launch_dropout_forward(input, key, _rate(p, p_tensor), offset, scaled)


def _dropout_(input, key, p, offset=0, scaled=True, p_tensor=None):
    from modeprobe.triton_kernels import dropout as kernels

    kernels.launch_dropout_forward(input, key, _rate(p, p_tensor), offset, scaled, out=input)


def _dropout_mask(key, numel, p, offset=0, p_tensor=None):
    from modeprobe.triton_kernels import dropout as kernels

    return kernels.launch_dropout_mask(key, numel, _rate(p, p_tensor), offset)


def _fold_in(key, n, n_tensor=None):
    from modeprobe.triton_kernels import dropout as kernels

    return kernels.launch_fold_in(key, _rate(n, n_tensor))


def _structured_dropout(input, key, p, shared_dims, offset=0, scaled=True, p_tensor=None):
    from modeprobe.triton_kernels import structured_dropout as kernels

    return kernels.launch_structured_dropout(input, key, _rate(p, p_tensor), shared_dims, offset, scaled)


def _alpha_dropout(input, key, p, shared_dims, linear=False, offset=0, p_tensor=None):
    rate = _rate(p, p_tensor)
    if not shared_dims:
        from modeprobe.triton_kernels import dropout

        return dropout.launch_alpha_dropout(input, key, rate, offset, linear)
    from modeprobe.triton_kernels import structured_dropout

    return structured_dropout.launch_feature_alpha_dropout(input, key, rate, shared_dims, linear, offset)


def _bias_dropout_add(input, bias, residual, key, p, offset=0, p_tensor=None):
    from modeprobe.triton_kernels import bias_dropout_add as kernels

    return kernels.launch_bias_dropout_add(input, bias, residual, key, _rate(p, p_tensor), offset)


def _bias_dropout_add_backward(grad_output, key, p, offset=0, p_tensor=None):
    from modeprobe.triton_kernels import bias_dropout_add as kernels

    return kernels.launch_bias_dropout_add_backward(grad_output, key, _rate(p, p_tensor), offset)


def _softmax_dropout(scores, mask, key, p, save, offset=0, p_tensor=None):
    from modeprobe.triton_kernels import softmax_dropout as kernels

    rate = _rate(p, p_tensor)
    output, probabilities = kernels.launch_softmax_dropout(scores, mask, key, rate, save, offset)
    return output, probabilities if save else scores.new_empty(0)


def _softmax_dropout_backward(grad_output, probabilities, key, p, offset=0, p_tensor=None):
    from modeprobe.triton_kernels import softmax_dropout as kernels

    rate = _rate(p, p_tensor)
    return kernels.launch_softmax_dropout_backward(grad_output, probabilities, key, rate, offset)


def _register(name: str) -> Any:
    return register(name, prepared(globals()[f"_{name}"]), _SCHEMAS[name], FAKES[name])


dropout = _register("dropout")
dropout_ = _register("dropout_")
dropout_mask = _register("dropout_mask")
fold_in = _register("fold_in")
structured_dropout = _register("structured_dropout")
alpha_dropout = _register("alpha_dropout")
bias_dropout_add = _register("bias_dropout_add")
bias_dropout_add_backward = _register("bias_dropout_add_backward")
softmax_dropout = _register("softmax_dropout")
softmax_dropout_backward = _register("softmax_dropout_backward")

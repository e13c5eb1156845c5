"""What the Triton kernels are compiled for where their resources are read: one work per kernel family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from modeprobe.benchmarks import resources, triton_compile

# Kernels that touch a few numbers per channel or per tensor, one element at a time.
SCALAR = frozenset(
    (
        "_batch_norm_merge_kernel",
        "_dropout_parameters_kernel",
        "_fold_in_kernel",
        "_pack_signs_kernel",
        "_sum_splits_kernel",
    )
)
# Kernels whose only results are such numbers.
REDUCING = frozenset(
    (
        "_batch_norm_backward_reduce_channels_last_kernel",
        "_batch_norm_backward_reduce_kernel",
        "_batch_norm_moments_channels_last_kernel",
        "_batch_norm_moments_kernel",
    )
)

Launch = Callable[[], Any]


def _key() -> torch.Tensor:
    return torch.zeros(2, dtype=torch.int64)


def _dropout(dtype: torch.dtype) -> Launch:
    from modeprobe.triton_kernels import dropout

    x = torch.empty(1 << 24, dtype=dtype)
    return lambda: dropout.launch_dropout_forward(x, _key(), 0.1)


def _alpha_dropout(dtype: torch.dtype) -> Launch:
    from modeprobe.triton_kernels import dropout

    x = torch.empty(1 << 24, dtype=dtype)
    return lambda: dropout.launch_alpha_dropout(x, _key(), 0.1)


_IMAGES = (32, 64, 56, 56)


def _images(dtype: torch.dtype, channels_last: bool, shape: tuple[int, ...] = _IMAGES) -> torch.Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype).to(memory_format=memory_format)


def _structured_dropout(channels_last: bool) -> Callable[[torch.dtype], Launch]:
    def work(dtype: torch.dtype) -> Launch:
        from modeprobe.triton_kernels import structured_dropout

        x = _images(dtype, channels_last)
        return lambda: structured_dropout.launch_structured_dropout(x, _key(), 0.1, (2, 3))

    return work


def _bias_dropout_add(dtype: torch.dtype) -> Launch:
    from modeprobe.triton_kernels import bias_dropout_add

    x = torch.empty((4096, 1024), dtype=dtype)

    def launch() -> None:
        bias_dropout_add.launch_bias_dropout_add(x, x[0], x, _key(), 0.1)
        bias_dropout_add.launch_bias_dropout_add_backward(x, _key(), 0.1)

    return launch


def _softmax_dropout(dtype: torch.dtype) -> Launch:
    from modeprobe.triton_kernels import softmax_dropout

    scores = torch.empty((8, 12, 256, 256), dtype=dtype)
    padding = torch.ones((8, 1, 1, 256), dtype=torch.bool)

    def launch() -> None:
        softmax_dropout.launch_softmax_dropout(scores, padding, _key(), 0.1, True)
        softmax_dropout.launch_softmax_dropout_backward(scores, scores, _key(), 0.1)

    return launch


def _batch_norm(
    channels_last: bool, activation: int = 0, shape: tuple[int, ...] = _IMAGES
) -> Callable[[torch.dtype], Launch]:
    def work(dtype: torch.dtype) -> Launch:
        from modeprobe.triton_kernels import batch_norm

        x = _images(dtype, channels_last, shape)
        one = torch.empty(shape[1])
        tracked = torch.zeros((), dtype=torch.int64)
        residual = x if activation else None

        def launch() -> None:
            _, statistics, signs = batch_norm.launch_batch_norm_train(
                x, one, one, one, one, tracked, None, 0.1, 1e-5, residual, activation,
                save_sign_bits=bool(activation),
            )  # fmt: skip
            batch_norm.launch_batch_norm_backward(
                x, x, statistics, one, one, True, True, True, bool(activation), residual, activation,
                sign_bits=signs if activation else None,
            )  # fmt: skip

        return launch

    return work


WORKS: dict[str, Callable[[torch.dtype], Launch]] = {
    "dropout": _dropout,
    "alpha_dropout": _alpha_dropout,
    "structured_dropout": _structured_dropout(False),
    "structured_dropout channels_last": _structured_dropout(True),
    "bias_dropout_add": _bias_dropout_add,
    "softmax_dropout": _softmax_dropout,
    "batch_norm": _batch_norm(False),
    "batch_norm channels_last": _batch_norm(True),
    "batch_norm, small": _batch_norm(False, shape=(32, 256, 16, 16)),
    "batch_norm, small, channels_last": _batch_norm(True, shape=(8, 512, 8, 8)),
    "batch_norm + add + relu": _batch_norm(False, activation=1),
    "batch_norm + add + relu channels_last": _batch_norm(True, activation=1),
}


def triton_resources(
    archs: tuple[int, ...] = triton_compile.ARCHS,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> Iterator[resources.Resources]:
    """The resources of every Triton kernel as the launchers launch it, a kernel and dtype once per work.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, or no cuobjdump is found.
    """
    for work, prepare in WORKS.items():
        for dtype in dtypes:
            for launch in triton_compile.record(prepare(dtype)):
                if launch.name in SCALAR:
                    continue
                label = f"{launch.name}, {str(dtype).removeprefix('torch.')}, {work}"
                for arch in archs:
                    built = triton_compile.compile_launch(launch, arch)
                    yield triton_compile.measure(built, label, dtype.itemsize)

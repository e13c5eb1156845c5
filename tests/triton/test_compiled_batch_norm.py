"""Triton BatchNorm compiled ahead of time: access width, registers, spills, float64."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'modeprobe[triton]'")

from modeprobe.benchmarks import resources, triton_compile
from modeprobe.triton_kernels import batch_norm

pytestmark = [
    pytest.mark.rung("triton"),
    pytest.mark.skipif(resources.why_no_tool() is not None, reason=str(resources.why_no_tool())),
]

SHAPE = (8, 64, 56, 56)
# Threads that the registers must let reside on an SM: with 64 bytes in flight each, more than 25 KiB.
THREADS_PER_SM = 512


def launches(dtype, channels_last, shape=SHAPE):
    """Every kernel of a training step and an evaluation forward."""
    x = torch.empty(shape, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    one = torch.empty(shape[1], dtype=acc)
    tracked = torch.zeros((), dtype=torch.int64)

    def step():
        _, statistics, _ = batch_norm.launch_batch_norm_train(x, one, one, one, one, tracked, None, 0.1, 1e-5)
        batch_norm.launch_batch_norm_backward(x, x, statistics, one, one, True, True, True, False)
        batch_norm.launch_batch_norm_eval(x, one, one, one, one, 1e-5)

    return triton_compile.record(step)


def check(launch, dtype, arch):
    built = triton_compile.compile_launch(launch, arch)
    found = triton_compile.measure(built, launch.name)
    assert found.spills == 0, launch.name
    assert found.stack == 0, launch.name
    if dtype != torch.float64:
        assert found.f64 == 0, launch.name
        assert resources.count_ptx_f64(built.asm["ptx"]) == 0, launch.name
    if "merge" in launch.name or "sum_splits" in launch.name:
        return  # a few programs over a few numbers per channel
    assert found.vector_loads >= 2, f"{launch.name}: input is not loaded 16 bytes at a time"
    if "forward" in launch.name or "input" in launch.name:
        assert found.vector_stores == found.stores > 0, f"{launch.name}: scalar stores"
    # Neighbouring threads hold neighbouring vectors: they go along the last axis first, then along the first.
    tiles = re.findall(r"sizePerThread = \[1, 1, [248]\],.*order = (\[.*\])", built.asm["ttgir"])
    assert set(tiles) <= {"[2, 0, 1]"}, launch.name
    if dtype != torch.float64:
        assert 32 * found.warps_per_sm(32 * launch.warps) >= THREADS_PER_SM, (launch.name, found.registers)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_step_and_evaluation(dtype, channels_last):
    recorded = launches(dtype, channels_last)
    assert len(recorded) == 7
    for launch in recorded:
        check(launch, dtype, 90)


@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures(arch):
    for launch in launches(torch.bfloat16, arch == 100):
        check(launch, torch.bfloat16, arch)


def test_float64_and_float16_compile():
    for dtype, channels_last in ((torch.float64, False), (torch.float16, True)):
        for launch in launches(dtype, channels_last):
            check(launch, dtype, 90)


@pytest.mark.parametrize("shape", [(32, 64, 16, 16), (8, 64, 8, 8)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_small_layer_takes_one_launch_each_way(shape, channels_last):
    recorded = launches(torch.float32, channels_last, shape)
    if channels_last and shape[0] == 32:
        assert len(recorded) == 7
        return
    assert [launch.name.split("_kernel")[0] for launch in recorded] == [
        "_batch_norm_on_chip_forward",
        "_batch_norm_on_chip_backward",
        "_batch_norm_forward_channels_last" if channels_last else "_batch_norm_forward",
    ]
    for launch in recorded[:2]:
        built = triton_compile.compile_launch(launch, 90)
        found = triton_compile.measure(built, launch.name)
        assert (found.spills, found.stack, found.f64) == (0, 0, 0), launch.name
        assert found.vector_loads >= 2, launch.name
        assert found.vector_stores >= 2, launch.name

"""Triton dropout compiled ahead of time: access width, registers, spills, float64, instruction counts."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'modeprobe[triton]'")

import triton
import triton.language as tl
from modeprobe.benchmarks import resources, triton_compile
from modeprobe.triton_kernels import dropout

pytestmark = [
    pytest.mark.rung("triton"),
    pytest.mark.skipif(resources.why_no_tool() is not None, reason=str(resources.why_no_tool())),
]

KEY = torch.zeros(2, dtype=torch.int64)
LARGE = 1 << 22


def compiled(launch, arch, kernel="_dropout_forward_kernel"):
    [found] = [one for one in triton_compile.record(launch) if one.name == kernel]
    built = triton_compile.compile_launch(found, arch)
    return found, built, triton_compile.measure(built, kernel, found.args["x_ptr"].element_size())


def check(launch, built, found, threads_per_sm=512):
    """The gates: whole vectors only, no spills, room for enough warps, no float64."""
    vector = launch.args["BLOCK"] // launch.args["VEC"] // (32 * launch.warps)
    assert found.vector_loads >= vector, "input is not loaded 16 bytes at a time"
    assert found.vector_stores >= vector, "output is not stored 16 bytes at a time"
    assert found.loads - found.vector_loads <= 6, "scalar loads beyond the key, the parameters and the edge"
    assert found.stores - found.vector_stores <= 1, "scalar stores beyond the edge"
    assert found.spills == 0
    assert found.stack == 0
    assert 32 * found.warps_per_sm(32 * launch.warps) >= threads_per_sm
    if launch.args["x_ptr"].dtype != torch.float64:
        assert found.f64 == 0
        assert resources.count_ptx_f64(built.asm["ptx"]) == 0


@pytest.mark.parametrize("arch", triton_compile.ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_forward(dtype, arch):
    x = torch.empty(LARGE, dtype=dtype)
    launch, built, found = compiled(lambda: dropout.launch_dropout_forward(x, KEY, 0.1), arch)
    check(launch, built, found)
    if dtype.itemsize == 2 and arch == 90:
        assert found.per_element <= 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_p_on_the_device(dtype):
    x = torch.empty(LARGE, dtype=dtype)
    p = torch.zeros((), dtype=torch.float64)
    check(*compiled(lambda: dropout.launch_dropout_forward(x, KEY, p), 90))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_dropout(dtype):
    x = torch.empty(LARGE, dtype=dtype)
    check(*compiled(lambda: dropout.launch_alpha_dropout(x, KEY, 0.1), 90))


def test_small_tensors_use_whole_vectors_too():
    x = torch.empty(1 << 14, dtype=torch.bfloat16)
    check(*compiled(lambda: dropout.launch_dropout_forward(x, KEY, 0.1), 90))


def test_scalar_loads_are_caught():
    storage = torch.empty(LARGE + 1, dtype=torch.bfloat16)
    launch, built, found = compiled(lambda: dropout.launch_dropout_forward(storage[1:], KEY, 0.1), 90)
    assert found.vector_loads == 0
    with pytest.raises(AssertionError, match="16 bytes at a time"):
        check(launch, built, found)


@triton.jit
def _leaking_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    position = tl.arange(0, BLOCK // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    x = tl.load(x_ptr + position)
    tl.store(y_ptr + position, (x.to(tl.float64) * 1.1).to(tl.float32))


def test_a_float64_leak_is_caught():
    x, y = torch.empty(1024), torch.empty(1024)
    launch, built, found = compiled(
        lambda: _leaking_kernel[(1,)](x, y, 512, 4, num_warps=4), 90, "_leaking_kernel"
    )
    assert resources.count_ptx_f64(built.asm["ptx"]) > 0
    with pytest.raises(AssertionError):
        check(launch, built, found)


def test_recording_executes_nothing_and_needs_no_gpu():
    x = torch.ones(64)
    [launch] = triton_compile.record(lambda: dropout.launch_dropout_forward(x, KEY, 0.5, out=x))
    assert torch.equal(x, torch.ones(64))
    assert launch.grid == (1,)

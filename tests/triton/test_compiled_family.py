"""The dropout family and the BatchNorm epilogues on Triton, compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'modeprobe[triton]'")

from modeprobe.benchmarks import resources, triton_compile, triton_works

pytestmark = [
    pytest.mark.rung("triton"),
    pytest.mark.skipif(resources.why_no_tool() is not None, reason=str(resources.why_no_tool())),
]

FAMILY = [name for name in triton_works.WORKS if name not in ("dropout", "alpha_dropout")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("work", FAMILY)
def test_whole_vectors_no_spills_no_float64(work, dtype):
    for launch in triton_compile.record(triton_works.WORKS[work](dtype)):
        if launch.name in triton_works.SCALAR:
            continue
        built = triton_compile.compile_launch(launch, 90)
        found = triton_compile.measure(built, launch.name)
        assert found.spills == found.stack == 0, launch.name
        assert found.f64 == resources.count_ptx_f64(built.asm["ptx"]) == 0, launch.name
        assert found.vector_loads, f"{launch.name}: scalar loads"
        if launch.name in triton_works.REDUCING:
            assert not found.vector_stores
        else:
            assert found.vector_stores, f"{launch.name}: scalar stores"
        assert 32 * found.warps_per_sm(32 * launch.warps) >= 256, (launch.name, found.registers)

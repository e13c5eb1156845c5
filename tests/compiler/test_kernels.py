"""Promises of the CUDA kernels, read from the built library, and that each gate catches its fault."""

import functools
import shutil
import subprocess
from dataclasses import replace

import pytest
from modeprobe.benchmarks import kernels, resources
from support import native_build

from modeprobe import _extension

NO_LIBRARY = "the library has no CUDA kernels: MODEPROBE_CUDA=1 pip install --no-build-isolation -e ."
pytestmark = [
    pytest.mark.rung("compiler"),
    pytest.mark.skipif(resources.why_no_tool() is not None, reason=str(resources.why_no_tool())),
]
needs_library = pytest.mark.skipif(kernels.library() is None, reason=NO_LIBRARY)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: install the CUDA toolkit")


@functools.cache
def built():
    return kernels.cuda_kernels(kernels.library())


@needs_library
def test_every_kernel_keeps_its_promises():
    assert kernels.broken_promises(built()) == []


@needs_library
def test_every_architecture_has_every_kernel():
    by_arch = {}
    for one in built():
        by_arch.setdefault(one.arch, set()).add(one.kernel)
    assert len({frozenset(names) for names in by_arch.values()}) == 1
    names = by_arch.popitem()[1]
    for dtype in ("float", "__half", "__nv_bfloat16", "double"):
        assert f"dropout_forward_kernel<{dtype}, 1>" in names
        assert f"batch_norm_moments_kernel<{dtype}, 0>" in names
    assert {kernels.promise_of(one).pattern for one in built()} == {p.pattern for p in kernels.PROMISES}


PROGRAM = """
#include "modeprobe/dropout.cuh"
using namespace modeprobe;
template cudaError_t modeprobe::launch_dropout_forward<float>(const float*, float*, int64_t, const int64_t*,
    uint64_t, double, const void*, bool, cudaStream_t);
"""


def compiled(name, header, old, new):
    """The dropout kernel for sm_90 from headers with a planted fault."""
    folder = native_build.CACHE / name
    headers = native_build.changed_headers(name, header, old, new)
    source, target = folder / "fault.cu", folder / "fault.cubin"
    source.write_text(PROGRAM)
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin", "-arch=sm_90", f"-I{headers}"]
    command = ["nvcc", *flags, "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [one for one in kernels.cuda_kernels(target) if one.kernel.startswith("dropout_forward_kernel")]


SELECT = "return keep ? x[0] * scale : acc_t<T>(0);"
LOAD = "const uint4 v = *static_cast<const uint4*>(from);"
FAULTS = {
    "no fault": ("dropout.cuh", SELECT, SELECT, None),
    "float64 leak": (
        "dropout.cuh",
        SELECT,
        SELECT.replace("scale", "scale * (1.0 / 3)"),
        "float64 instructions",
    ),
    "scalar loads": (
        "vector.cuh",
        LOAD,
        "const volatile uint32_t* w = static_cast<const volatile uint32_t*>(from);\n"
        "  const uint4 v = make_uint4(w[0], w[1], w[2], w[3]);",
        "no 16-byte load",
    ),
    "register spill": (
        "elementwise.cuh",
        "sizeof(T) == 8 ? 2 : 3 +",
        "sizeof(T) == 8 ? 2 : 8 +",
        "accesses to spilled registers",
    ),
}


@needs_nvcc
@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name):
    header, old, new, report = FAULTS[name]
    broken = kernels.broken_promises(compiled("gate-" + name.replace(" ", "-"), header, old, new))
    if report is None:
        assert broken == []
    else:
        assert any(report in line for line in broken), broken


def test_promises_are_checked_on_numbers():
    good = resources.Resources(
        "dropout_forward_kernel<float, 4>", "sm_90", 80, 0, 0, 0, 4, 4, 15, 12, 0, 16.0
    )
    assert kernels.broken_promises([good]) == []
    for change in (
        {"spills": 1}, {"stack": 8}, {"f64": 1}, {"vector_loads": 0}, {"vector_stores": 0}, {"registers": 88},
        {"per_element": 17.5}, {"per_element": None},
    ):  # fmt: skip
        assert len(kernels.broken_promises([replace(good, **change)])) == 1, change


def body(*lines):
    """Instructions from ``opcode operands``, 16 bytes apart."""
    return [resources.Instruction(16 * n, "", *line.split(" ", 1)) for n, line in enumerate(lines)]


def test_a_reduction_is_counted_with_its_sums():
    skip, add = "BRA P0, 0x70", ["FFMA R1, R4, R4, R1"] * 4
    loop = ["MOV R1, RZ", LOAD_A, skip, *add, BACK]
    assert resources.instructions_per_element(body(*loop), 4) == 7 / 4
    assert resources.instructions_per_element(body(*loop[:3], "MUFU.EX2 R1, R4", *add[:3], BACK), 4) == 3 / 4
    assert resources.instructions_per_element(body("MUFU.EX2 R1, R4", LOAD_A, *add, BACK), 4) == 6 / 4


BACK = "BRA 0x10"
LOAD_A, LOAD_B = "LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R2.64+0x10]"
COPY, END = "LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64]", "LDGDEPBAR "
IN_FLIGHT = {
    "both before the first use": ([LOAD_A, LOAD_B, "FADD R1, R5, R9", BACK], 32),
    "each used before the next": ([LOAD_A, "FADD R1, R4, R4", LOAD_B, "FADD R1, R8, R8", BACK], 16),
    "moved on, which waits": ([LOAD_A, "MOV R20, R7", BACK], 16),
    "three groups of two copies": ([COPY, COPY, END, "DEPBAR.LE SB0, 0x2", "LDS.128 R4, [R9]", BACK], 96),
    "everything at once": ([COPY, BACK, END, "DEPBAR.LE SB0, 0x0", "LDS.128 R4, [R9]"], None),
    "nothing": (["FADD R1, R4, R4", BACK], None),
}


@pytest.mark.parametrize("name", IN_FLIGHT)
def test_bytes_in_flight(name):
    lines, want = IN_FLIGHT[name]
    assert resources.bytes_in_flight(body("MOV R0, R0", *lines, "EXIT ")) == want


def test_no_cuda_library_is_explained(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(kernels, "triton_kernels", list)
    monkeypatch.setattr(_extension, "why_not", lambda device: "modeprobe was built without CUDA kernels")
    assert kernels.main() == 0
    assert "None: modeprobe was built without CUDA kernels" in capsys.readouterr().out

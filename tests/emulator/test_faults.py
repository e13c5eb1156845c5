"""The sanitizers over every kernel, and faults planted into the real headers, each of which must be found."""

import os
import re
import subprocess

import pytest
from support import native_build

pytestmark = [
    pytest.mark.rung("emulator"),
    pytest.mark.skipif(native_build.why_not() is not None, reason=str(native_build.why_not())),
]

SOURCES = {
    name: native_build.EMULATOR / f"{name}.cpp"
    for name in ("scheduler", "sweep", "dropout_kernels", "family_kernels", "batch_norm_kernels")
}
OPTIONS = {
    False: {"flags": ["-O1", "-DEMULATOR_ONE_DTYPE"], "link": []},
    True: {"flags": ["-O1", *native_build.SANITIZERS], "link": native_build.SANITIZERS},
}


def sweep(sanitized):
    """The program over the headers as they are."""
    name = "sweep-sanitized" if sanitized else "sweep"
    return native_build.build(name, SOURCES.values(), **OPTIONS[sanitized])


def run(program):
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program], capture_output=True, text=True, env=environment, timeout=300)


def test_address_and_undefined_behaviour_sanitizers():
    done = run(sweep(sanitized=True))
    assert done.returncode == 0, done.stderr[-4000:]


def test_without_a_fault_the_sweep_passes():
    done = run(sweep(sanitized=False))
    assert done.returncode == 0, done.stderr[-4000:]


# name: (header, what stands there, what the fault puts there, sanitizer wanted, what must be reported)
FAULTS = {
    "removed barrier": (
        "channel_reduce.cuh",
        "  __syncthreads();\n  Fold<Value> fold;\n  if (thread < blockDim.x * count) {",
        "  Fold<Value> fold;\n  if (thread < blockDim.x * count) {",
        False,
        "WRONG: batch mean is off",
    ),
    "off by one at the tail": (
        "elementwise.cuh",
        "if (at >= 0 && at < chunks.n)",
        "if (at >= 0 && at <= chunks.n)",
        True,
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "swapped lanes": (
        "lanes.cuh",
        "+ 2 * i] = words.w[i] << 16;",
        "+ 2 * i] = words.w[3 - i] << 16;",
        False,
        "WRONG: mask differs from the contract",
    ),
    "halves not exchanged": (
        "lanes.cuh",
        "rows.w[i] = odd ? other : own.w[i];",
        "rows.w[i] = own.w[i];",
        False,
        "WRONG: dropout differs from the contract",
    ),
    "forgotten tie": (
        "lanes.cuh",
        "tie |= zero_half(words.w[i] ^ rate.hi_pair);",
        "tie |= 0;",
        False,
        "WRONG: mask differs from the contract",
    ),
    "uninitialised output": (
        "elementwise.cuh",
        "if (start - lane >= chunks.n) return;",
        "if (start - lane + kTileElements - 1 >= chunks.n) return;",
        False,
        "WRONG: dropout leaves its output unwritten",
    ),
    "uninitialised shared memory": (
        "channel_reduce.cuh",
        "for (int i = 0; i < count; ++i) shared[thread / kWarp][lane * count + i] = value[i];",
        "for (int i = 1; i < count; ++i) shared[thread / kWarp][lane * count + i] = value[i];",
        False,
        "WRONG: batch norm leaves its statistics unwritten|WRONG: batch mean is off",
    ),
    "misaligned access": (
        "elementwise.cuh",
        "reinterpret_cast<uintptr_t>(p - head) % kPacketBytes == 0",
        "p != nullptr",
        False,
        r"FAULT: misaligned access of 16 bytes .*dropout_forward_kernel.*thread \(.*of block \(",
    ),
    "copies not waited for": (
        "vector.cuh",
        "  __pipeline_wait_prior(pending);\n",
        "",
        False,
        "WRONG: one launch has other statistics",
    ),
    "elements of another block": (
        "batch_norm_on_chip.cuh",
        "if (unit.whole()) return store_at",
        "if (whole) return store_at",
        False,
        "WRONG: one launch has another output",
    ),
    "divergent barrier": (
        "channel_reduce.cuh",
        "  __syncthreads();\n  Fold<Value> fold;\n  if (thread < blockDim.x * count) {",
        "  Fold<Value> fold;\n  if (thread < blockDim.x * count) {\n    __syncthreads();",
        False,
        "FAULT: divergent barrier.*batch_norm_moments_kernel",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name):
    header, there, fault, sanitized, report = FAULTS[name]
    folder = "fault-" + name.replace(" ", "-")
    headers = native_build.changed_headers(folder, header, there, fault)
    # Only the kernels that the fault concerns are compiled anew.
    of_dropout = header in ("elementwise.cuh", "lanes.cuh")
    wrong = "dropout_kernels" if of_dropout else "batch_norm_kernels"
    right = sweep(sanitized)
    program = native_build.build(
        folder,
        [SOURCES[wrong]],
        headers=headers,
        objects=[right.parent / f"{stem}.o" for stem in SOURCES if stem != wrong],
        **OPTIONS[sanitized],
    )
    done = run(program)
    assert done.returncode != 0, "the fault went unnoticed"
    assert re.search(report, done.stderr), done.stderr[-3000:]

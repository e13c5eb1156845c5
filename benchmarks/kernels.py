"""The table of kernel resources, and what every kernel promises: ``python -m modeprobe.benchmarks.kernels``.

CUDA kernels are read from the built library itself, Triton kernels are compiled; no GPU is needed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from modeprobe.benchmarks import resources
from modeprobe.benchmarks.resources import Resources

THREADS = 256  # per block, of every CUDA kernel
BLOCKS = 4  # per SM, at most, of those that walk through their data
IN_FLIGHT = 32 << 10  # bytes per SM: what CUB's transform asks for on an H100
ITEMSIZES = {"<float": 4, "<__half": 2, "<__nv_bfloat16": 2, "<double": 8}
RESULT = Path("benchmarks") / "results" / "kernels.md"


@dataclass(frozen=True)
class Promise:
    """What holds for the kernels whose short name matches ``pattern``; ``blocks`` reside on one SM."""

    pattern: str
    blocks: int = 1
    vector_loads: bool = False
    vector_stores: bool = False
    in_flight: bool = False  # IN_FLIGHT bytes of loads on their way, from `blocks` blocks
    blocks_sm_100: int = 0  # where ptxas needs more registers there; else 0

    def blocks_on(self, arch: str) -> int:
        return self.blocks_sm_100 if arch == "sm_100" and self.blocks_sm_100 else self.blocks


# The first match counts. Reductions: 0 is contiguous; 2, 4 and 8 are channels last, 16 bytes per thread; 1 is
# channels last where rows do not begin at 16-byte borders.
PROMISES = (
    Promise(
        r"(dropout_forward|alpha_dropout|bias_dropout_add)_kernel<double",
        2,
        vector_loads=True,
        vector_stores=True,
    ),
    Promise(
        r"(dropout_forward|alpha_dropout|bias_dropout_add)_kernel", 3, vector_loads=True, vector_stores=True
    ),
    Promise(r"batch_norm_moments_kernel<\w+, 1>", 2),
    Promise(r"batch_norm_moments_kernel<double", 2, vector_loads=True),
    Promise(r"batch_norm_moments_kernel<\w+, 0>", 4, vector_loads=True, in_flight=True),
    Promise(r"batch_norm_moments_kernel", 2, vector_loads=True, in_flight=True),
    Promise(r"batch_norm_backward_reduce_kernel<double, 1,"),
    Promise(r"batch_norm_backward_reduce_kernel<double", vector_loads=True),
    Promise(r"batch_norm_backward_reduce_kernel<\w+, 1,", 2),
    Promise(r"batch_norm_backward_reduce_kernel<\w+, 0, true", 3, vector_loads=True, in_flight=True),
    Promise(r"batch_norm_backward_reduce_kernel<__half, 8, false", vector_loads=True, in_flight=True),
    Promise(
        r"batch_norm_backward_reduce_kernel<\w+, 8, false",
        2,
        vector_loads=True,
        in_flight=True,
        blocks_sm_100=1,
    ),
    Promise(r"batch_norm_backward_reduce_kernel", 2, vector_loads=True, in_flight=True),
    *(
        Promise(
            rf"batch_norm_{name}",
            blocks,
            vector_loads=True,
            vector_stores=True,
            in_flight="double" not in name,
            blocks_sm_100=blocks_sm_100,
        )
        for name, blocks, blocks_sm_100 in (
            ("normalize_kernel<double, true, false", 1, 0),
            ("normalize_kernel<double", 2, 0),
            (r"normalize_kernel<\w+, \w+, false", 3, 2),
            (r"normalize_kernel<\w+, true, true", 4, 0),
            (r"normalize_kernel<\w+, false, true", 5, 0),
            ("input_gradient_kernel<double, true", 1, 0),
            ("input_gradient_kernel<double", 2, 0),
            (r"input_gradient_kernel<\w+, true, false", 2, 0),
            (r"input_gradient_kernel<\w+, false, false", 3, 0),
            (r"input_gradient_kernel<\w+, true, true", 3, 0),
            (r"input_gradient_kernel<\w+, false, true", 4, 0),
        )
    ),
    # These fetch everything that a block holds at once.
    Promise(r"batch_norm_on_chip_\w+_kernel<\w+, true, false", 1, vector_loads=True, vector_stores=True),
    Promise(r"batch_norm_on_chip_\w+_kernel", 2, vector_loads=True, vector_stores=True),
    Promise(r"structured_dropout_kernel<double", 2, vector_loads=True, vector_stores=True),
    Promise(r"structured_dropout_kernel", 3, vector_loads=True, vector_stores=True),
    Promise(r"bias_dropout_add_backward_kernel<\w+, 1>", 2),
    Promise(r"bias_dropout_add_backward_kernel", 2, vector_loads=True, vector_stores=True, in_flight=True),
    Promise(r"softmax_dropout(_backward)?_held_kernel", 1, vector_loads=True, vector_stores=True),
    Promise(r"softmax_dropout(_backward)?_kernel<double", 1, vector_loads=True, vector_stores=True),
    Promise(r"softmax_dropout(_backward)?_kernel", 2, vector_loads=True, vector_stores=True),
    Promise(r""),
)

# SASS instructions per element on sm_90: of dropout from entry to exit, loads, stores and tie test included;
# of the contiguous reductions per element loaded. At the 4.3 TB/s that a copy reaches on an H200, an SM has
# 13 issue cycles for a warp's elements of 16 bits, and an integer instruction takes two.
INSTRUCTIONS = {
    "batch_norm_moments_kernel<__half, 0>": 11,
    "batch_norm_moments_kernel<__nv_bfloat16, 0>": 10,
    "batch_norm_moments_kernel<float, 0>": 10,
    "batch_norm_backward_reduce_kernel<__half, 0, true>": 8,
    "batch_norm_backward_reduce_kernel<__nv_bfloat16, 0, true>": 7,
    "batch_norm_backward_reduce_kernel<float, 0, true>": 7,
    "dropout_forward_kernel<__half, 4>": 18,
    "dropout_forward_kernel<__nv_bfloat16, 4>": 18,
    "dropout_forward_kernel<float, 4>": 17,
}


def short_name(name: str) -> str:
    """``void modeprobe::dropout_mask_kernel<float>(float const*, ...)`` -> ``dropout_mask_kernel<float>``."""
    name = name.removeprefix("void ").replace("modeprobe::", "")
    name = re.sub(r"\((int|bool)\)", "", name)
    return name.split("(")[0]


def cuda_kernels(library: Path | str) -> list[Resources]:
    """The kernels in a shared library or object file, under their short names."""
    return [replace(one, kernel=short_name(one.kernel)) for one in resources.read(library, ITEMSIZES)]


def promise_of(one: Resources) -> Promise:
    return next(promise for promise in PROMISES if re.match(promise.pattern, one.kernel))


def broken_promises(kernels: Iterable[Resources]) -> list[str]:
    """What the kernels do not keep, one line each; empty when all is well."""
    found = []
    for one in kernels:
        promise, where = promise_of(one), f"{one.kernel} on {one.arch}"
        if one.spills or one.stack:
            found.append(f"{where}: {one.spills} accesses to spilled registers, {one.stack} bytes of stack")
        if one.f64 and "double" not in one.kernel:
            found.append(f"{where}: {one.f64} float64 instructions")
        # For sm_100 nvcc 13.0 takes float64 packets apart into 8-byte loads.
        excused = one.arch == "sm_100" and "double" in one.kernel
        if promise.vector_loads and not one.vector_loads and not excused:
            found.append(f"{where}: no 16-byte load")
        if promise.vector_stores and not one.vector_stores:
            found.append(f"{where}: no 16-byte store")
        waiting = one.in_flight_per_sm(THREADS, BLOCKS)
        promised = IN_FLIGHT * promise.blocks_on(one.arch) // promise.blocks
        if promise.in_flight and (waiting is None or waiting < promised):
            found.append(f"{where}: {waiting} bytes in flight per SM, promised are {promised}")
        warps = one.warps_per_sm(THREADS)
        if warps < promise.blocks_on(one.arch) * THREADS // 32:
            found.append(f"{where}: {one.registers} registers let {warps} warps reside, promised are "
                         f"{promise.blocks_on(one.arch) * THREADS // 32}")  # fmt: skip
        limit = INSTRUCTIONS.get(one.kernel)
        if limit and one.arch == "sm_90" and (one.per_element is None or one.per_element > limit):
            found.append(f"{where}: {one.per_element} instructions per element, promised are {limit}")
    return found


def library() -> Path | None:
    """The built extension, if it carries CUDA kernels."""
    from modeprobe import _extension

    if not _extension.built_for("cuda"):
        return None
    from modeprobe import _C

    return Path(_C.__file__)


def triton_kernels() -> list[Resources]:
    """The Triton kernels as their launchers launch them, for sm_90; empty without Triton."""
    from modeprobe.ops.backend import triton_installed

    if not triton_installed():
        return []
    from modeprobe.benchmarks.triton_works import triton_resources

    return list(triton_resources(archs=(90,)))


def main() -> int:
    """Prints the table and, in a checkout, writes it to ``benchmarks/results``; 1 if a promise is broken."""
    from modeprobe import _extension

    reason = resources.why_no_tool()
    if reason:
        print(reason, file=sys.stderr)
        return 1
    path = library()
    kernels = [] if path is None else cuda_kernels(path)
    text = "# Kernel resources\n\n"
    text += (
        "From the compilers' output, without a GPU: `make kernels`. Instructions per element are those of\n"
    )
    text += (
        "the innermost loop that loads and stores 16 bytes; without a loop, from entry to exit; in kernels\n"
    )
    text += "that store no 16 bytes, reductions, per element loaded.\n"
    text += (
        "KiB in flight: 16-byte loads that the resident threads of one SM wait for at a time; none is given\n"
    )
    text += "for the kernels that fetch all that a block holds at once.\n\n"
    text += "## CUDA\n\n"
    text += (
        resources.markdown(kernels, THREADS, BLOCKS) if kernels else f"None: {_extension.why_not('cuda')}\n"
    )
    text += "\n## Triton\n\n"
    triton = triton_kernels()
    text += resources.markdown(triton) if triton else "None: Triton is not installed.\n"
    print(text)
    if kernels and RESULT.parent.is_dir():
        RESULT.write_text(text)
        print(f"written to {RESULT}")
    broken = broken_promises(kernels)
    for line in broken:
        print(f"BROKEN: {line}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

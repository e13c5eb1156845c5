"""Compiles the Triton kernels ahead of time, without a GPU, exactly as their launchers would launch them.

A launcher runs on CPU tensors whose data nobody reads: each kernel launch in it is recorded instead of
executed, with the block sizes, the number of warps and the alignment that the launcher chose, and compiled
for the architectures asked for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modeprobe.benchmarks import resources

ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its grid, and its arguments in the kernel's own names."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def warps(self) -> int:
        return self.options.get("num_warps", 4)


@contextmanager
def _recording(launches: list[Launch]) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        names = [param.name for param in self.params]
        bound = dict(zip(names, args, strict=False))
        bound |= {name: options.pop(name) for name in list(options) if name in names}
        launches.append(Launch(self, grid, bound, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield
    finally:
        JITFunction.run = run


def record(launch: Callable[[], Any]) -> list[Launch]:
    """The kernel launches in ``launch()``; none is executed, so outputs hold whatever memory held.

    Raises:
        RuntimeError: the kernels were defined for the interpreter (TRITON_INTERPRET=1).
    """
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 defines kernels that cannot be compiled: unset it")
    launches: list[Launch] = []
    with _recording(launches):
        launch()
    return launches


def compile_launch(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel (``.asm["ptx"]``, ``.asm["cubin"]``) for capability ``arch``, as 90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**launch.args, **launch.options)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, dict(launch.options), bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=options.__dict__)


def measure(compiled: Any, label: str, itemsize: int | None = None) -> resources.Resources:
    """The resources of a compiled kernel, under the name ``label``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        [found] = resources.read(Path(file.name), {"": itemsize} if itemsize else None)
    return replace(found, kernel=label)

"""Instruction counts on the CPU by valgrind: a figure that the machine's load cannot change.

A child process runs a few works on one thread under callgrind and collects only while the work runs.
Valgrind offers no AVX-512, so both sides are counted on their AVX2 code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .registry import Work, shape_name

CALLS = 4
PROVIDERS = ("torch", "modeprobe")


def counted_works() -> list[Work]:
    from .works_batch_norm import norm
    from .works_dropout import dropout

    return [
        Work("dropout", "forward", (1 << 16,), "float32", 2, dropout),
        Work("dropout", "forward", (1 << 16,), "bfloat16", 2, dropout),
        Work("dropout", "forward_backward", (1 << 16,), "float32", 4, dropout),
        norm("forward", (8, 32, 16, 16)),
        norm("forward", (8, 32, 16, 16), layout="channels_last"),
        norm("forward_backward", (8, 32, 16, 16)),
        norm("forward_backward", (8, 32, 16, 16), layout="channels_last"),
        norm("evaluation", (8, 32, 16, 16)),
    ]


def why_not() -> str | None:
    """Why instructions cannot be counted here; None if they can."""
    import torch

    if shutil.which("valgrind") is None:
        return "valgrind is not installed; on Debian: apt-get install valgrind"
    if not torch._C._valgrind_supported_platform():
        return "this torch was built without valgrind's client requests"
    return None


def count(timeout: float) -> list[dict[str, Any]]:
    """Instructions per call and per element for each counted work and provider.

    What is not counted after ``timeout`` seconds is left out.

    Raises:
        RuntimeError: valgrind is absent or failed, or not a single count was ready in time.
    """
    reason = why_not()
    if reason:
        raise RuntimeError(reason)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        command = [
            "valgrind",
            "--tool=callgrind",
            f"--callgrind-out-file={out}",
            "--collect-atstart=no",
            sys.executable,
            "-m",
            __name__,
            str(Path(folder, "rows.jsonl")),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        late = False
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        except subprocess.TimeoutExpired:
            late = True
        else:
            if done.returncode:
                raise RuntimeError(f"valgrind ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        rows = completed(Path(folder, "rows.jsonl"))
        if late and not rows:
            raise RuntimeError(f"valgrind counted nothing in {timeout:.0f} s")
        return [finished(row, total(Path(f"{out}.{index}"))) for index, row in enumerate(rows, 1)]


def completed(path: Path) -> list[dict[str, Any]]:
    """The rows that the child has written, one a line, each after its dump."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def finished(row: dict[str, Any], instructions: int) -> dict[str, Any]:
    per_call = instructions / CALLS
    return {**row, "instructions": round(per_call), "per_element": round(per_call / row["elements"], 3)}


def total(path: Path) -> int:
    """Instructions of one dump of callgrind.

    Raises:
        ValueError: the file holds no total.
    """
    found = re.search(r"^totals: (\d+)", path.read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{path.name} holds no total")
    return int(found[1])


def child(arguments: Sequence[str]) -> None:
    """Runs under callgrind: one dump for each work and provider, described in a file of JSON lines."""
    import torch

    torch.set_num_threads(1)
    with Path(arguments[0]).open("w") as file:
        for work in counted_works():
            problem = work.setup(work, "cpu")
            for provider in PROVIDERS:
                candidate = problem.candidates[provider]()
                with candidate.context():
                    candidate.run()
                    candidate.run()
                    torch._C._valgrind_toggle()
                    for _ in range(CALLS):
                        candidate.run()
                    torch._C._valgrind_toggle_and_dump_stats()
                row = {
                    "name": f"{work.name} {provider}",
                    "work": work.name,
                    "provider": provider,
                    "shape": shape_name(work.shape),
                    "elements": work.elements,
                    "simd": torch.backends.cpu.get_cpu_capability().lower(),
                }
                file.write(json.dumps(row) + "\n")
                file.flush()


if __name__ == "__main__":
    child(sys.argv[1:])

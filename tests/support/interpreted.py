"""Runs a test file of the folder ``triton/interpreted`` in a process where Triton interprets its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "triton" / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


def run_interpreted(file: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'modeprobe[triton]'")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        cwd=FOLDER.parents[2],
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, "nothing ran"

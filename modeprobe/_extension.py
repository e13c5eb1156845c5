"""Loads the compiled library, and knows why when it is not there."""

from __future__ import annotations

import importlib
import os

import torch

_error: str | None = None

try:
    importlib.import_module("modeprobe._C")
except ImportError as error:
    _error = str(error)
else:
    if os.environ.get("MODEPROBE_CPU_CAPABILITY", "avx512") not in ("avx512", "avx2", "portable"):
        raise ValueError(
            "MODEPROBE_CPU_CAPABILITY must be avx512, avx2 or portable, "
            f"got {os.environ['MODEPROBE_CPU_CAPABILITY']!r}"
        )

REBUILD = (
    'pip install "setuptools>=77" ninja && pip install --no-build-isolation --force-reinstall --no-deps .'
)


def loaded() -> bool:
    """Whether the compiled library is in this process."""
    return _error is None


def built_for(device_type: str) -> bool:
    """Whether the compiled library carries kernels for ``"cpu"`` or ``"cuda"``."""
    if not loaded() or device_type not in ("cpu", "cuda"):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key("modeprobe::dropout", device_type.upper())


def why_not(device_type: str) -> str | None:
    """Why the native backend cannot be used on ``device_type``, and what to do; None if it can."""
    if not loaded():
        return f"the compiled library could not be loaded ({_error}); build it with: {REBUILD}"
    if built_for(device_type):
        return None
    if device_type == "cuda":
        return (
            "modeprobe was built without CUDA kernels; with a CUDA toolkit installed, run: "
            f"MODEPROBE_CUDA=1 {REBUILD}"
        )
    return f"modeprobe has no compiled kernels for device type {device_type!r}"

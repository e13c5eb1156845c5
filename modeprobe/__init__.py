"""Kernels, modules and a probe for the two layers that differ between training and evaluation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from modeprobe._version import __version__
from modeprobe.ops.backend import backend

if TYPE_CHECKING:
    pass

# Loaded where first used: `import modeprobe` stays as cheap as `import torch`.
_LAZY: dict[str, str] = {}

__all__ = ["__version__", "backend", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'modeprobe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

"""Kernels, modules and a probe for the two layers that differ between training and evaluation."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from modeprobe._version import __version__
from modeprobe.ops.backend import backend

if TYPE_CHECKING:
    from modeprobe import functional as functional
    from modeprobe import mask as mask
    from modeprobe import nn as nn
    from modeprobe.info import info as info
    from modeprobe.nn import commit_statistics as commit_statistics
    from modeprobe.nn import discard_statistics as discard_statistics
    from modeprobe.nn import set_statistics as set_statistics
    from modeprobe.probe.api import probe as probe
    from modeprobe.probe.contexts import evaluating as evaluating
    from modeprobe.probe.contexts import mc_dropout as mc_dropout
    from modeprobe.probe.contexts import no_dropout as no_dropout
    from modeprobe.statistics import batch_statistics as batch_statistics
    from modeprobe.statistics import frozen_statistics as frozen_statistics
    from modeprobe.statistics.drift import drift as drift
    from modeprobe.statistics.recalibrate import recalibrate as recalibrate
    from modeprobe.swap import restore as restore
    from modeprobe.swap import swap as swap

# Loaded where first used: `import modeprobe` stays as cheap as `import torch`.
_LAZY: dict[str, str] = {
    "batch_statistics": "modeprobe.statistics",
    "commit_statistics": "modeprobe.nn",
    "discard_statistics": "modeprobe.nn",
    "drift": "modeprobe.statistics",
    "frozen_statistics": "modeprobe.statistics",
    "info": "modeprobe.info",
    "evaluating": "modeprobe.probe.contexts",
    "mc_dropout": "modeprobe.probe.contexts",
    "no_dropout": "modeprobe.probe.contexts",
    "probe": "modeprobe.probe",
    "recalibrate": "modeprobe.statistics",
    "restore": "modeprobe.swap",
    "set_statistics": "modeprobe.nn",
    "swap": "modeprobe.swap",
}

_LAZY_MODULES = ("functional", "mask", "nn")

__all__ = ["__version__", "backend", *_LAZY, *_LAZY_MODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    if name in _LAZY_MODULES:
        return importlib.import_module(f"modeprobe.{name}")
    raise AttributeError(f"module 'modeprobe' has no attribute {name!r}")


class _Package(types.ModuleType):
    """`modeprobe.swap` is a function and a file: importing the file must not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})

"""Tiny, randomly initialised models of the installed transformers, built from their configuration alone.

The only part of the probe that knows transformers. Nothing is downloaded.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from modeprobe.probe.architectures.search import find
from modeprobe.probe.quiet import quiet


class ArchitectureError(Exception):
    """No tiny model of this type could be built and run; the message says what was tried."""


def model_types() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def build(model_type: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of this type in train mode, and keyword arguments that it accepts.

    Raises:
        ArchitectureError: the type is unknown, too large at every size, or needs inputs of another kind.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if model_type not in model_types():
        import difflib

        close = difflib.get_close_matches(model_type, model_types(), 3)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ArchitectureError(f"unknown model type {model_type!r} in the installed transformers{hint}")
    with quiet():
        found = find(model_type, seed)
    if isinstance(found, str):
        raise ArchitectureError(found)
    model, inputs = found
    return model.train(), inputs

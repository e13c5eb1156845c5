"""Tiny, randomly initialised models of the installed transformers, built from their configuration alone.

The only part of the probe that knows transformers. Nothing is downloaded.
"""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from modeprobe.probe.architectures.search import find
from modeprobe.probe.progress import Progress
from modeprobe.probe.quiet import quiet


class ArchitectureError(Exception):
    """No tiny model of this type could be built and run; the message says what was tried."""


def model_types() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def build(model_type: str, seed: int = 0, progress: bool | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of this type in train mode, and keyword arguments that it accepts.

    Args:
        model_type: a name that :func:`model_types` lists.
        seed: of torch's generator before the weights are drawn.
        progress: shown on standard error: True at once, False never, None after two seconds.

    Raises:
        ArchitectureError: the type is unknown, too large at every size, or needs inputs of another kind.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if model_type not in model_types():
        import difflib

        close = difflib.get_close_matches(model_type, model_types(), 3)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ArchitectureError(f"unknown model type {model_type!r} in the installed transformers{hint}")
    with quiet(), Progress(progress) as show:
        found = find(model_type, seed, show)
    if isinstance(found, str):
        raise ArchitectureError(found)
    model, inputs = found
    return model.train(), inputs

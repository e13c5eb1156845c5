"""Tiny, randomly initialised models of the installed transformers, built from their configuration alone.

The only part of the probe that knows transformers. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from modeprobe.probe.architectures.configurations import ConfigurationError, source
from modeprobe.probe.architectures.search import find
from modeprobe.probe.progress import Progress
from modeprobe.probe.quiet import quiet


class ArchitectureError(Exception):
    """No tiny model of this type could be built and run; the message says what was tried."""


def model_types() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def build(
    model_type: str,
    seed: int = 0,
    progress: bool | None = None,
    values: Mapping[str, Any] | None = None,
    make_inputs: Callable[[nn.Module], dict[str, Any]] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model of this type in train mode, and keyword arguments that it accepts.

    Args:
        model_type: a name that :func:`model_types` lists, or the path of a checkpoint's ``config.json`` or of
            its folder: the configuration is then that one, its sizes made small.
        seed: of torch's generator before the weights are drawn.
        progress: shown on standard error: True at once, False never, None after two seconds.
        values: of the configuration's fields, kept as they are; a part's by ``part.field``.
        make_inputs: called with each model that is tried, returns the keyword arguments for its forward; None
            guesses them.

    Raises:
        ArchitectureError: the type or a field is unknown, the type is too large at every size, or it needs
            inputs of another kind.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with quiet(), Progress(progress) as show:
        try:
            wanted = source(model_type, seed, values or {})
            found = find(replace(wanted, make_inputs=make_inputs), show)
        except ConfigurationError as error:
            raise ArchitectureError(str(error)) from error
    if isinstance(found, str):
        raise ArchitectureError(found)
    model, inputs = found
    return model.train(), inputs

"""Parts of a whole: the module that a part's configuration stands for, and what the whole passes to it.

What only the whole can give (hidden states, grids, masks of a form of its own) is recorded while it runs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def wholes(kind: type) -> Iterator[str]:
    """The model types whose configuration holds one of this class, the nearest first."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    beside = [value for value in vars(sys.modules[kind.__module__]).values() if isinstance(value, type)]
    inner, seen = [kind], {kind}
    for part in inner:
        for holder in beside:
            if holder not in seen and part in (getattr(holder, "sub_configs", None) or {}).values():
                inner.append(holder)
                seen.add(holder)
                name = getattr(holder, "model_type", "")
                if name in CONFIG_MAPPING:
                    yield name


def recorded(
    whole: nn.Module, inputs: dict[str, Any], kind: type
) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """The modules in a running whole that are built from a configuration of this class, the largest first.

    With the arguments they got, by name.
    """
    calls: list[tuple[nn.Module, dict[str, Any]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        calls.append((module, _named(bound)))

    hooks = [
        module.register_forward_pre_hook(record, with_kwargs=True)
        for module in whole.modules()
        if module is not whole and _stands_for(module, kind)
    ]
    try:
        with torch.no_grad():
            whole.eval()(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    yield from sorted(calls, key=lambda call: -sum(p.numel() for p in call[0].parameters()))


def _stands_for(module: nn.Module, kind: type) -> bool:
    """Whether it holds a configuration of this class, or is declared to be built from one."""
    declared = inspect.signature(type(module).__init__).parameters.get("config")
    built_from = declared is not None and declared.annotation in (kind, kind.__name__)
    return built_from or type(getattr(module, "config", None)) is kind


def _named(bound: inspect.BoundArguments) -> dict[str, Any]:
    """By keyword, tensors as they were, without what the forward before it left (a cache)."""
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[name] = value
    return {name: _copied(value) for name, value in found.items() if value is not None and "past" not in name}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {name: _copied(item) for name, item in value.items()}
    return value

"""Parts of a whole: the module that a part's configuration stands for, and what the whole passes to it.

What only the whole can give (hidden states, grids, masks of a form of its own) is recorded while it runs.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def wholes(kind: type) -> Iterator[str]:
    """The model types whose configuration holds one of this class, the nearest first."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    beside = [value for value in vars(sys.modules[kind.__module__]).values() if isinstance(value, type)]
    inner, seen = [kind], {kind}
    for part in inner:
        for holder in beside:
            if holder not in seen and part in _slots(holder).values():
                inner.append(holder)
                seen.add(holder)
                name = getattr(holder, "model_type", "")
                if name in CONFIG_MAPPING:
                    yield name


def _slots(holder: type) -> dict[str, Any]:
    """The class of each configuration held, by its name; where it may be any, the class held by default."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    found = dict(getattr(holder, "sub_configs", None) or {})
    for name, spec in (getattr(holder, "sub_configs_defaults", None) or {}).items():
        usual = getattr(spec, "model_type", None) or ""
        if usual in CONFIG_MAPPING_NAMES:
            found[name] = CONFIG_MAPPING[usual]
    return found


def recorded(
    whole: nn.Module, inputs: dict[str, Any], kind: type
) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """The modules in a running whole that are built from a configuration of this class, the largest first.

    With the arguments they got, by name.
    """
    calls: list[tuple[nn.Module, dict[str, Any]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = _named(inspect.signature(module.forward).bind(*args, **kwargs))
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(arguments)):
            calls.append((module, arguments))

    slots = _slots(type(getattr(whole, "config", None)))
    names = {name.removesuffix("_config") for name, held in slots.items() if held is kind}
    # Some parts are built from the configuration of the whole, and are called as the slot of their own.
    hooks = [
        module.register_forward_pre_hook(record, with_kwargs=True)
        for name, module in whole.named_modules()
        if module is not whole and (_stands_for(module, kind) or _named_for(name.rpartition(".")[2], names))
    ]
    try:
        with torch.no_grad(), contextlib.suppress(Exception):  # the part may have been called before
            whole.eval()(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    calls.sort(key=lambda call: -sum(p.numel() for p in call[0].parameters()))
    yield from sorted(calls, key=lambda call: not _stands_for(call[0], kind))


def _named_for(attribute: str, slots: set[str]) -> bool:
    return any(attribute == slot or attribute.endswith(f"_{slot}") for slot in slots)


def _stands_for(module: nn.Module, kind: type) -> bool:
    """Whether it holds a configuration of this class, or is declared to be built from one."""
    declared = inspect.signature(type(module).__init__).parameters.get("config")
    built_from = declared is not None and declared.annotation in (kind, kind.__name__)
    return built_from or type(getattr(module, "config", None)) is kind


def _named(bound: inspect.BoundArguments) -> dict[str, Any]:
    """By keyword, tensors as they were, without what the forward before it left (a cache)."""
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = bound.signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update({key: item for key, item in value.items() if item is not None})
        elif value is not None or parameter.default is inspect.Parameter.empty:
            found[name] = value
    return {name: _copied(value) for name, value in found.items() if "past" not in name}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    if type(value) is dict:
        return {name: _copied(item) for name, item in value.items()}
    return value

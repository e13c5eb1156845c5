"""Models of transformers at tiny sizes, from a model type's configuration alone."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from modeprobe.probe.architectures import sizes as _sizes
from modeprobe.probe.architectures.configurations import Source, underived
from modeprobe.probe.architectures.fitting import fitting

MAX_PARAMETERS = 100_000_000
_CLASSES = 3
_FIELDS = 4


class TooLargeError(Exception):
    pass


class NoClassError(Exception):
    pass


def models(config: Any, source: Source) -> Iterator[nn.Module | Exception]:
    """Models at growing sizes, of each class that takes the configuration, or why there is none."""
    too_large = False
    for small in _configurations(config, source):
        if isinstance(small, Exception):
            yield small
            continue
        if small is config and too_large:
            continue  # its shallow form was
        try:
            makers = list(_constructors(small))
        except Exception as error:
            yield error
            return
        for make in makers:
            made = _made(make, small, source.seed)
            yield made
            too_large = isinstance(made, TooLargeError)
            if too_large:
                break


def again(kind: type[nn.Module], config: Any, values: dict[str, Any], source: Source) -> nn.Module | None:
    """A model of this class with these values in a configuration like the one given, if there can be one."""
    try:
        changed = source.made(type(config), values)
    except Exception:
        return None
    made = _made(kind, changed, source.seed)
    return runnable(made)[0] if isinstance(made, nn.Module) else None


def runnable(model: nn.Module) -> list[nn.Module]:
    """The model; where it has no forward, the model run by its encode, else the models in it."""
    if type(model).forward is not nn.Module.forward:
        return [model]
    if hasattr(model, "encode"):
        model.forward = model.encode  # type: ignore[assignment]
        return [model]
    return [part for part in model.children() if hasattr(part, "config")] or [model]


def _configurations(config: Any, source: Source) -> Iterator[Any]:
    """Small ones, the smallest first; the configuration itself; then what can be built in between."""
    original = config.to_dict()

    def builds(values: dict[str, Any]) -> bool:
        try:
            small = source.made(type(config), values)
            _parameters(next(_constructors(small)), small)
        except Exception:
            return False
        return True

    def made(values: dict[str, Any]) -> Any:
        try:
            return source.made(type(config), values)
        except Exception as error:
            with contextlib.suppress(Exception):  # it may name stages that are no more
                return source.made(type(config), _sizes.with_features(values, original))
            return error

    readings = list(_sizes.readings(original))
    yield from map(made, readings[:-1])
    yield made(next(_sizes.readings(underived(config))))
    yield made(readings[-1])
    yield config
    filled = _sizes.filled(readings[0])
    yield made(filled)
    every = _sizes.with_features(readings[0], original, every=True)
    if every != readings[0]:
        yield made(every)
    yield made(_sizes.with_rope_by_layer_type(filled))
    base = original if builds(original) else _sizes.filled(original)
    if base is original or builds(base):
        for small in (readings[-2], filled):
            yield from map(made, fitting(base, small, builds))


def _made(make: Callable[[Any], nn.Module], config: Any, seed: int) -> nn.Module | Exception:
    try:
        count = _parameters(make, config)
        if count > MAX_PARAMETERS:
            return TooLargeError(f"{count:,} parameters at this size")
        torch.manual_seed(seed)
        return make(config)
    except Exception as error:
        return error


def _parameters(make: Callable[[Any], nn.Module], config: Any, fields: int = _FIELDS) -> int:
    """How many parameters the model will have; fields that it reads and its configuration lacks are added."""
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in make(config).parameters())
    except AttributeError as error:
        name = error.name or ""
        value = _sizes.usual(name)
        if value is None:
            value = next((vars(part)[name] for part in _tree(config) if name in vars(part)), None)
        lacking = [part for part in _tree(config) if type(part) is type(error.obj)]
        if value is None or not lacking or not fields:
            raise
        for part in lacking:
            setattr(part, name, value)
    return _parameters(make, config, fields - 1)


def _tree(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _tree(value)


def _mapped(mapping: Any, config: Any) -> Any:
    """The class or classes for this configuration, or None; also where the class named does not exist."""
    try:
        return mapping.get(type(config), None)
    except ValueError:
        return None


def _constructors(config: Any) -> Iterator[Callable[[Any], nn.Module]]:
    import transformers
    from transformers.models.auto import modeling_auto

    names = ["AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"]
    if getattr(config, "is_encoder_decoder", False):  # its causal model would be the decoder alone
        names.append(names.pop(0))
    found: list[Any] = []
    kind: Any
    for name in getattr(config, "architectures", None) or ():  # of a checkpoint
        kind = getattr(transformers, name, None)
        if getattr(kind, "config_class", None) is type(config):
            found.append(kind)
            yield kind
    for name in names:
        auto = getattr(transformers, name)
        kind = _mapped(auto._model_mapping, config)
        if kind:
            found.append(kind)
            yield auto.from_config
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_FOR") and name.endswith("_MAPPING"):
            kind = _mapped(mapping, config)
            kind = kind[0] if isinstance(kind, tuple) else kind
            if kind and kind not in found:
                found.append(kind)
                yield kind
                if len(found) > _CLASSES:
                    return
    if found:
        return
    # Parts of larger models have no automatic class: look beside their configuration.
    source = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    beside = [
        kind
        for kind in vars(source).values()
        if isinstance(kind, type)
        and issubclass(kind, transformers.PreTrainedModel)
        and getattr(kind, "config_class", None) is type(config)
        and not kind.__name__.endswith("PreTrainedModel")
    ]
    if not beside:
        raise NoClassError(f"no model class for {type(config).__name__}")
    yield beside[0]

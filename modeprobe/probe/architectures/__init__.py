"""Tiny, randomly initialised models of the installed transformers, built from their configuration alone.

The only part of the probe that knows transformers. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from modeprobe.probe.architectures import sizes as _sizes
from modeprobe.probe.architectures.inputs import InputMaker
from modeprobe.probe.quiet import quiet

MAX_PARAMETERS = 100_000_000
_REPAIRS = 4
_CLASSES = 3

# Parts for models that are composed of any two others, by a word in the composition's name or the part's.
_PARTS = {"vision": "vit", "image": "vit", "speech": "wav2vec2", "audio": "wav2vec2"}


class ArchitectureError(Exception):
    """No tiny model of this type could be built and run; the message says what was tried."""


class _TooLargeError(ArchitectureError):
    pass


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
    tried: list[str] = []
    ran = False
    with quiet():
        try:
            config = _configuration(model_type)
        except Exception as error:
            raise ArchitectureError(
                f"transformers has no default configuration of {model_type}: {_short(error)}"
            ) from None
        for model in _models(config, seed):
            if isinstance(model, ImportError) and not str(model.name).startswith("transformers."):
                raise ArchitectureError(f"{model_type} needs a package: {_short(model)}") from None
            if isinstance(model, Exception):
                tried.append(_short(model))
                continue
            if not ran:
                ran, tried = True, []
            accepted, failures = _accepted(model)
            if accepted is not None:
                return model.train(), accepted
            tried += failures or [f"{type(model).__name__}.forward() does not say what it takes"]
    what = (
        "was built, but none of the inputs tried fit it"
        if ran
        else "could not be built from its configuration"
    )
    reasons = "\n  ".join(list(dict.fromkeys(tried))[:4])
    raise ArchitectureError(
        f"a tiny {model_type} {what}:\n  {reasons}\n"
        "Probe it by package.module:factory and --input instead, with a configuration and inputs of your own."
    )


def _accepted(model: nn.Module) -> tuple[dict[str, Any] | None, list[str]]:
    """The first inputs that the model runs on, and why it did not run on those before."""
    maker = InputMaker(model)
    failures: list[str] = []

    def attempt(inputs: dict[str, Any], repairs: int) -> dict[str, Any] | None:
        failure = _failure(model, inputs)
        if failure is None:
            return inputs
        failures.append(failure)
        tried = maker.repaired(inputs, failure) if repairs else ()
        return next((found for other in tried if (found := attempt(other, repairs - 1))), None)

    return next(
        (found for inputs in maker.candidates() if (found := attempt(inputs, _REPAIRS))), None
    ), failures


def _failure(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    try:
        with torch.no_grad():
            model.eval()(**inputs)
    except Exception as error:
        return _short(error)
    return None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _models(config: Any, seed: int) -> Iterator[nn.Module | Exception]:
    """Models at growing sizes, of each class that takes the configuration, or why there is none."""
    original = config.to_dict()
    too_large = False
    for values in _sizes.candidates(original):
        if values is original and too_large:
            return  # its shallow form was
        too_large = False
        try:
            small = type(config).from_dict(values)
            makers = list(_constructors(small))
        except Exception as error:
            yield error
            continue
        for make in makers:
            made = _made(make, small, seed)
            yield made
            if isinstance(made, _TooLargeError):
                too_large = True
                break
        if not makers:
            yield ArchitectureError(f"no model class for {type(config).__name__}")


def _made(make: Any, config: Any, seed: int) -> nn.Module | Exception:
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in make(config).parameters())
        if count > MAX_PARAMETERS:
            return _TooLargeError(f"{count:,} parameters at this size")
        torch.manual_seed(seed)
        return make(config)
    except Exception as error:
        return error


def _configuration(model_type: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return AutoConfig.for_model(model_type)
    except ValueError:
        slots = getattr(CONFIG_MAPPING[model_type], "sub_configs", {})
        if not slots:
            raise
    parts = {}
    for index, slot in enumerate(slots):
        words = f"{model_type} {slot}" if index == 0 else slot
        kind = next((kind for word, kind in _PARTS.items() if word in words), "bert")
        decodes = {"is_decoder": True, "add_cross_attention": True} if slot == "decoder" else {}
        parts[slot] = AutoConfig.for_model(kind, **decodes).to_dict()
    return AutoConfig.for_model(model_type, **parts)


def _constructors(config: Any) -> Iterator[Any]:
    import transformers
    from transformers.models.auto import modeling_auto

    names = ["AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"]
    if getattr(config, "is_encoder_decoder", False):  # its causal model would be the decoder alone
        names.append(names.pop(0))
    found = []
    for name in names:
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            found.append(auto._model_mapping[type(config)])
            yield auto.from_config
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_FOR") and name.endswith("_MAPPING") and type(config) in mapping:
            kind = mapping[type(config)]
            kind = kind[0] if isinstance(kind, tuple) else kind
            if kind not in found:
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
    yield from beside[:1]

"""Where a configuration comes from: the default of a type, or a file, with values of the user's own."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from modeprobe.probe.architectures.sizes import LAYERS

Values = dict[str, Any]

# Parts for models that are composed of any two others, by a word in the composition's name or the part's.
_PARTS = {"vision": "vit", "image": "vit", "speech": "wav2vec2", "audio": "wav2vec2"}


class ConfigurationError(Exception):
    """A configuration that cannot be read, or a field that it does not have."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What models are made of: a type's default configuration, or another one, and values that stay.

    make_inputs: the keyword arguments for a model, where they are not to be guessed.
    """

    model_type: str
    seed: int = 0
    config: Any = None
    kept: Values = dataclasses.field(default_factory=dict)
    make_inputs: Callable[[Any], Values] | None = None

    def made(self, kind: Any, values: Values) -> Any:
        """A configuration of this class with these values, but for those that stay."""
        return kind.from_dict(_merged(values, self.kept))

    def start(self, complete: bool = False) -> Any:
        """The configuration to begin with. complete: with the parts that are left out of it by default."""
        from transformers import AutoConfig

        if self.config is not None:
            return self.config
        try:
            config = default(self.model_type, complete)
        except Exception:
            if not self.kept:
                raise
            return AutoConfig.for_model(self.model_type, **self.kept)  # what the default lacks
        return self.made(type(config), underived(config)) if self.kept else config


def source(model_type: str, seed: int, given: Mapping[str, Any]) -> Source:
    """Of a type of transformers, or of the configuration at a path.

    given: values that stay, a part's by ``part.field``.

    Raises:
        ConfigurationError: there is no such type or file, it holds no configuration, or a field is unknown.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if model_type in CONFIG_MAPPING_NAMES:
        start = None
        if given:
            with contextlib.suppress(Exception):  # there may be no configuration without them
                start = default(model_type)
        return Source(model_type, seed, kept=_named(start, given))
    path = Path(model_type)
    if not path.exists():
        close = difflib.get_close_matches(model_type, CONFIG_MAPPING_NAMES, 3)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ConfigurationError(
            f"{model_type!r} is neither a model type of the installed transformers nor a file or folder{hint}"
        )
    config = _read(path, {})
    kept = _named(config, given)
    return Source(config.model_type, seed, _read(path, kept) if kept else config, kept)


def default(model_type: str, complete: bool = False) -> Any:
    """The default configuration of a type."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if complete:
        config = default(model_type)
        slots = getattr(config, "sub_configs", {})
        left_out = [
            name for name in slots if getattr(config, name, slots) is None and slots[name] is not AutoConfig
        ]
        return (
            AutoConfig.for_model(model_type, **{name: slots[name]() for name in left_out})
            if left_out
            else config
        )
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


def _read(path: Path, kept: Values) -> Any:
    """The configuration of a checkpoint, in its file or the folder with it; its weights are not read."""
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    try:
        values = _merged(_without_types(json.loads(file.read_text(encoding="utf-8"))), kept)
        return AutoConfig.for_model(values.pop("model_type", None), **values)
    except Exception as error:
        raise ConfigurationError(f"{file} is no configuration of transformers: {error}") from error


def _without_types(values: Values) -> Values:
    """Without what says how the weights are stored: here they are random, and float32."""
    return {
        name: _without_types(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in ("dtype", "torch_dtype", "quantization_config")
    }


def _named(config: Any, given: Mapping[str, Any]) -> Values:
    """Values by the fields of the configuration and its parts, from names with dots ("text_config.dropout").

    config: None where there is none without them; the names are then taken as they are.
    """
    found: Values = {}
    for name, value in given.items():
        *parts, field = name.split(".")
        part, place = config, found
        for slot in parts:
            part = getattr(part, slot, None)
            place = place.setdefault(slot, {})
        fields = part.to_dict() if hasattr(part, "to_dict") else part if isinstance(part, dict) else {}
        field = getattr(part, "attribute_map", {}).get(field, field)
        if config is not None and field not in fields:
            raise ConfigurationError(_unknown(config, name))
        place[field] = value
    return found


def underived(config: Any) -> Values:
    """The configuration's values without those that it derives: no fields, or None unless given."""
    values = config.to_dict()
    depths = {value for name, value in values.items() if name in LAYERS}
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    if fields:
        named = {"model_type", *(field.name for field in fields)}
        values = {name: value for name, value in values.items() if name in named}
    for field in fields:
        held = vars(config).get(field.name)
        if hasattr(held, "to_dict"):
            values[field.name] = underived(held)
        elif field.default is None and not (isinstance(held, list) and len(held) in depths):
            values.pop(field.name, None)
    return values


def _unknown(config: Any, name: str) -> str:
    every = list(_names(config.to_dict()))
    last = name.rpartition(".")[2]
    close = [other for other in every if other.rpartition(".")[2] == last]
    close = close or difflib.get_close_matches(name, every, 3)
    hint = f"; it has {', '.join(close)}" if close else ""
    return f"{type(config).__name__} has no field {name!r}{hint}"


def _names(values: Values, before: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from _names(value, f"{before}{name}.")


def _merged(values: Values, kept: Values) -> Values:
    """The values with those kept; within a part, unless all of that is given, by a type of its own."""
    found = dict(values)
    for name, value in kept.items():
        inner: Any = found.get(name)
        whole = not (isinstance(inner, dict) and isinstance(value, dict)) or "model_type" in value
        found[name] = value if whole else _merged(inner, value)
    return found

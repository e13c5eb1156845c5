"""Tiny, randomly initialised models of the installed transformers, built from their configuration alone.

The only part of the probe that knows transformers. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

MAX_PARAMETERS = 250_000_000

# Sizes by the names that configurations use; widths are multiples of the head counts.
_HIDDEN = """hidden_size attention_hidden_size d_model n_embd dim encoder_hidden_size word_embed_proj_dim
projection_dim embedding_size d_inner decoder_hidden_size""".split()  # noqa: SIM905
_INNER = """intermediate_size ffn_dim d_ff hidden_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size n_inner
encoder_intermediate_size decoder_intermediate_size moe_intermediate_size
shared_expert_intermediate_size""".split()  # noqa: SIM905
_HEADS = """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
decoder_num_attention_heads""".split()  # noqa: SIM905
_LAYERS = """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
num_encoder_layers decoder_num_hidden_layers""".split()  # noqa: SIM905
_WIDTHS = {
    **dict.fromkeys(_HIDDEN, 32),
    **dict.fromkeys(_INNER, 64),
    **dict.fromkeys(_HEADS, 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "embed_dim": 16,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "rotary_dim": 8,
}
_DEPTHS = {
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts"), 2),
    "vocab_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "prediction_length": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_source_positions": 50,
    "max_target_positions": 32,
}
_HEAD_SIZES = frozenset({"head_dim", "d_kv", "num_key_value_heads", "qk_rope_head_dim", "rotary_dim"})
# What follows from other fields, and would contradict them once those are small.
_DERIVED = frozenset(
    """out_features out_indices stage_names _out_features _out_indices attention_layers
    per_layer_config""".split()  # noqa: SIM905
)
# Parts for models that are composed of any two others, by a word in the composition's name or the part's.
_PARTS = {"vision": "vit", "image": "vit", "speech": "wav2vec2", "audio": "wav2vec2"}


class ArchitectureError(Exception):
    """No tiny model of this type could be built and run; the message says what was tried."""


def model_types() -> list[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted(CONFIG_MAPPING_NAMES)


def build(model_type: str, seed: int = 0) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny model of this type in train mode, and inputs that it accepts.

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
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        narrow = {**_DEPTHS, **_WIDTHS}
        free = {name: size for name, size in narrow.items() if name not in _HEAD_SIZES}
        for sizes in (narrow, free, _DEPTHS, {}):
            try:
                model = _model(model_type, sizes, seed)
            except ImportError as error:
                raise ArchitectureError(f"{model_type} needs a package: {_short(error)}") from None
            except Exception as error:
                tried.append(_short(error))
                continue
            if not ran:
                ran, tried = True, []
            for inputs in _inputs(model):
                failure = _failure(model, inputs)
                if failure is None:
                    return model.train(), inputs
                tried.append(failure)
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


def _failure(model: nn.Module, inputs: dict[str, torch.Tensor]) -> str | None:
    try:
        with torch.no_grad():
            model.eval()(**inputs)
    except Exception as error:
        return _short(error)
    return None


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


def _model(model_type: str, sizes: dict[str, int], seed: int) -> nn.Module:
    config = _configuration(model_type)
    config = type(config).from_dict(_shrunk(config.to_dict(), sizes))
    failure: Exception | None = None
    for make in _constructors(config):
        made = _made(make, config, seed)
        if isinstance(made, nn.Module):
            return made
        failure = failure or made
    raise failure or ArchitectureError(f"no model class for {type(config).__name__}")


def _made(make: Any, config: Any, seed: int) -> nn.Module | Exception:
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in make(config).parameters())
        if count > MAX_PARAMETERS:
            return ArchitectureError(f"{count:,} parameters at this size")
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

    for name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"):
        auto = getattr(transformers, name)
        if type(config) in auto._model_mapping:
            yield auto.from_config
    for name, mapping in vars(modeling_auto).items():
        if name.startswith("MODEL_FOR") and name.endswith("_MAPPING") and type(config) in mapping:
            found = mapping[type(config)]
            yield found[0] if isinstance(found, tuple) else found
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


def _shrunk(values: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    shrunk = {name: value for name, value in values.items() if not (sizes and name in _DERIVED)}
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            shrunk[name] = _shrunk(value, sizes)
        elif isinstance(value, int) and not isinstance(value, bool) and name in sizes:
            shrunk[name] = min(value, sizes[name]) if value > 0 else value
        elif value is None and name in ("num_key_value_heads", "prediction_length") and name in sizes:
            shrunk[name] = sizes[name]
        elif isinstance(value, list) and name in ("depths", "num_blocks", "depth") and sizes:
            shrunk[name] = [1] * len(value)
        elif isinstance(value, list) and name == "attention_types" and sizes:
            shrunk[name] = [[kinds, max(1, 2 // len(kinds))] for kinds, _ in value[:1]]
        elif isinstance(value, list) and name.endswith("layer_types") and sizes:
            other = next((item for item in value if item != value[0]), value[0])
            shrunk[name] = [value[0], other]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if sizes and isinstance(shrunk.get(name), list):
            shrunk[name] = sizes[name]
    return shrunk


def _inputs(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    parameters = inspect.signature(model.forward).parameters
    config: Any = model.config
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int, limit: int) -> torch.Tensor:
        return torch.randint(min(3, limit - 1), max(limit - 2, 4), (2, length), generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def size(name: str, default: int) -> int:
        for holder in (config, getattr(config, "vision_config", None), getattr(config, "text_config", None)):
            value = getattr(holder, name, None)
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                return value[0]
            if isinstance(value, int) and value > 0:
                return value
        return default

    text: dict[str, torch.Tensor] = {}
    vocabulary = min(size("vocab_size", 64), 64)
    if "input_ids" in parameters:
        text["input_ids"] = tokens(12, vocabulary)
        if "bbox" in parameters:
            text["bbox"] = torch.zeros(2, 12, 4, dtype=torch.long)
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False):
        text["decoder_input_ids"] = tokens(8, vocabulary)
    decoder = {k: v for k, v in text.items() if k.startswith("decoder")}
    channels = size("num_channels", 3)
    sides: tuple[int, ...] = (32, 32)
    for holder in (config, getattr(config, "vision_config", None)):
        side = getattr(holder, "image_size", None)
        if side:
            sides = (side, side) if isinstance(side, int) else tuple(side)[:2]
            break
    bins, audio = size("num_mel_bins", 80), size("max_length", 128)
    media: dict[str, list[tuple[int, ...]]] = {
        "pixel_values": [
            *((2, channels, *side) for side in (sides, (64, 64), (224, 224))),
            (2, size("num_frames", 2), channels, *sides),
        ],
        "pixel_values_videos": [(2, size("frames_per_clip", 4), channels, *sides)],
        "input_values": [(2, 4000), (2, 1, 4000), (2, audio, size("num_mel_bins", 128))],
        "input_features": [
            (2, bins, 100), (2, 100, bins), (2, bins, 3000), (2, 100, size("feature_size", 80)),
            (2, 1, 1001, 64),
        ],
    }  # fmt: skip
    media = {name: shapes for name, shapes in media.items() if name in parameters}
    if text and not media.keys() & {"pixel_values"}:
        yield text
    for name, shapes in media.items():
        for shape in shapes:
            yield {**(text if name == "pixel_values" else decoder), name: normal(*shape)}
    if text or len(media) > 1:
        for name, shapes in media.items():
            yield {**text, name: normal(*shapes[0])}
        yield {**text, **{name: normal(*shapes[0]) for name, shapes in media.items()}}
    if "past_values" in parameters:
        yield _series(parameters, config, normal)
    if text:
        yield text
        length = size("chunk_size", 16) * 4
        yield {name: tokens(length, vocabulary) for name in text}


def _series(parameters: Mapping[str, Any], config: Any, normal: Any) -> dict[str, torch.Tensor]:
    """Inputs of a time-series model: the past, and the future where it is asked for."""
    ahead = getattr(config, "prediction_length", None) or 4
    past = (getattr(config, "context_length", None) or ahead) + max(
        getattr(config, "lags_sequence", None) or [0]
    )
    channels = getattr(config, "num_input_channels", None) or getattr(config, "input_size", None) or 1
    width = (channels,) if channels > 1 or hasattr(config, "num_input_channels") else ()
    features = getattr(config, "num_time_features", 0)
    found = {
        "past_values": normal(2, past, *width),
        "past_time_features": normal(2, past, features),
        "past_observed_mask": torch.ones(2, past, *width),
        "future_values": normal(2, ahead, *width),
        "future_time_features": normal(2, ahead, features),
    }
    return {name: value for name, value in found.items() if name in parameters}

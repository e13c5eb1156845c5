"""Small sizes for the configurations of transformers, by the names of their fields."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import Any

DEPTH = 2
_NARROWEST = 24
_FEW = 4  # lists that are longer and as long as there are layers have an entry for each

# Widths are multiples of the head counts.
_HIDDEN = """hidden_size d_model n_embd dim encoder_hidden_size word_embed_proj_dim
projection_dim embedding_size emb_dim d_inner decoder_hidden_size out_hidden_size text_hidden_size""".split()  # noqa: SIM905
_INNER = """intermediate_size ffn_dim d_ff hidden_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size n_inner
encoder_intermediate_size decoder_intermediate_size moe_intermediate_size mlp_dim
shared_expert_intermediate_size""".split()  # noqa: SIM905
_HEADS = """num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
decoder_num_attention_heads attention_heads""".split()  # noqa: SIM905
LAYERS = """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
num_encoder_layers decoder_num_hidden_layers depth""".split()  # noqa: SIM905
_NARROW = {
    **dict.fromkeys(_HIDDEN, 32),
    **dict.fromkeys(_INNER, 64),
    **dict.fromkeys(_HEADS, 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_head_dim": 16,
    "d_kv": 8,
    "embed_dim": 16,
    "base_channels": 32,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "rotary_dim": 8,
}
_SHALLOW = {
    **dict.fromkeys(LAYERS, DEPTH),
    "experts": 4,
    **dict.fromkeys("num_experts_per_tok num_experts_per_token top_k_experts moe_k moe_topk".split(), 2),  # noqa: SIM905
    "num_blocks": 1,
    **dict.fromkeys(("vocab_size", "vocab", "n_words"), 64),
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 8,
    **dict.fromkeys("n_group topk_group num_expert_group n_groups mamba_n_groups".split(), 1),  # noqa: SIM905
    "mm_tokens_per_image": 4,
    "prediction_length": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "max_source_positions": 48,
    "max_target_positions": 32,
    "num_queries": 4,
    "num_kv_shared_layers": 0,
}
# Ids that stand for pictures and sounds in a text, among the last of the small vocabulary.
PLACEHOLDERS = {"image": 60, "video": 61, "audio": 62}
_PLACEHOLDER = re.compile(rf"^({'|'.join(PLACEHOLDERS)})_token_(id|index)$")
_HEAD_SIZES = frozenset({"head_dim", "d_kv", "num_key_value_heads", "qk_rope_head_dim", "rotary_dim"})
_PROPORTIONAL = frozenset({"attention_hidden_size"})  # to hidden_size
PICTURE_SIDES = ("image_size", "img_size", "max_img_size")
_PICTURE_GRIDS = ("image_size", "img_size", "visual_prompt_size", "image_embedding_size", "feature_sizes")
_PICTURE_SIZES = frozenset({"image_size", "patch_size"})
_SCALES = {"width_coefficient": 0.25, "depth_coefficient": 0.1}
# What follows from other fields, and would contradict them once those are small.
_DERIVED = frozenset(
    """out_features out_indices stage_names _out_features _out_indices attention_layers
    per_layer_config qk_head_dim""".split()  # noqa: SIM905
)
_FILLED = frozenset(
    """num_key_value_heads num_experts_per_tok moe_intermediate_size head_dim vocab_size
    prediction_length""".split()  # noqa: SIM905
)
# For what is None in a default configuration and needed.
_USUAL = {
    **_SHALLOW,
    **_NARROW,
    "layer_types": ["full_attention"] * DEPTH,
    "mlp_layer_types": ["dense", "sparse"],
    "initializer_range": 0.02,
    "vocabulary_map": {"<image>": 60, "IMGIMGAZ": 59},
    "clip_qkv": 8.0,
    "sliding_window": 8,
    "backbone": "resnet18",  # of timm
    "rope_theta": 10000.0,
    "deepstack_layer_map": [[-1, 0]],
    "downsample_rate": "1/2",
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
_BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Names that many parts add a word of their own to.
_COMMON = re.compile(r"vocab_size|vocab$|experts$")
_HEAD_COUNT = re.compile(r"(^|_)(heads|n_head)$")
_WIDTH = re.compile(
    r"(?<!image)(^|_)((hidden|intermediate|embedding|embed|inner)_(size|dim)s?(_per_stage)?|channel_list"
    r"|output_channels|num_pos_feats|d_model|n_embd|d_ff|ffn_dim|mlp_dim)$"
)
# What is as wide as something else where its value says so, by names that few models use.
_LIKE_WIDTH = re.compile(r"dim|hidden|channels|groups|filters|features|width|(?<!image)(?<!window)_size$")
_LAYER_INDICES = re.compile(r"(^|_)(indexes|indices|idxs|idx)$")


def readings(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration's values at small sizes, the smallest first.

    Which sizes belong together is not written in a configuration, so several readings are offered.
    """
    side = next(filter(None, (_largest(values, name) for name in PICTURE_SIDES)), 0)
    patch = _largest(values, "patch_size")
    fine = _with_pictures(values, side, _SHALLOW["image_size"])
    coarse = _with_pictures(
        values, side, 4 * (patch or 16)
    )  # for layers that follow from the size of a patch
    narrow = {**_SHALLOW, **_NARROW}
    yield _shrunk(fine, narrow)
    yield _shrunk(fine, {**narrow, "num_key_value_heads": narrow["num_attention_heads"]})
    one_wide_head = {**_without(narrow, _HEAD_SIZES), **dict.fromkeys(_HEADS, 1)}
    yield _shrunk(fine, _without(narrow, _HEAD_SIZES))
    yield _shrunk(fine, one_wide_head)
    smallest = _shrunk(fine, narrow)
    for other in (_alike(smallest, fine, _narrowed(smallest, fine)), with_features(smallest, values)):
        if other != smallest:
            yield other
    yield _shrunk(fine, _without(narrow, LAYERS), deep=True)
    yield _shrunk(coarse, _without(narrow, _PICTURE_SIZES))
    shallow = _shrunk(coarse, _without(_SHALLOW, _PICTURE_SIZES))
    factor = _common_factor(shallow, widths_alone=True)
    if factor > 1:
        yield from _quotients(shallow, factor, widths_alone=True)
    shallow = _shrunk(fine, _SHALLOW)
    factor = _common_factor(shallow, widths_alone=False)
    if factor > 1:
        yield from _quotients(shallow, factor, widths_alone=False)
    yield shallow


def _without(sizes: dict[str, int], names: Collection[str]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name not in names}


def filled(values: dict[str, Any]) -> dict[str, Any]:
    """With a usual value for what is None."""
    found = dict(values)
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            found[name] = filled(value)
        elif value is None:
            found[name] = usual(name)
    return found


def with_rope_by_layer_type(values: dict[str, Any]) -> dict[str, Any]:
    """With rotary parameters for each type of layer, where one set for all is given."""
    found = {
        name: with_rope_by_layer_type(value) if isinstance(value, dict) and "model_type" in value else value
        for name, value in values.items()
    }
    rope, kinds = values.get("rope_parameters"), values.get("layer_types")
    if isinstance(rope, dict) and kinds and not any(kind in rope for kind in kinds):
        one = {"rope_type": "default", "rope_theta": usual("rope_theta"), **rope}
        found["rope_parameters"] = {kind: dict(one) for kind in kinds}
    return found


def usual(name: str) -> Any:
    """The small value of a field of this name, or None."""
    common = _COMMON.search(name)
    return _USUAL.get(name, _USUAL.get(common[0]) if common else None)


def _shrunk(values: dict[str, Any], sizes: dict[str, int], deep: bool = False) -> dict[str, Any]:
    """deep: with as many layers as before."""
    shrunk = {name: value for name, value in values.items() if deep or name not in _DERIVED}
    layers = {value for name, value in values.items() if name in LAYERS and isinstance(value, int)}
    stages = len(values.get("depths") or ())
    for name, value in values.items():
        if isinstance(value, dict) and str(value.get("model_type")).startswith("timm_"):
            shrunk[name] = dict(_BACKBONE)  # timm need not be installed
        elif isinstance(value, dict) and "model_type" in value:
            shrunk[name] = _shrunk(value, sizes, deep)
        elif isinstance(value, dict) and "rope_type" in value and "hidden_size" in sizes:
            shrunk[name] = {**value, "mrope_section": _rotary_sections(value, sizes)}
        elif placeholder := _PLACEHOLDER.match(name):
            shrunk[name] = PLACEHOLDERS[placeholder[1]]
        elif isinstance(value, int) and not isinstance(value, bool):
            common = _COMMON.search(name)
            size = sizes.get(name, sizes.get(common[0]) if common else None)
            if name in LAYERS and value == stages:  # one depth for each of them
                size = value
            if name in _PROPORTIONAL and "hidden_size" in sizes and values.get("hidden_size"):
                size = sizes["hidden_size"] * value // values["hidden_size"]
            shrunk[name] = value if size is None or value < 0 else min(value, size)
        elif name in _SCALES and "hidden_size" in sizes:
            shrunk[name] = min(value, _SCALES[name])
        elif value is None and name in _FILLED and name in sizes:
            shrunk[name] = sizes[name]
        elif isinstance(value, list) and not (deep and name not in _TOKENS):
            shrunk[name] = _shrunk_list(name, value, sizes, layers)
    return shrunk


def _shrunk_list(name: str, value: list[Any], sizes: dict[str, int], layers: set[int]) -> Any:
    if len(value) > _FEW and len(value) in layers:
        other = next((item for item in value if item != value[0]), value[0])
        size = sizes.get(name.removesuffix("_per_layer"))
        return [min(item, size) if size and isinstance(item, int) else item for item in (value[0], other)]
    if name in _TOKENS:
        return sizes[name]
    if name in ("depths", "num_blocks", "depth"):
        return [1] * len(value)
    if name == "attention_types":
        return [[kinds, max(1, DEPTH // len(kinds))] for kinds, _ in value[:1]]
    if name.endswith("layer_types"):
        other = next((item for item in value if item != value[0]), value[0])
        return [value[0], other]
    if _LAYER_INDICES.search(name) and name not in _DERIVED and all(isinstance(item, int) for item in value):
        return list(range(min(DEPTH, len(value))))
    return value


def with_features(small: dict[str, Any], values: dict[str, Any], every: bool = False) -> dict[str, Any]:
    """With a backbone's features from the same stages; where its layers are the stages, from the last.

    every: from all stages.
    """
    found = dict(small)
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(small.get(name), dict) and "model_type" in value:
            found[name] = with_features(small[name], value, every)
    stages, used = values.get("stage_names"), values.get("out_features")
    if stages and used:
        layers = next((name for name in LAYERS if values.get(name) == len(stages) - 1), None)
        left = stages[1 : 1 + small[layers]] if layers else stages[1:]
        kept = left if every else used if set(used) <= {stages[0], *left} else left[-len(used) :]
        found["out_features"], found["out_indices"] = kept, [stages.index(stage) for stage in kept]
    return found


def _pairs(small: dict[str, Any], values: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """Whole numbers by name, as they were and as they are."""
    for name, value in values.items():
        other = small.get(name)
        if isinstance(value, dict) and isinstance(other, dict) and "model_type" in value:
            yield from _pairs(other, value)
        elif isinstance(value, int) and isinstance(other, int) and not isinstance(value, bool):
            yield name, value, other


def _narrowed(small: dict[str, Any], values: dict[str, Any]) -> dict[int, int]:
    """What each width became, where all of the same width became the same."""
    became: dict[int, set[int]] = {}
    for name, value, other in _pairs(small, values):
        if name in _HIDDEN and other < value:
            became.setdefault(value, set()).add(other)
    return {value: others.pop() for value, others in became.items() if len(others) == 1}


def _alike(small: dict[str, Any], values: dict[str, Any], became: dict[int, int]) -> dict[str, Any]:
    """With what was as wide as a hidden size, and has another name, still as wide."""
    found = dict(small)
    for name, value in values.items():
        other = small.get(name)
        if isinstance(value, dict) and isinstance(other, dict) and "model_type" in value:
            found[name] = _alike(other, value, became)
        elif isinstance(value, int) and other == value and _LIKE_WIDTH.search(name):
            found[name] = became.get(value, value)
    return found


def _rotary_sections(rope: dict[str, Any], sizes: dict[str, int]) -> list[int]:
    """Shares of the rotated half of a head for time, height and width."""
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    half = int(head * (rope.get("partial_rotary_factor") or 1.0)) // 2
    return [half - 2 * (half // 4), half // 4, half // 4]


def _largest(values: dict[str, Any], name: str) -> int:
    """The largest value of this field in the configuration and its parts, or 0."""
    value = values.get(name)
    found = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]
    parts = [part for part in values.values() if isinstance(part, dict)]
    return max([0, *found, *(_largest(part, name) for part in parts)])


def _with_pictures(values: dict[str, Any], side: int, small: int) -> dict[str, Any]:
    """Pictures, and the grids that they are reduced to, as small as this."""

    def scaled(value: Any) -> Any:
        if isinstance(value, list):
            return [scaled(item) for item in value]
        return max(1, value * small // side)

    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            found[name] = _with_pictures(value, side, small)
        elif name.endswith("image_size") and isinstance(value, int):
            found[name] = min(value, small)
        elif name.endswith(_PICTURE_GRIDS) and isinstance(value, (int, list)) and side > small:
            found[name] = scaled(value)
        else:
            found[name] = value
    return found


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from _numbers(value)
        elif isinstance(value, list):
            for item in value:
                yield from _numbers({name: item})
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            yield name, value


def _common_factor(values: dict[str, Any], widths_alone: bool) -> int:
    """What all widths can be divided by: with the head counts, of which two remain, or till one is narrow."""
    numbers = list(_numbers(values))
    heads = [value for name, value in numbers if _HEAD_COUNT.search(name) and "key_value" not in name]
    widths = [value for name, value in numbers if _WIDTH.search(name)]
    divided, remain = (widths, _NARROWEST) if widths_alone else (heads, 2)
    if not divided:
        return 1
    common = math.gcd(*widths) if widths_alone else math.gcd(*heads, *widths)
    return max(n for n in range(1, common + 1) if common % n == 0 and (n == 1 or min(divided) // n >= remain))


def _quotients(values: dict[str, Any], factor: int, widths_alone: bool) -> Iterator[dict[str, Any]]:
    """With all widths divided; then also with what has another name and is as wide."""
    divided = _divided(values, factor, widths_alone)
    yield divided
    widths = {value: value // factor for name, value in _numbers(values) if _WIDTH.search(name)}
    alike = _alike(divided, values, widths)
    if alike != divided:
        yield alike


def _divided(values: dict[str, Any], factor: int, widths_alone: bool) -> dict[str, Any]:
    def quotient(name: str, value: Any) -> Any:
        if isinstance(value, dict) and "model_type" in value:
            return _divided(value, factor, widths_alone)
        if isinstance(value, list):
            return [quotient(name, item) for item in value]
        divides = _WIDTH.search(name) or (_HEAD_COUNT.search(name) and not widths_alone)
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return max(1, value // factor) if whole and divides else value

    return {name: quotient(name, value) for name, value in values.items()}

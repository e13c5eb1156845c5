"""How tiny models of transformers are found: sizes, missing fields, parts of a whole, processors."""

import math

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.rung("reference")
transformers = pytest.importorskip("transformers", reason="pip install 'modeprobe[probe]'")

from modeprobe.probe import architectures  # noqa: E402
from modeprobe.probe.architectures import (  # noqa: E402
    agreement,
    build,
    configurations,
    fitting,
    models,
    parts,
    processors,
    repairs,
    search,
    sizes,
)
from modeprobe.probe.architectures.configurations import Source  # noqa: E402
from modeprobe.probe.architectures.inputs import InputMaker  # noqa: E402


class Part(transformers.PreTrainedConfig):
    model_type = "modeprobe_test_part"
    hidden_size = 512


class Whole(transformers.PreTrainedConfig):
    model_type = "modeprobe_test_whole"
    sub_configs = {"part_config": Part}  # noqa: RUF012


class Adding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, first, second=None, past_key_values=None, **others):
        return first + second + others["third"]


def test_a_part_gets_what_its_whole_passes_to_it():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Whole()
            self.inner = Adding(Part())

        def forward(self, x):
            self.inner(x, second=x + 1, past_key_values=object(), third=x + 2)
            return x.zero_()

    holder = Holder()
    [(part, arguments)] = parts.recorded(holder, {"x": torch.ones(2)}, Part)
    assert part is holder.inner
    expected = {"first": 1.0, "second": 2.0, "third": 3.0}
    assert {name: value[0].item() for name, value in arguments.items()} == expected  # as they were before
    assert not holder.inner._forward_pre_hooks


def test_a_part_built_from_the_configuration_of_its_whole_is_the_slot_of_its_name():
    class Prompt(nn.Module):
        def forward(self, points, boxes, labels=None):
            return points

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.part = Whole(), Prompt()

        def forward(self, x):
            return self.part(x, None)

    [(part, arguments)] = parts.recorded(holder := Holder(), {"x": torch.ones(2)}, Part)
    assert part is holder.part
    assert arguments["boxes"] is None
    assert "labels" not in arguments
    assert list(parts.recorded(holder, {"x": None}, Part)) == []  # it got nothing


def test_a_whole_is_found_beside_its_part(monkeypatch):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, Whole.model_type, Whole)
    assert list(parts.wholes(Part)) == [Whole.model_type]
    assert list(parts.wholes(Whole)) == []


def test_a_part_of_any_type_is_that_of_the_default(single_thread):
    kind = transformers.CONFIG_MAPPING["voxtral_realtime_text"]
    assert list(parts.wholes(kind)) == ["voxtral_realtime"]  # its slot is for any text model
    model, inputs = build("voxtral_realtime_text")
    assert type(model.config) is kind
    assert "t_cond" in inputs  # which only the whole passes


def test_a_part_without_a_class_of_its_own_is_built(single_thread):
    model, inputs = build("t5_gemma_module")
    assert model.training
    with torch.no_grad():
        model.eval()(**inputs)


def test_a_processor_makes_padded_patches_of_the_size_configured():
    pytest.importorskip("PIL", reason="pip install pillow")
    known = {"patch_size": 4, "num_patches": 16}
    [made] = processors.processed("siglip2", lambda name, default: known.get(name, default), (8, 8))
    assert made["pixel_values"].shape == (2, 16, 4 * 4 * 3)
    assert made["pixel_attention_mask"].shape == (2, 16)
    assert made["spatial_shapes"].shape == (2, 2)


def test_a_processor_makes_features_of_sounds():
    [made] = processors.processed("wav2vec2", lambda name, default: default, (8, 8))
    assert {name: tuple(value.shape) for name, value in made.items()} == {"input_values": (2, 8000)}


def test_sizes_that_are_refused_stay_and_the_rest_is_small():
    part = {"model_type": "part", "num_layers": 9, "width": 640, "heads": 10}
    values = {"model_type": "whole", "part": part, "width": 640, "vocab_size": 9000}
    small = {"model_type": "whole", "part": {**part, "num_layers": 2, "width": 32, "heads": 3}, "width": 32}

    def builds(tried):  # the widths must agree, and hold whole heads
        inner = tried["part"]
        return tried["width"] == inner["width"] and inner["width"] % inner["heads"] == 0

    found = list(fitting.fitting(values, small, builds))
    kept = {**part, "num_layers": 2}
    assert found[0] == {"model_type": "whole", "part": kept, "width": 640}
    assert [item["width"] for item in found] == [640, 160, 40]


def test_fields_that_a_configuration_lacks_are_added():
    class Model(nn.Linear):
        def __init__(self, config):
            super().__init__(config.hidden_size, config.part_config.num_key_value_heads)

    config = Whole(part_config=Part(), hidden_size=3)
    assert models._parameters(Model, config) == 3 * 2 + 2
    assert config.part_config.num_key_value_heads == 2

    class Reader(Model):
        def __init__(self, config):
            super().__init__(config)
            self.shared = nn.Parameter(torch.zeros(config.part_config.of_the_whole))

    config.of_the_whole = 7
    assert models._parameters(Reader, config) == 3 * 2 + 2 + 7
    assert config.part_config.of_the_whole == 7

    class Odd(Model):
        def __init__(self, config):
            super().__init__(config)
            config.no_such_field  # noqa: B018

    with pytest.raises(AttributeError, match="no_such_field"):
        models._parameters(Odd, config)


def test_lists_by_layer_pictures_by_side_and_none_are_small():
    values = {
        "model_type": "x",
        "num_hidden_layers": 6,
        "layer_windows": [9, 9, 9, 7, 9, 9],
        "num_key_value_heads_per_layer": [8, 8, 8, 8, 8, 8],
        "image_size": [256, 128],
        "backbone_feature_sizes": [[64, 32], [32, 16]],
        "n_routed_experts": None,
    }
    small = next(sizes.readings(values))
    assert small["layer_windows"] == [9, 7]
    assert small["num_key_value_heads_per_layer"] == [2, 2]
    assert small["image_size"] == [32, 16]
    assert small["backbone_feature_sizes"] == [[8, 4], [4, 2]]
    assert small["n_routed_experts"] is None
    assert sizes.filled(small)["n_routed_experts"] == 4


def test_widths_by_stage_are_divided_with_the_others():
    stages = {"hidden_size": 96, "embed_dim_per_stage": [96, 192], "num_attention_heads": 1}
    divided = [made for made in sizes.readings({"model_type": "x", **stages}) if made["hidden_size"] == 24]
    assert [made["embed_dim_per_stage"] for made in divided] == [[24, 48]]


def test_rotary_parameters_by_layer_type_are_another_reading():
    rope = {"rope_type": "default", "rope_theta": 5.0}
    values = {"model_type": "x", "layer_types": ["sliding_attention"], "rope_parameters": rope}
    assert sizes.filled(values)["rope_parameters"] == rope
    assert sizes.with_rope_by_layer_type(values)["rope_parameters"] == {"sliding_attention": rope}


@pytest.mark.parametrize("factor", [1, 2])
def test_a_width_that_follows_the_hidden_size_keeps_its_ratio(factor):
    wide = {"hidden_size": 4096, "attention_hidden_size": 4096 * factor}
    small = next(sizes.readings(wide))
    assert small["attention_hidden_size"] == factor * small["hidden_size"] < 4096


@pytest.mark.parametrize(
    ("depth", "used", "every", "kept"),
    [
        ({"num_hidden_layers": 4}, ["stage4"], False, ["stage2"]),
        ({"num_hidden_layers": 4}, ["stage1", "stage3", "stage4"], False, ["stage1", "stage2"]),
        ({"num_hidden_layers": 4}, ["stage1"], False, ["stage1"]),
        ({"depths": [2, 2, 6, 2]}, ["stage2", "stage4"], False, ["stage2", "stage4"]),
        ({"depths": [2, 2, 6, 2]}, ["stage4"], True, ["stage1", "stage2", "stage3", "stage4"]),
    ],
)
def test_features_come_from_stages_that_are_left(depth, used, every, kept):
    stages = ["stem", "stage1", "stage2", "stage3", "stage4"]
    backbone = {"model_type": "part", "stage_names": stages, "out_features": used, **depth}
    values = {"model_type": "whole", "backbone_config": backbone}
    small = next(sizes.readings(values))
    found = sizes.with_features(small, values, every)["backbone_config"]
    assert found["out_features"] == kept
    assert [stages[index] for index in found["out_indices"]] == kept


def test_what_is_as_wide_as_a_part_stays_as_wide():
    encoder = {"model_type": "part", "hidden_size": 768, "num_attention_heads": 12}
    decoder = {"model_type": "part", "hidden_size": 256, "num_attention_heads": 8, "vit_dim": 768}
    values = {"model_type": "whole", "encoder": encoder, "decoder": decoder, "window_size": 768}
    found = list(sizes.readings(values))
    assert found[0]["decoder"]["vit_dim"] == 768
    like = [made for made in found if made["decoder"]["vit_dim"] == made["encoder"]["hidden_size"] < 768]
    assert {32, 192} <= {made["encoder"]["hidden_size"] for made in like}
    assert all(made["window_size"] == 768 for made in like)


def test_what_a_configuration_derives_is_derived_again():
    given = configurations.underived(transformers.AutoConfig.for_model("zamba2"))
    assert "mamba_headdim" not in given  # from the hidden size
    assert len(given["layers_block_type"]) == given["num_hidden_layers"]


def shapes(inputs):
    return {name: tuple(value.shape) for name, value in inputs.items()}


@pytest.mark.parametrize(
    ("failure", "given", "expected"),
    [
        (
            "Input image size (64*16) doesn't match model (32*16).",
            {"pixel_values": (2, 3, 32, 16), "masks": (2, 1, 32, 16), "ids": (2, 9)},
            {"pixel_values": (2, 3, 16, 16), "masks": (2, 1, 16, 16), "ids": (2, 9)},
        ),
        ("length 50 is not a multiple of 16", {"input_values": (2, 50)}, {"input_values": (2, 64)}),
        ("to be a multiple of `n * 2` (100), but got 3", {"features": (2, 3)}, {"features": (2, 100)}),
        (
            "Expected `tokens` to have shape `(batch_size, 64)`, but got shape `torch.Size([2, 4])`.",
            {"pixel_values": (2, 3, 8, 8)},
            {"pixel_values": (2, 3, 32, 32)},
        ),
        (
            "Kernel size: (10). Kernel size can't be greater than actual input size",
            {"hidden_states": (2, 1, 7)},
            {"hidden_states": (2, 1, 56)},
        ),
        (
            "Given groups=1, weight of size [16, 5, 1, 1], expected input[1, 2, 12, 32] to have 5 channels",
            {"hidden_states": (2, 12, 32)},
            {"hidden_states": (2, 5, 8, 8)},
        ),
        (
            "The size of tensor a (12) must match the size of tensor b (7) at non-singleton dimension 1",
            {"last_hidden_state": (2, 12, 32)},
            {"last_hidden_state": (2, 7, 32)},
        ),
        (
            "shape '[2, 4, 25]' is invalid for input of size 24",
            {"features": (2, 3, 100), "features_mask": (2, 12)},
            {"features": (2, 3, 100), "features_mask": (2, 100)},
        ),
        (
            "shape '[2, 1, 3]' is invalid for input of size 3",
            {"pixel_values": (2, 3, 4, 4)},
            {"pixel_values": (1, 3, 4, 4)},
        ),
        (
            "The expanded size isn't allowed in a leading, non-existing dimension 0",
            {"pixel_values": (2, 4, 3, 8, 8), "image_attention_mask": (2, 9), "attention_mask": (2, 9)},
            {"pixel_values": (2, 4, 3, 8, 8), "image_attention_mask": (2, 9, 4), "attention_mask": (2, 9)},
        ),
    ],
)
def test_inputs_get_the_sizes_that_were_asked_for(failure, given, expected):
    inputs = {name: torch.ones(shape) for name, shape in given.items()}
    assert [shapes(found) for found in repairs.resized(inputs, failure)] == [expected]
    assert list(repairs.resized(inputs, "something else is wrong")) == []


@pytest.mark.parametrize(
    ("failure", "given", "expected"),
    [
        ("index 9 is out of bounds for dimension 0 with size 4", [[9, 2], [5, 4]], [[1, 2], [1, 0]]),
        ("index 1 is out of range", [[9, 2], [5, 4]], [[9], [5]]),
        (
            "size of tensor a (2) must match the size of tensor b (3) at non-singleton dimension 1",
            [[9, 2], [5, 4]],
            [[[9] * 3, [2] * 3], [[5] * 3, [4] * 3]],
        ),
    ],
)
def test_integers_get_the_range_and_the_codebooks_that_were_asked_for(failure, given, expected):
    [found] = repairs.resized({"input_ids": torch.tensor(given)}, failure)
    assert found["input_ids"].tolist() == expected


@pytest.mark.parametrize(
    ("failure", "built", "given"),
    [
        ("mat1 and mat2 shapes cannot be multiplied (8x128 and 64x4096)", 64, 128),
        ("running_mean should contain 2560 elements not 64", 64, 2560),
        (
            "weight of size [96, 12, 1, 1], expected input[2, 384] to have 12 channels, but got 384 channels",
            12,
            384,
        ),
        (
            "normalized_shape=[32], expected input with shape [*, 32], but got input of size[2, 16, 256]",
            32,
            256,
        ),
        ("Sizes of tensors must match except in dimension 1. Expected size 896 but got size 32", 896, 32),
        ("The size of tensor a (8) must match the size of tensor b (32) at non-singleton dimension 3", 32, 8),
        (
            "Expected size for first two dimensions of batch2 tensor to be: [14, 32] but got: [14, 40].",
            40,
            32,
        ),
    ],
)
def test_what_was_built_for_and_what_was_given_is_read_from_a_failure(failure, built, given):
    assert agreement.disagreeing(failure) == [(built, given)]
    assert agreement.disagreeing(failure.replace(str(given), str(built))) == []


def test_a_width_that_disagrees_becomes_the_other():
    inner = {"model_type": "part", "channels": [8, 64], "hidden_size": 64}
    values = {"model_type": "whole", "part": inner, "hidden_dim": 8, "vocab_size": 64, "image_size": 8}
    found = list(agreement.agreeing(values, "shapes cannot be multiplied (2x8 and 64x3)"))
    alone = [{**inner, "channels": [8, 8]}, {**inner, "hidden_size": 8}]
    both = {**inner, "channels": [8, 8], "hidden_size": 8}
    assert [made["part"] for made in found[:3]] == [*alone, both]  # what was built for 64
    assert {made["hidden_dim"] for made in found[3:]} == {8, 64}  # what was given as 8
    assert all(made["vocab_size"] == 64 and made["image_size"] == 8 for made in found)


class Stage(transformers.PreTrainedConfig):
    model_type = "modeprobe_test_stage"

    def __init__(self, hidden_dim=4, out_channels=(6, 3), **others):
        super().__init__(**others)
        self.hidden_dim, self.out_channels = hidden_dim, out_channels


class Disagreeing(transformers.PreTrainedModel):
    config_class = Stage

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(2, 6)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.last = nn.Linear(config.out_channels[1], 1)
        self.post_init()

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_a_field_that_a_failure_names_is_added_where_it_is_lacking():
    inner = {"model_type": "part", "sliding_window": None}
    other = {"model_type": "part", "sliding_window": 512}
    failure = "Could not find a `sliding_window` argument in the config, or it is not set"
    assert agreement.answerable(failure)
    [made] = agreement.agreeing({"model_type": "whole", "part": inner, "other": other}, failure)
    assert made == {
        "model_type": "whole",
        "part": {**inner, "sliding_window": 8},
        "other": other,
        "sliding_window": 8,
    }
    assert not agreement.answerable("something else failed")
    assert list(agreement.agreeing({}, failure.replace("sliding_window", "of_no_usual_value"))) == []


def test_a_model_is_built_again_until_its_sizes_agree():
    model, inputs = Disagreeing(Stage()), {"x": torch.ones(3, 2)}
    refused = [(0, inputs, search._failure(model, inputs))]
    (found, same), *_ = search._agreed(Disagreeing, model.config, refused, Source("disagreeing"), math.inf)
    assert same is inputs
    assert (found.config.hidden_dim, found.config.out_channels[1]) == (6, 6)
    assert found(**inputs).shape == (3, 1)


def test_an_optional_input_is_added_for_the_part_that_needs_it():
    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.prompt = Whole(), Adding(Part())

        def forward(self, x, boxes=None):
            """
            boxes (`torch.FloatTensor` of shape `(batch_size, 4)`, *optional*):
                Prompts.
            """
            if boxes is not None:
                self.prompt(boxes, second=boxes, third=x)
                raise ValueError("what comes after the part")
            return x

    model = Prompted()
    [(_, more)] = search._extended([(model, {"x": torch.ones(1)})], Source("whole"))
    assert more["boxes"].shape == (2, 4)
    [(part, arguments)] = parts.recorded(model, more, Part)
    assert part is model.prompt
    assert arguments["first"].shape == (2, 4)


def test_placeholders_that_were_too_many_are_taken_out_before_others_are_put_in():
    maker = InputMaker(Adding(Part()))
    text = torch.tensor([[60, 60, 60, 7, 8]] * 2)
    failure = "Image features and image tokens do not match, tokens: 6, features: 2"
    first, *_ = maker._with_placeholders({"input_ids": text}, failure)
    assert first["input_ids"].tolist() == [[60, 7, 8]] * 2


def test_patches_have_the_documented_shape():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Whole(patch_size=4, spatial_merge_size=2, num_channels=3, temporal_patch_size=2)

        def forward(self, pixel_values, image_grid_thw=None):
            """
            pixel_values (`torch.Tensor` of shape `(rows, patch_size * spatial_merge_size, 5, channels)`):
            """

    maker = InputMaker(Model())
    assert (32, 8, 5, 3) in [tuple(made["pixel_values"].shape) for made in maker._patches("image_grid_thw")]
    videos = [tuple(made["pixel_values"].shape) for made in maker._with_media({})]
    assert (2, 2, 4, 4, 3) in videos  # patches over time, their channels last


def test_hidden_states_stand_in_for_tokens_that_a_model_cannot_embed():
    class Headless(nn.Module):
        config = Part()

        def forward(self, input_ids=None, inputs_embeds=None):
            return inputs_embeds if input_ids is None else self.embed_tokens(input_ids)

    maker = InputMaker(Headless())
    failure = search._failure(maker.model, {"input_ids": maker.tokens(2, 3)})
    [found] = [
        made for made in maker.repaired({"input_ids": maker.tokens(2, 3)}, failure) if "input_ids" not in made
    ]
    assert found["inputs_embeds"].is_floating_point()


def test_names_are_read_in_the_callers_too():
    def inner(features, mask):
        return features[mask.to(torch.bool)]

    def forward(features, mask_of_places=None):
        return inner(
            features,
            mask=mask_of_places,
        )

    with pytest.raises(AttributeError) as raised:
        forward(torch.ones(2))
    named = list(repairs.read_where_raised(raised.value))
    assert "mask_of_places" not in named[0]
    assert any("mask_of_places" in names for names in named[1:])


def test_a_text_gets_a_place_for_each_feature_of_its_picture(single_thread):
    model, inputs = build("kosmos-2")
    places = model.config.latent_query_num
    assert inputs["image_embeds_position_mask"].sum(dim=1).tolist() == [places] * 2
    assert inputs["input_ids"].shape == inputs["image_embeds_position_mask"].shape


def test_a_model_without_a_forward_is_run_by_its_encode_or_its_parts():
    class Codec(nn.Module):
        def encode(self, x):
            return x + 1

    [codec] = models.runnable(Codec())
    assert codec(torch.zeros(1)).item() == 1

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = Adding(Part()), nn.Linear(1, 1)

    several = Several()
    assert models.runnable(several) == [several.first]
    assert models.runnable(several.first) == [several.first]


def test_the_processor_of_a_part_is_that_of_its_whole():
    mapping = {"vl": "OfTheWhole", "vl_text_model": None}
    assert processors._of_type_or_whole(mapping, "vl") == "OfTheWhole"
    assert processors._of_type_or_whole(mapping, "vl_text_model") == "OfTheWhole"
    assert processors._of_type_or_whole(mapping, "vlm_text_model") is None


def test_the_search_ends_after_a_while(monkeypatch):
    monkeypatch.setattr(search, "_SECONDS", -1)
    with pytest.raises(architectures.ArchitectureError, match="nothing more was tried"):
        build("bert")


def test_the_search_shows_what_it_tries(capsys, single_thread):
    build("bert", progress=True)
    assert "BertLMHeadModel" in " ".join(capsys.readouterr().err.split())
    build("bert", progress=False)
    assert capsys.readouterr().err == ""


def test_stages_of_one_depth_each_stay_as_many_as_their_depths():
    first = next(sizes.readings({"num_hidden_layers": 4, "depths": [3, 3, 27, 3], "hidden_size": 512}))
    assert first["num_hidden_layers"] == len(first["depths"]) == 4
    first = next(sizes.readings({"num_hidden_layers": 12, "depths": [3, 3, 27, 3]}))
    assert first["num_hidden_layers"] == sizes.DEPTH

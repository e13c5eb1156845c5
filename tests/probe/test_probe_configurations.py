"""Configurations of one's own: values that stay, and the files of checkpoints."""

import dataclasses
import re

import pytest
import torch

pytestmark = pytest.mark.rung("reference")
transformers = pytest.importorskip("transformers", reason="pip install 'modeprobe[probe]'")

import modeprobe  # noqa: E402
from modeprobe.probe import architectures  # noqa: E402
from modeprobe.probe.architectures import build, configurations, search, sizes  # noqa: E402


def test_values_of_ones_own_stay():
    values = {"attention_dropout": 0.25, "hidden_size": 48, "num_attention_heads": 6}
    model, _ = build("llama", values=values)
    assert {name: getattr(model.config, name) for name in values} == values
    assert model.config.num_hidden_layers == sizes.DEPTH
    model, _ = build("gpt2", values={"hidden_size": 64})  # which GPT-2 calls n_embd
    assert model.config.n_embd == 64
    model, _ = build("llava", values={"text_config.attention_dropout": 0.25})
    assert model.config.text_config.attention_dropout == 0.25
    assert model.config.vision_config.attention_dropout == 0.0


def test_values_of_ones_own_complete_a_default_that_lacks_them(single_thread):
    source = configurations.source("lw_detr", 0, {"projector_scale_factors": [1.0]})
    assert source.start().num_feature_levels == 1  # derived from them
    with pytest.raises(Exception, match="hidden_size_per_layer_input must be 0"):
        configurations.source("gemma4_assistant", 0, {}).start()
    given = {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0}
    assert (
        configurations.source("gemma4_assistant", 0, given).start().text_config.vocab_size_per_layer_input
        == 0
    )


@pytest.mark.parametrize(
    ("model_type", "field", "said"),
    [
        (
            "llama",
            "attention_dropuot",
            "LlamaConfig has no field 'attention_dropuot'; it has attention_dropout",
        ),
        ("llava", "attention_dropout", "vision_config.attention_dropout, text_config.attention_dropout"),
        ("llava", "text.attention_dropout", "text_config.attention_dropout"),
        ("llama", "no.such", "LlamaConfig has no field 'no.such'"),
    ],
)
def test_fields_that_a_configuration_does_not_have_are_named(model_type, field, said):
    with pytest.raises(architectures.ArchitectureError, match=re.escape(said)):
        build(model_type, values={field: 0.1})


def test_the_configuration_of_a_checkpoint_is_read_and_made_small(tmp_path):
    config = transformers.MistralConfig(attention_dropout=0.125, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        model, _ = build(str(path))
        assert type(model).__name__ == "MistralForCausalLM"
        assert model.config.attention_dropout == 0.125
        assert model.dtype == torch.float32
        assert sum(parameter.numel() for parameter in model.parameters()) < 100_000
    model, _ = build(str(tmp_path), values={"attention_dropout": 0.5, "num_key_value_heads": 1})
    assert (model.config.attention_dropout, model.config.num_key_value_heads) == (0.5, 1)


def test_values_of_ones_own_are_not_looked_for_in_a_whole_without_them(monkeypatch):
    whole = object(), {}
    monkeypatch.setattr(search, "_running", lambda *args: iter(()))
    monkeypatch.setattr(search, "_first", lambda running: next(running, None))
    monkeypatch.setattr(search, "_as_part", lambda *args: iter([whole]))
    monkeypatch.setattr(search, "parameters", lambda model: 0)
    source = configurations.Source("bert")
    assert search.find(source, print) == whole
    assert "a tiny bert" in search.find(dataclasses.replace(source, kept={"hidden_size": 8}), print)
    assert "a tiny bert" in search.find(dataclasses.replace(source, config=object()), print)


def test_inputs_of_ones_own_are_taken_as_they_are():
    ids = torch.ones(1, 3, dtype=torch.long)
    tried = []

    def make(model):
        tried.append(model)
        return {"input_ids": ids}

    model, inputs = build("bert", make_inputs=make)
    assert tried[-1] is model
    assert inputs == {"input_ids": ids}
    with pytest.raises(architectures.ArchitectureError, match="You must specify exactly one of input_ids"):
        build("bert", make_inputs=lambda model: {"pictures": ids})


def test_the_class_of_a_checkpoint_is_built(tmp_path, single_thread):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.5}
    transformers.BertConfig(architectures=["BertForSequenceClassification"], **rates).save_pretrained(
        tmp_path
    )
    model, inputs = build(str(tmp_path))
    assert type(model).__name__ == "BertForSequenceClassification"
    assert modeprobe.probe(model, **inputs).causes == {"module_dropout"}  # that of the classifier alone
    transformers.BertConfig(architectures=["OfSomeoneElse"]).save_pretrained(tmp_path)
    assert type(build(str(tmp_path))[0]).__name__ == "BertLMHeadModel"


@pytest.mark.parametrize("text", ["{", "[]", '{"hidden_size": 8}', '{"model_type": "no_such_type"}', None])
def test_a_file_that_holds_no_configuration_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        architectures.ArchitectureError, match=r"config\.json is no configuration of transformers"
    ):
        build(str(tmp_path))


def test_a_part_of_another_type_takes_the_place_of_the_default(single_thread):
    given = {"vision_config": {"model_type": "vit", "hidden_dropout_prob": 0.5}}
    config = configurations.source("llava", 0, given).start()
    assert (config.vision_config.model_type, config.vision_config.hidden_dropout_prob) == ("vit", 0.5)
    assert not hasattr(config.vision_config, "projection_dim")  # of the CLIP that it would be

"""Thirty architectures of transformers with measured answers."""

import csv
import json
from pathlib import Path

import pytest
import torch

import modeprobe as mp

pytestmark = pytest.mark.rung("reference")
transformers = pytest.importorskip("transformers", reason="pip install 'modeprobe[probe]'")

ROWS = list(csv.DictReader((Path(__file__).parents[1] / "data" / "modes.csv").open()))
WORDS = {
    "nn.Dropout": "module_dropout",
    "functional F.dropout": "functional_dropout",
    "functional F.dropout2d": "functional_dropout",
    "SDPA dropout_p": "attention_dropout",
    "LayerDrop coin": "stochastic_depth",
    "DropPath/stochastic depth": "stochastic_depth",
    "numpy-rng": "random_noise",
    "rng": "random_noise",
    "batch statistics": "batch_statistics",
}


def build(row):
    settings = json.loads(row["config"])
    if "backbone_config" in settings:
        backbone = dict(settings["backbone_config"])
        settings["backbone_config"] = transformers.AutoConfig.for_model(
            backbone.pop("model_type"), **backbone
        )
    auto = getattr(transformers, row["auto_class"])
    if row["auto_class"].startswith("Auto"):
        model = auto.from_config(transformers.AutoConfig.for_model(row["model_type"], **settings))
    else:
        model = auto(auto.config_class(**settings))
    inputs = {}
    for item in row["inputs"].split():
        name, shape, dtype = item.split(":")
        size = [int(n) for n in shape.split("x")]
        inputs[name] = torch.randint(3, 60, size) if dtype == "int64" else torch.randn(size)
    return model, inputs


def expected_causes(row):
    if row["effect"] == "none":
        return set()
    kinds = [
        item.strip().rsplit(":", 1)[0].split(":")[0] for item in row["causes"].split(";") if item.strip()
    ]
    causes = {WORDS[kind] for kind in kinds}
    # Another structure of the output needs code behind the flag; so does a difference without any such call.
    return causes | {"branch"} if "structure" in row["note"] or not causes else causes


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_row(row, single_thread):
    model, inputs = build(row)
    report = mp.probe(model, **inputs, progress=False)
    assert report.effect == row["effect"], str(report)
    assert str(report.train_is_random) == row["train_random"]
    assert str(report.eval_is_random) == row["eval_random"]
    assert str(report.train_is_reproducible) == row["train_reproducible"]
    assert report.causes == expected_causes(row), str(report)
    assert report.forwards <= 25 + 2 * report.readers
    never = [item for item in report.idle if item.why == "never called"]
    assert len(never) == int(row["n_dropout_never_called"] or 0)
    mutated = {m.name.rsplit(".", 1)[-1] for m in report.mutations}
    assert mutated == {*row["train_forward_mutates"].split(), *row["eval_forward_mutates"].split()}


CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**settings):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG, **settings))


def test_generation_agrees_for_a_plain_model(single_thread):
    report = mp.probe(llama(), input_ids=torch.randint(3, 60, (2, 12)))
    assert (report.effect, report.generation_same, report.exit_code) == ("none", True, 0)


def test_checkpointing_trap_is_named(single_thread):
    model = llama()
    model.gradient_checkpointing_enable()
    report = mp.probe(model, input_ids=torch.randint(3, 60, (2, 12)))
    assert report.generation_same is False
    assert report.checkpointing
    assert "activation checkpointing" in report.verdict
    assert report.exit_code == 2


def test_attention_dropout_set_by_the_user(single_thread):
    report = mp.probe(llama(attention_dropout=0.1), input_ids=torch.randint(3, 60, (2, 12)))
    assert report.causes == {"attention_dropout"}
    assert {site.owners for site in report.sites} == {
        ("model.layers.0.self_attn",),
        ("model.layers.1.self_attn",),
    }

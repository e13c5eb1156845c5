"""Question 3: what does eval() change in a language model?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modeprobe.probe.api import probe
from modeprobe.probe.quiet import quiet
from modeprobe.tour.section import Advance, count, listed, no_progress

NEEDS = {"transformers": "transformers"}

_COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ROTARY = {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}

# Name shown: (configuration class, model class, sizes and the settings that differ from its defaults).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LLaMA": ("LlamaConfig", "LlamaForCausalLM", _ROTARY),
    "LLaMA with attention_dropout=0.1": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_ROTARY, "attention_dropout": 0.1},
    ),
    "Mistral": ("MistralConfig", "MistralForCausalLM", _ROTARY),
    "GPT-2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    ),
    "OPT": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    ),
    "BERT": (
        "BertConfig",
        "BertForMaskedLM",
        {**_COMMON, "intermediate_size": 64, "max_position_embeddings": 64},
    ),
}


@dataclass(frozen=True)
class Settings:
    """Which of :data:`MODELS` to probe."""

    models: tuple[str, ...] = tuple(MODELS)

    @property
    def steps(self) -> int:
        return len(self.models)


@dataclass(frozen=True)
class Row:
    """One model: what the probe measured, and what counting nn.Dropout modules would have said.

    ``modules`` counts nn.Dropout modules, ``active`` those with p > 0, ``idle`` those of them that never act;
    ``sites`` counts the places that do act, nn.Dropout or not.
    """

    name: str
    parameters: int
    effect: str
    causes: tuple[str, ...]
    verdict: str
    modules: int
    active: int
    idle: int
    sites: int
    seconds: float

    @property
    def shortcut(self) -> str:
        if self.active:
            return f"{count(self.active, 'nn.Dropout module')} with p > 0: eval() changes the outputs"
        if self.modules:
            return f"{count(self.modules, 'nn.Dropout module')}, all with p = 0: eval() changes nothing"
        return "no nn.Dropout module: eval() changes nothing"

    @property
    def shortcut_is_right(self) -> bool:
        return (self.active > 0) == (self.effect == "differs")

    @property
    def remark(self) -> str:
        return f"{self.idle} of the {self.active} never act" if self.idle else ""


@dataclass(frozen=True)
class Result:
    rows: tuple[Row, ...]
    transformers: str

    @property
    def answer(self) -> str:
        same = [row.name for row in self.rows if row.effect == "none"]
        differ = [row.name for row in self.rows if row.effect != "none"]
        wrong = [row.name for row in self.rows if not row.shortcut_is_right]
        parts = []
        if same:
            parts.append(f"eval() changes nothing in {listed(same)}")
        if differ:
            parts.append(
                f"it changes the output of {listed(differ)}"
                if same
                else f"eval() changes the output of {listed(differ)}"
            )
        says = "; ".join(parts) + "."
        if wrong:
            return f"{says} Counting nn.Dropout modules would have been wrong for {listed(wrong)}."
        return f"{says} Counting nn.Dropout modules would have given the same answers."


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny, randomly initialised model and a batch for it. Nothing is downloaded."""
    import transformers

    config_class, model_class, options = MODELS[name]
    config = getattr(transformers, config_class)(**options, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids}


def examine(name: str) -> Row:
    """Probe one model, and count its nn.Dropout modules."""
    model, inputs = build(name)
    start = time.perf_counter()
    report = probe(model, progress=False, **inputs)
    seconds = time.perf_counter() - start
    dropouts = [module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    return Row(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        effect=report.effect,
        causes=tuple(sorted(report.causes)),
        verdict=report.verdict,
        modules=len(dropouts),
        active=sum(module.p > 0 for module in dropouts),
        idle=sum(item.p > 0 for item in report.idle),
        sites=len(report.sites),
        seconds=seconds,
    )


def compute(settings: Settings = Settings(), advance: Advance = no_progress) -> Result:
    """Probe each model."""
    import transformers

    rows = []
    with quiet():
        for name in settings.models:
            rows.append(examine(name))
            advance()
    return Result(tuple(rows), transformers.__version__)

"""Contexts, assertions, renderings and the command line."""

import html.parser
import io
import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import modeprobe as mp
from modeprobe.cli import app
from modeprobe.probe.table import fold

pytestmark = pytest.mark.rung("reference")


class Mixed(nn.Module):
    """One dropout of each kind, and a BatchNorm."""

    def __init__(self, p=0.5):
        super().__init__()
        self.norm, self.drop, self.p = nn.BatchNorm1d(6), nn.Dropout(p), p

    def train(self, mode=True):
        raise AssertionError("train() must not be called by a context")

    def forward(self, x):
        x = self.norm(x)
        x = self.drop(x) + F.dropout(x, self.p, self.training)
        return x + F.scaled_dot_product_attention(x, x, x, dropout_p=self.p if self.training else 0.0)


def flags(model):
    return [module.training for module in model.modules()]


X = torch.randn(4, 6, 8)


@pytest.mark.parametrize("context", [mp.evaluating, mp.mc_dropout, mp.no_dropout])
def test_contexts_put_flags_back(context):
    model = Mixed()
    model.norm.training = False
    before = flags(model)
    with context(model) as inside:
        assert inside is model
    assert flags(model) == before
    with pytest.raises(ZeroDivisionError), context(model):
        1 / 0  # noqa: B018
    assert flags(model) == before
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"), context("model"):
        pass


def test_evaluating():
    model = Mixed()
    with mp.evaluating(model), torch.no_grad():
        assert not any(flags(model))
        assert torch.equal(model(X), model(X))


def test_mc_dropout_reaches_functional_and_attention_sites():
    class Plain(Mixed):
        def train(self, mode=True):
            return nn.Module.train(self, mode)

    model = Plain().eval()
    mean = model.norm.running_mean.clone()
    report = mp.probe(model, X)
    assert report.causes == {"module_dropout", "functional_dropout", "attention_dropout", "batch_statistics"}
    for given in (None, report):
        with mp.mc_dropout(model, given), torch.no_grad():
            assert flags(model) == [True, False, True]
            assert not torch.equal(model(X), model(X))
    assert torch.equal(model.norm.running_mean, mean)
    with pytest.raises(ValueError, match="no dropout"), mp.mc_dropout(model, mp.probe(nn.Linear(8, 8), X)):
        pass


def test_no_dropout_reaches_functional_and_attention_sites():
    model = Mixed()
    model.norm.training = False
    with torch.no_grad():
        with mp.evaluating(model):
            expected = model(X)
        assert not torch.equal(model(X), expected)
        with mp.no_dropout(model):
            assert torch.equal(model(X), expected)
            assert torch.equal(F.dropout(X), X)
            assert nn.LSTM(8, 8, 2, dropout=0.9)(X)[0].isfinite().all()


def test_no_dropout_keeps_batch_statistics():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5))
    with mp.no_dropout(model):
        model(X)
    assert int(model[0].num_batches_tracked) == 1


def test_assertions(assert_mode_invariant, assert_eval_deterministic, assert_modes):
    gated, ungated = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), nn.Sequential(nn.Linear(8, 8))
    assert_mode_invariant(ungated, X)
    assert_eval_deterministic(gated, X)
    with pytest.raises(AssertionError, match="turns off one dropout module"):
        assert_mode_invariant(gated, X)
    noisy = nn.Sequential(nn.Linear(8, 8))
    noisy.register_forward_hook(lambda module, args, output: F.dropout(output))
    with pytest.raises(AssertionError, match="not deterministic in eval mode"):
        assert_eval_deterministic(noisy, X)
    gated.train()
    assert_modes(gated, training=True)
    gated[0].eval()
    assert_modes(gated, training=True, except_for={"0": False})
    with pytest.raises(AssertionError, match="0: in eval mode"):
        assert_modes(gated, training=True)
    with pytest.raises(ValueError, match="no module 'x'"):
        assert_modes(gated, training=True, except_for={"x": False})


class Elements(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report():
    block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    model = nn.Sequential(
        nn.BatchNorm1d(6), *(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(3)), block
    )
    return mp.probe(model, X)


def test_json_has_a_schema_and_is_plain(report):
    data = json.loads(report.to_json())
    assert data["schema"] == "modeprobe.report/1"
    assert data["causes"] == ["module_dropout", "batch_statistics"]
    assert data["exit_code"] == 1
    assert [site["path"] for site in data["sites"]] == ["0", "1.1", "2.1", "3.1", "4.1"]
    assert {
        "verdict",
        "effect",
        "train_is_random",
        "eval_is_random",
        "idle",
        "mixed",
        "mutations",
    } <= data.keys()


def test_text_and_markdown_put_the_verdict_first(report):
    assert str(report).startswith(report.verdict)
    assert "4 dropout modules" in report.verdict
    assert "*.1 (4 times)" in str(report)
    assert report.to_markdown().startswith(f"**{report.verdict}**")
    assert "| `*.1 (4 times)` | dropout | 0.5 | module_dropout |" in report.to_markdown()


def test_text_is_no_wider_than_the_terminal(report, monkeypatch):
    for columns, width in (("60", 60), ("200", 118)):
        monkeypatch.setenv("COLUMNS", columns)
        assert max(map(len, str(report).splitlines()[1:])) <= width


def test_a_model_that_raises_is_called_neither_random_nor_deterministic():
    broken = mp.probe(nn.Linear(3, 3), X)
    assert "Linear: train raises, eval raises;" in str(broken)
    assert str(broken).count("train mode, forward; eval mode, forward:") == 1
    assert "deterministic" not in broken.to_html()


def test_html_is_self_contained_and_well_formed(report):
    page = Elements()
    page.feed(report.to_html())
    assert page.open == []
    links = [value for _, attrs in page.seen for name, value in attrs.items() if name in ("src", "href")]
    assert all(link.startswith("data:") for link in links)
    assert "module_dropout" in " ".join(attrs.get("class") or "" for _, attrs in page.seen)
    assert report.verdict in report.to_html()
    assert report._repr_html_().count("<html") == 0


def test_a_prompt_shows_the_report(report):
    assert repr(report) == str(report)


def test_cells_fold_between_words():
    assert fold("encoder.layers.*.attention.dropout (2 times)", 20) == [
        "encoder.layers.*.",
        "attention.",
        "dropout (2 times)",
    ]
    assert fold("unbreakable", 4) == ["unbreakable"]
    assert fold("modeling_gpt2.py:601", 10) == ["modeling_", "gpt2.py:601"]


@pytest.mark.parametrize("width", [118, 80, 60, 40])
def test_tables_fit_and_keep_words_whole(report, width):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(report)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert sum("module_dropout" in line for line in lines) == 1
    heading = next(line for line in lines if line.startswith("module"))
    assert ("where" in heading) == (width >= 80)


MODULE = """
import torch
from torch import nn
import torch.nn.functional as F
print("noise on standard output")
def plain(): return nn.Linear(4, 4)
def dropped(): return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
class Ungated(nn.Module):
    def forward(self, x): return F.dropout(x)
def broken(): raise OSError("no weights")
def make(): return torch.randn(2, 4)
def named(): return {"input": torch.randn(2, 4)}
def ids(model): return {"input_ids": torch.ones(1, model.config.num_hidden_layers, dtype=torch.long)}
def one(model): return torch.ones(1)
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    (tmp_path / "cli_models.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("cli_models", None)


@pytest.mark.parametrize(
    ("factory", "make", "code"),
    [
        ("plain", "make", 0),
        ("plain", "named", 0),
        ("dropped", "make", 1),
        ("Ungated", "make", 2),
        ("broken", "make", 3),
        ("absent", "make", 3),
    ],
)
def test_command_line(workspace, factory, make, code):
    arguments = ["probe", f"cli_models:{factory}", "--input", f"cli_models:{make}", "--format", "json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    if code != 3:
        assert json.loads(result.stdout)["exit_code"] == code
    else:
        assert result.stdout == ""


def test_command_line_writes_files(workspace):
    for form, start in (("html", "<!doctype html>"), ("markdown", "**eval()"), ("text", "eval() changes")):
        path = workspace / f"report.{form}"
        arguments = ["probe", "cli_models:dropped", "--input", "cli_models:make", "-f", form, "-o", str(path)]
        assert CliRunner().invoke(app, arguments).exit_code == 1
        assert path.read_text().startswith(start)


def test_command_line_rejects_bad_arguments(workspace):
    both = ["cli_models:plain", "--transformers", "llama"]
    input_too = ["--transformers", "llama", "--input", "cli_models:make"]
    set_without = ["cli_models:plain", "--set", "dropout=0.1"]
    set_without_value = ["--transformers", "llama", "--set", "dropout"]
    wrong = ([], ["no_colon"], ["--bogus"], ["cli_models:plain", "-f", "xml"])
    for arguments in (*wrong, both, input_too, set_without, set_without_value):
        assert CliRunner().invoke(app, ["probe", *arguments]).exit_code == 3


def test_command_line_builds_transformers(single_thread):
    pytest.importorskip("transformers", reason="pip install 'modeprobe[probe]'")
    result = CliRunner().invoke(app, ["probe", "--transformers", "llama", "--format", "json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "LlamaForCausalLM"
    given = ["--set", "attention_dropout=0.25", "--set", "hidden_act=gelu"]
    result = CliRunner().invoke(app, ["probe", "--transformers", "llama", "--format", "json", *given])
    assert json.loads(result.stdout)["causes"] == ["attention_dropout"]
    assert result.exit_code == 1
    result = CliRunner().invoke(app, ["probe", "--transformers", "llama", "--set", "dropout=0.1"])
    assert result.exit_code == 3
    assert "LlamaConfig has no field 'dropout'" in " ".join(result.stderr.split())
    result = CliRunner().invoke(app, ["probe", "--transformers", "lama"])
    assert result.exit_code == 3
    assert "llama" in result.output


def test_command_line_takes_inputs_for_transformers(workspace, single_thread):
    pytest.importorskip("transformers", reason="pip install 'modeprobe[probe]'")
    given = ["probe", "--transformers", "llama", "--set", "num_hidden_layers=1", "--input"]
    assert CliRunner().invoke(app, [*given, "cli_models:ids"]).exit_code == 0
    result = CliRunner().invoke(app, [*given, "cli_models:one"])
    assert result.exit_code == 3
    assert "--input must return a dict of keyword arguments, got Tensor" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("model_type", "kind", "inputs"),
    [
        ("bert", "BertLMHeadModel", {"input_ids": (2, 12)}),
        # A text and a sound, not the decoder alone.
        ("whisper", "WhisperModel", {"decoder_input_ids": (2, 8), "input_features": (2, 80, 96)}),
        # As many placeholders in the text as the picture has features.
        ("llava", "LlavaModel", {"input_ids": (2, 28), "pixel_values": (2, 3, 32, 32)}),
        (
            "qwen3_vl",
            "Qwen3VLModel",
            {
                "input_ids": (2, 16),
                "pixel_values": (32, 384),
                "image_grid_thw": (2, 3),
                "mm_token_type_ids": (2, 16),
            },
        ),
        # Head sizes kept, head counts divided.
        ("mamba2", "Mamba2ForCausalLM", {"input_ids": (2, 12)}),
        # A backbone that needs no further package.
        ("detr", "DetrModel", {"pixel_values": (2, 3, 32, 32)}),
        # Inputs that only the documentation names; that a failure names; whose size a failure names.
        (
            "blip_2_qformer",
            "Blip2QFormerModel",
            {"query_embeds": (2, 12, 32), "encoder_hidden_states": (2, 12, 32)},
        ),
        (
            "lxmert",
            "LxmertModel",
            {"input_ids": (2, 12), "visual_feats": (2, 4, 2048), "visual_pos": (2, 4, 4)},
        ),
        ("granite_speech_encoder", "GraniteSpeechCTCEncoder", {"hidden_states": (2, 12, 160)}),
        (
            "vision-encoder-decoder",
            "VisionEncoderDecoderModel",
            {"pixel_values": (2, 3, 32, 32), "decoder_input_ids": (2, 8)},
        ),
    ],
)
def test_transformers_types_are_built_with_fitting_inputs(model_type, kind, inputs, single_thread):
    pytest.importorskip("transformers", reason="pip install 'modeprobe[probe]'")
    from modeprobe.probe import architectures

    model, made = architectures.build(model_type)
    assert type(model).__name__ == kind
    assert model.training
    assert {name: tuple(value.shape) for name, value in made.items()} == inputs


def test_types_that_cannot_be_built_say_why(monkeypatch, single_thread):
    pytest.importorskip("transformers", reason="pip install 'modeprobe[probe]'")
    from modeprobe.probe import architectures

    for raised, said in (
        (ImportError("natten is missing"), "bert needs a package: ImportError: natten is missing"),
        (KeyError("depths"), "a tiny bert could not be built from its configuration:\n  KeyError: 'depths'"),
    ):
        monkeypatch.setattr(architectures.models, "_made", lambda *args, raised=raised: raised)
        with pytest.raises(architectures.ArchitectureError, match=re.escape(said)):
            architectures.build("bert")

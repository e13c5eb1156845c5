"""What README.md and docs/ show: code that runs, links that lead somewhere, a print-out that is printed."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from modeprobe.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.rung("reference")


def anchors(page):
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page):
    """The blocks of a page in turn, with the names that their readers have."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 2))
    batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(3)]

    class Words(nn.Module):
        def forward(self, input_ids):
            return nn.functional.dropout(input_ids.float(), 0.1, self.training)

    names = {
        "model": Words() if page.name == "probe.md" else model,
        "ids": torch.ones(2, 8, dtype=torch.int64),
        "loader": batches,
        "accuracy": lambda output, batch: (output.argmax(1) == batch[1]).float().mean().item(),
        "scaler": torch.amp.GradScaler("cpu"),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
    }
    names["loss_of"] = lambda output: output.square().mean()
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        if "micro_batches" in block:
            names["loader"] = [batches]
            names["mp"].swap(model)
        if "loss_of(model(x), y)" in block:
            names["loss_of"] = nn.functional.cross_entropy
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, page.name, "exec"), names)


def test_the_readme_shows_what_the_probe_prints():
    transformers = pytest.importorskip("transformers", reason="pip install 'modeprobe[probe]'")
    text = (ROOT / "README.md").read_text()
    version = re.search(r"\(here of transformers ([\d.]+)\)", text)[1]
    if not transformers.__version__.startswith(f"{version}."):
        pytest.skip(f"the print-out is of transformers {version}")
    printed = CliRunner().invoke(app, ["probe", "--transformers", "gpt2"], env={"COLUMNS": "118"}).stdout
    shown = re.search(r"```\n(eval\(\) changes.*?)```", text, re.DOTALL)[1]

    def comparable(report):  # the last digits of an effect are the processor's
        return re.sub(r"[\d.]+%", "%", re.sub(r"  +", "  ", report)).strip()

    assert comparable(shown) == comparable(printed)

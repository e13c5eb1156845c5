"""Narrower models, for the types of transformers that run at millions of parameters."""

import math

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.rung("reference")
transformers = pytest.importorskip("transformers", reason="pip install 'modeprobe[probe]'")

from modeprobe.probe.architectures import build, narrowing, search  # noqa: E402
from modeprobe.probe.architectures.configurations import Source  # noqa: E402


def test_the_widths_of_a_model_that_is_not_tiny_are_divided(monkeypatch, single_thread):
    model, inputs = build("convnext")
    assert narrowing.parameters(model) < 100_000
    assert min(model.config.hidden_sizes) >= 8  # normalisation over fewer would hide what comes before
    monkeypatch.setattr(search, "_TINY", math.inf)
    wide, same = build("convnext")
    assert narrowing.parameters(wide) > 50 * narrowing.parameters(model)
    assert {name: value.shape for name, value in same.items()} == {
        name: value.shape for name, value in inputs.items()
    }


class Narrowing(transformers.PreTrainedConfig):
    model_type = "modeprobe_test_narrowing"
    hidden_size: int = 256
    ffn_dim: int = 256


class Wide(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.hidden = nn.Linear(4, config.hidden_size)
        self.inner = nn.Linear(4, config.ffn_dim)

    def forward(self, x):
        x = self.hidden(x).sum(1) + self.inner(x).sum(1)
        return nn.functional.dropout(x, 0.5, self.training)


class Untrained(Wide):
    def forward(self, x):
        if self.training and self.config.ffn_dim < 256:
            raise ValueError("too narrow to be trained")
        return super().forward(x)


class Deaf(Wide):
    def forward(self, x):
        return super().forward(x if self.config.ffn_dim > 16 else torch.ones(2, 4))


class WithoutDropout(Wide):
    def forward(self, x):
        self.training = self.training and self.config.hidden_size > 64
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "hidden_size", "ffn_dim"),
    [(Wide, 16, 16), (Untrained, 16, 256), (Deaf, 16, 64), (WithoutDropout, 256, 16)],
)
def test_a_narrower_model_still_does_what_the_wide_one_does(kind, hidden_size, ffn_dim):
    shown = []
    inputs = {"x": torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 9]])}
    found = narrowing.narrowed(kind(Narrowing()), inputs, Source("narrowing"), shown.append)
    assert (found.config.hidden_size, found.config.ffn_dim) == (hidden_size, ffn_dim)
    assert shown == [f"looking for a smaller {kind.__name__}"]


def test_a_model_that_raises_when_it_runs_again_is_left_as_it_is():
    class Once(Wide):
        def forward(self, x):
            raise ValueError("not with this seed")

    model = Once(Narrowing())
    assert narrowing.narrowed(model, {"x": torch.ones(2, 4)}, Source("narrowing"), print) is model


def test_values_of_ones_own_stay_in_a_narrower_model():
    source = Source("narrowing", kept={"hidden_size": 256})
    found = narrowing.narrowed(Wide(Narrowing()), {"x": torch.arange(8.0).reshape(2, 4)}, source, print)
    assert (found.config.hidden_size, found.config.ffn_dim) == (256, 16)

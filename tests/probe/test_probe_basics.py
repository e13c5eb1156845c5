from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modeprobe as mp
from modeprobe.probe.depth import leaves_out_layers
from modeprobe.probe.events import Trace
from modeprobe.probe.observe import SEEDS
from modeprobe.probe.replay import Variant

pytestmark = pytest.mark.rung("reference")


def test_plain_model_is_invariant():
    report = mp.probe(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0)), torch.randn(4, 8))
    assert (report.effect, report.causes) == ("none", frozenset())
    assert not report.train_is_random
    assert not report.eval_is_random


def test_dropout_module():
    report = mp.probe(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), torch.randn(4, 8))
    assert (report.effect, set(report.causes)) == ("differs", {"module_dropout"})
    assert report.train_is_random
    assert not report.eval_is_random


def test_ungated_functional_dropout_is_random_in_eval():
    class Model(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5)

    report = mp.probe(Model(), torch.randn(4, 8))
    assert (report.effect, set(report.causes)) == ("none", set())
    assert report.train_is_random
    assert report.eval_is_random


@pytest.mark.parametrize("unlucky", [0, 1, 2])
def test_a_model_that_raises_with_some_seeds_is_probed_with_the_others(unlucky):
    class Model(nn.Module):
        def forward(self, x):
            if self.training:
                y = F.dropout(x, 0.5)
                if torch.equal(torch.get_rng_state(), bad):
                    raise IndexError("out of range")
                return y
            return x

    x = torch.randn(4, 8)
    torch.manual_seed(SEEDS[unlucky])
    F.dropout(x, 0.5)
    bad = torch.get_rng_state()
    report = mp.probe(Model(), x)
    assert (report.effect, set(report.causes)) == ("differs", {"functional_dropout"})
    assert report.train_is_random
    assert [(f.mode, f.error, f.sometimes) for f in report.failures] == [
        ("train", "IndexError: out of range", True)
    ]
    assert report.verdict.endswith("In train mode it raises with some seeds.")


def test_the_package_is_also_the_function():

    assert mp.probe(nn.Linear(2, 2), torch.ones(1, 2)).effect == "none"


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([{"a": 1}], True),
        ([{"a": 1, "b": 1}], False),
        ([{"a": 2}], False),
        ([{"a": 1}, {"a": 1, "b": 1}], True),
        ([{"a": 1}, {"b": 1, "c": 1}], False),
        ([{"a": 1}, {"a": 1, "output": 2}], False),
        ([{"a": 1}, {"b": 1, "output": 2}], True),
    ],
)
def test_layers_left_out(runs, expected):
    def variant(output=1, **calls):
        counts = Counter(calls)
        return Variant({"": torch.tensor(float(output))}, Trace(calls=counts, rows=counts), ())

    variants = [variant(**run) for run in runs]
    assert leaves_out_layers(variants, variant(a=1, b=1), "") is expected

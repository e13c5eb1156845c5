import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modeprobe as mp

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


def test_the_package_is_also_the_function():

    assert mp.probe(nn.Linear(2, 2), torch.ones(1, 2)).effect == "none"

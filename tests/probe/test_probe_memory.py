"""Memory: never is there more than one copy of the model beside the user's."""

import itertools

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import modeprobe as mp

pytestmark = pytest.mark.rung("reference")


class Large(nn.Module):
    """Parameters and a buffer of a megabyte each, activations of 2 kB."""

    def __init__(self, raises=None, cyclic=False, copyable=True, flag=True):
        super().__init__()
        self.lin, self.drop, self.raises = nn.Linear(512, 512), nn.Dropout(0.5), raises
        self.register_buffer("table", torch.randn(512, 512))
        self.flag, self.reads = True, flag
        if cyclic:
            self.itself = [self]
        if not copyable:
            self.lines = (line for line in [])

    def train(self, mode=True):
        self.flag = mode
        return super().train(mode)

    def forward(self, x):
        if self.training is self.raises:
            raise RuntimeError("in the middle")
        x = self.drop(self.lin(x)) @ self.table
        return x * 2 if (self.training if self.reads else self.flag) else x


def peak(function):
    """Most bytes that tensors held at one moment, above those at the start: every allocation is counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    events = record.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(bytes for _, bytes in changes)), result


@pytest.mark.parametrize(
    "options",
    [{}, {"raises": True}, {"raises": False}, {"cyclic": True}, {"copyable": False}, {"flag": False}],
    ids=str,
)
def test_one_copy_at_a_time(options, single_thread):
    model = Large(**options)
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    mp.probe(nn.Linear(2, 2), torch.ones(1, 2))  # what is imported and cached on first use is not counted
    bytes, report = peak(lambda: mp.probe(model, torch.randn(1, 512), progress=False))
    assert report.effect == "differs"
    assert 0.9 * size < bytes < 1.1 * size

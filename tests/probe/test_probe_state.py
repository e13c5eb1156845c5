"""The user's model and random states are afterwards what they were, whatever the model does."""

import random
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import modeprobe as mp

pytestmark = pytest.mark.rung("reference")


class Nasty(nn.Module):
    """Writes to whatever it can reach, and raises in a chosen mode."""

    def __init__(self, raises=None, captured=False):
        super().__init__()
        self.norm, self.lin, self.drop = nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.held = [nn.Dropout(0.3)]
        self.log, self.cache, self.raises = [], {"last": None}, raises
        self.act = (lambda x: self.drop(x) + self.norm.running_mean) if captured else nn.ReLU()

    def forward(self, x):
        self.calls += 1
        self.log.append(float(x.sum()))
        self.cache["last"] = x
        self.new = x
        with torch.no_grad():
            self.lin.weight.mul_(1.01)
        self.lin.bias.requires_grad_(False)
        random.random(), np.random.rand()  # noqa: NPY002 - the global stream is what must come back
        x.mul_(2)
        if self.training is self.raises:
            raise RuntimeError("in the middle")
        return self.act(self.held[0](self.drop(self.lin(self.norm(x)))))


def fingerprint(model):
    state = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    identity = [id(t) for t in (*model.parameters(), *model.buffers())]
    flags = [(name, module.training) for name, module in model.named_modules()]
    grads = [
        (p.requires_grad, id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]
    hooks = [
        (list(m._forward_hooks.items()), list(m._forward_pre_hooks.items()), list(m._backward_hooks.items()))
        for m in model.modules()
    ]
    keys = [sorted(m.__dict__) for m in model.modules()]
    return state, identity, flags, grads, hooks, keys


def same(a, b):
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])
    assert (a[1], a[2], a[4], a[5]) == (b[1], b[2], b[4], b[5])
    for one, other in zip(a[3], b[3], strict=True):
        assert one[:2] == other[:2]
        assert (one[2] is None and other[2] is None) or torch.equal(one[2], other[2])


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    raises=st.sampled_from([None, True, False]),
    captured=st.booleans(),
    flags=st.lists(st.booleans(), min_size=6, max_size=6),
    with_grad=st.booleans(),
    gradients=st.booleans(),
)
def test_model_is_bitwise_what_it_was(raises, captured, flags, with_grad, gradients, single_thread):
    model = Nasty(raises, captured)
    for module, flag in zip(model.modules(), flags, strict=False):
        module.training = flag
    if with_grad:
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    model.lin.register_forward_hook(lambda module, args, output: output)
    before, log, cache = fingerprint(model), list(model.log), dict(model.cache)
    x = torch.randn(4, 6)
    kept = x.clone()
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    call, patched = nn.Module.__call__, "training" in nn.Module.__dict__
    report = mp.probe(model, x, gradients=gradients, progress=False)
    same(before, fingerprint(model))
    assert (model.log, model.cache) == (log, cache)
    assert torch.equal(x, kept)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, np.random.get_state(), strict=True))  # noqa: NPY002
    assert nn.Module.__call__ is call
    assert ("training" in nn.Module.__dict__) is patched
    if raises is not None:
        assert {failure.mode for failure in report.failures} == {"train" if raises else "eval"}
        assert all("in the middle" in failure.error for failure in report.failures)


def test_failure_in_one_mode_is_told_with_what_is_known():
    report = mp.probe(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)), torch.randn(1, 3))
    assert report.effect == "differs"
    assert [(f.mode, f.phase) for f in report.failures] == [("train", "forward")]
    assert "Expected more than 1 value per channel" in report.verdict
    assert len(report.batch_norms) == 1


def test_failure_in_both_modes():
    report = mp.probe(nn.Linear(3, 3), torch.randn(2, 5))
    assert (report.effect, report.exit_code) == ("unknown", 3)
    assert {failure.mode for failure in report.failures} == {"train", "eval"}


def test_model_that_cannot_be_copied():
    class Uncopyable(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.lines = nn.Dropout(0.5), (line for line in [])

        def forward(self, x):
            return self.drop(x)

    model = Uncopyable()
    report = mp.probe(model, torch.randn(4, 6))
    assert report.causes == {"module_dropout"}
    assert any("put back" in note for note in report.notes)


def test_what_a_model_holds_is_put_back_where_it_cannot_be_copied():
    class Record:
        __slots__ = ("count", "values")

        def __init__(self):
            self.count, self.values = 0, torch.zeros(2)

    class Holder(nn.Module):
        __slots__ = ("cache",)  # which a deep copy of a module leaves out

        def __init__(self):
            super().__init__()
            self.drop, self.record, self.cache = nn.Dropout(0.5), Record(), torch.zeros(2)
            self.order, self.bytes = OrderedDict(a=1), bytearray(b"a")

        def forward(self, x):
            self.record.count += 1
            self.record.values += 1
            self.cache = self.cache + 1
            self.order["b"] = 2
            self.bytes.append(3)
            return self.drop(x)

    model = Holder()
    assert mp.probe(model, torch.randn(4, 6)).causes == {"module_dropout"}
    assert (model.record.count, model.bytes, list(model.order.items())) == (0, b"a", [("a", 1)])
    assert torch.equal(torch.cat([model.record.values, model.cache]), torch.zeros(4))


def test_interrupted_from_the_keyboard():
    class Interrupted(nn.Module):
        def __init__(self, copyable):
            super().__init__()
            self.lin, self.lines = nn.Linear(6, 6), [] if copyable else (line for line in [])

        def forward(self, x):
            self.lin.weight.data.mul_(2)
            calls.append(1)
            if len(calls) == 11:
                raise KeyboardInterrupt
            return x * 2 if self.training else x

    for copyable in (True, False):
        model, calls = Interrupted(copyable), []
        before = fingerprint(model)
        with pytest.raises(KeyboardInterrupt):
            mp.probe(model, torch.randn(4, 6))
        same(before, fingerprint(model))
        assert "training" not in nn.Module.__dict__


def test_train_that_raises():
    class EvalOnly(nn.Module):
        def train(self, mode=True):
            if mode:
                raise NotImplementedError("in eval mode only")
            return super().train(mode)

        def forward(self, x):
            return x

    model = EvalOnly()
    report = mp.probe(model, torch.randn(4, 6))
    assert [(f.mode, f.phase, f.error) for f in report.failures] == [
        ("train", "train()", "NotImplementedError: in eval mode only")
    ]
    assert "runs in eval mode only" in report.verdict


def test_error_without_text():
    class Silent(Exception):
        def __str__(self):
            raise RuntimeError

    class Model(nn.Module):
        def forward(self, x):
            raise Silent

    assert {failure.error for failure in mp.probe(Model(), torch.ones(1)).failures} == {"Silent"}


def test_mixed_modes_are_told():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6)).train()
    model[0].eval()
    report = mp.probe(model, torch.randn(4, 6))
    assert report.mixed == ["0"]
    assert report.exit_code == 2
    assert not mp.probe(model.train(), torch.randn(4, 6)).mixed


def test_state_changed_by_eval_forward():
    class Rescales(nn.Module):
        def __init__(self, on):
            super().__init__()
            self.lin, self.on = nn.Linear(4, 4), on

        def forward(self, x):
            if not self.training and self.on:
                with torch.no_grad():
                    self.lin.weight.mul_(0.5)
            return self.lin(x)

    report = mp.probe(Rescales(True), torch.randn(2, 4))
    assert [(m.name, m.when, m.kind) for m in report.mutations] == [
        ("lin.weight", "forward in eval mode", "parameter")
    ]
    assert report.exit_code == 2
    assert mp.probe(Rescales(False), torch.randn(2, 4)).mutations == []


def test_state_changed_by_toggling():
    class Merges(nn.Module):
        def __init__(self, on):
            super().__init__()
            self.lin, self.on = nn.Linear(4, 4), on

        def train(self, mode=True):
            if not mode and self.on:
                self.lin.weight.data.add_(1)
            return super().train(mode)

        def forward(self, x):
            return x

    assert [(m.name, m.when) for m in mp.probe(Merges(True), torch.randn(2, 4)).mutations] == [
        ("lin.weight", "eval()")
    ]
    assert mp.probe(Merges(False), torch.randn(2, 4)).mutations == []


@pytest.mark.parametrize("layers", [1, 6])
def test_cost(layers):
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Dropout(0.1)) for _ in range(layers)
            )

        def forward(self, x):
            calls.append(1)
            for block in self.blocks:
                x = x + block(x)
            return x * 2 if self.training else x

    calls = []
    report = mp.probe(Counted(), torch.randn(4, 6))
    assert report.readers == 2 * layers + 1
    assert len(calls) <= 25 + 2 * report.readers
    assert report.causes == {"batch_statistics", "module_dropout", "branch"}


def draws_without_effect(x):
    torch.randn(3), random.random(), torch.rand(()), captured_random(), x * (torch.rand(4, 1) < 0.5)
    return x


def many_effects(x):
    x = F.dropout(x + random.random(), 0.1) * (torch.rand(4, 1) < 0.8)
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1) + captured_random()


captured_random = random.Random.random.__get__(random._inst)  # as after `from random import random`


@pytest.mark.parametrize("in_training", [draws_without_effect, many_effects, lambda x: x * 1.5])
def test_cost_of_a_model_that_is_its_only_reader(in_training):
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.table = nn.BatchNorm1d(6), nn.Embedding(8, 6)

        def forward(self, input_ids):
            calls.append(1)
            x = self.table(input_ids)
            return self.norm(in_training(x) if self.training else x)

        def generate(self, input_ids, max_new_tokens, **options):
            for _ in range(max_new_tokens):
                input_ids = self(input_ids).argmax(-1)
            return input_ids

    calls = []
    report = mp.probe(Counted().eval(), torch.arange(4))
    assert report.readers == 2
    assert len(calls) <= 25 + 2 * report.readers
    assert "batch_statistics" in report.causes


def test_progress_appears_after_two_seconds(monkeypatch, capsys):
    from modeprobe.probe import progress

    mp.probe(nn.Linear(2, 2), torch.ones(1, 2))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    mp.probe(nn.Linear(2, 2), torch.ones(1, 2))
    shown = capsys.readouterr()
    assert "modeprobe" in shown.err
    assert shown.out == ""


def test_step_and_its_errors():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    report = mp.probe(model, step=lambda m: {"loss": m(torch.ones(2, 3)).sum()}, gradients=True)
    assert report.causes == {"module_dropout"}
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        mp.probe("model")
    with pytest.raises(TypeError, match="either inputs or step"):
        mp.probe(model, torch.ones(1), step=lambda m: m)
    with pytest.raises(TypeError, match="step must be callable"):
        mp.probe(model, step=3)


def test_numpy_randomness_that_the_first_forward_loads(monkeypatch):
    class Noisy(nn.Module):
        def forward(self, x):
            import numpy.random

            return x + numpy.random.rand()  # noqa: NPY002 - the global stream

    monkeypatch.delitem(sys.modules, "numpy.random")
    report = mp.probe(Noisy(), torch.randn(4))
    assert (report.effect, report.eval_is_random, report.train_is_reproducible) == ("none", True, True)

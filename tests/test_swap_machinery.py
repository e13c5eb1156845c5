"""What swap and restore do to module objects. Stand-in layers, whose outputs tell that they ran."""

import copy
import functools
import gc
import io
import weakref

import pytest
import torch
from torch import nn

import modeprobe as mp
import modeprobe.nn as ours
from modeprobe.swap import SWAPPED, SwapReport

pytestmark = pytest.mark.rung("reference")


class _Marks:
    backend = None

    def forward(self, input):
        return super().forward(input) + 1000


STAND_INS = {name: type(name, (_Marks, getattr(nn, name)), {"__module__": __name__}) for name in SWAPPED[:-1]}
globals().update(STAND_INS)  # pickle finds a class by its name in its module


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    for name in SWAPPED:
        monkeypatch.delattr(ours, name, raising=False)
    for name, cls in STAND_INS.items():
        monkeypatch.setattr(ours, name, cls, raising=False)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.again = self.norm
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout2d(0.0))])
        self.loose = [self.blocks[0][2]]
        self.head = nn.Dropout(0.0)

    def forward(self, x):
        x = self.again(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.loose[0](x).mean((2, 3)))


def fingerprint(model):
    """Everything that restore must give back, by object identity where there are objects."""
    return [
        (
            path,
            id(module),
            type(module),
            sorted(module.__dict__),
            {key: id(value) for key, value in module.__dict__.items() if not isinstance(value, (int, float))},
            {key: id(value) for key, value in module._parameters.items()},
            {key: id(value) for key, value in module._buffers.items()},
            module.training,
        )
        for path, module in model.named_modules(remove_duplicate=False)
    ]


def swapped_paths(report):
    return {path for item in report.swapped for path in item.paths}


def test_nested_and_shared_modules_are_swapped_in_place():
    model = Net()
    before = {path: id(m) for path, m in model.named_modules(remove_duplicate=False)}
    report = mp.swap(model)
    assert isinstance(report, SwapReport)
    assert swapped_paths(report) == {"norm", "again", "blocks.0.1", "blocks.0.2", "head"}
    assert ("norm", "again") in {item.paths for item in report.swapped}
    assert {path: id(m) for path, m in model.named_modules(remove_duplicate=False)} == before
    assert type(model.norm) is STAND_INS["BatchNorm2d"]
    assert model.again is model.norm
    assert model.loose[0] is model.blocks[0][2]
    assert type(model.loose[0]) is STAND_INS["Dropout2d"]


@pytest.mark.parametrize("name", list(STAND_INS))
def test_a_root_is_swapped(name):
    root = getattr(nn, name)(*([3] if "Norm" in name else [0.25])).eval()
    report = mp.swap(root)
    assert type(root) is STAND_INS[name]
    assert [item.paths for item in report.swapped] == [("",)]
    assert "(the model itself)" in str(report)
    assert mp.restore(root) == 1
    assert type(root) is getattr(nn, name)


@pytest.mark.parametrize("how", ["undo", "restore"])
def test_restore_gives_back_the_same_objects_and_bits(how):
    model = Net()
    model.norm.eval()
    model.norm.weight.requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    model(x)
    before = fingerprint(model)
    state = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    report = mp.swap(model)
    assert fingerprint(model) != before
    assert report.undo() == 4 if how == "undo" else mp.restore(model) == 4
    assert fingerprint(model) == before
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(model(x), twin(x))
    assert mp.restore(model) == 0
    assert report.undo() == 0


def test_the_new_layers_run():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0))
    x = torch.randn(2, 4)
    plain = model(x)
    mp.swap(model)
    assert torch.equal(model(x), plain + 1000)


def test_hooks_of_every_kind_stay_and_run():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    norm, called = model[1], []
    note = lambda what: lambda *args, **kwargs: called.append(what)  # noqa: E731
    norm.register_forward_pre_hook(note("pre"))
    norm.register_forward_pre_hook(note("pre with kwargs"), with_kwargs=True, prepend=True)
    norm.register_forward_hook(note("forward"))
    norm.register_forward_hook(note("always"), always_call=True)
    norm.register_full_backward_pre_hook(note("backward pre"))
    norm.register_full_backward_hook(note("backward"))
    norm.register_state_dict_pre_hook(note("save pre"))
    norm.register_state_dict_post_hook(note("save"))
    norm.register_load_state_dict_pre_hook(note("load pre"))
    norm.register_load_state_dict_post_hook(note("load"))
    norm.weight.register_hook(note("tensor"))
    before = fingerprint(model)

    def run():
        called.clear()
        model(torch.randn(3, 4, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        return list(called)

    on_torch = run()
    assert len(set(on_torch)) == 11
    mp.swap(model)
    assert run() == on_torch
    with pytest.raises(ValueError, match="2D or 3D"):
        norm(torch.randn(3, 4, 5, 6))
    assert called[-1] == "always"
    mp.restore(model)
    assert fingerprint(model) == before
    assert run() == on_torch


def test_optimizer_keeps_stepping_the_same_parameters():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    mp.swap(model)
    before = model.norm.weight.detach().clone()
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.norm.weight, before)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} == held


def test_flags_and_state_dict_are_untouched():
    model = Net().half()
    model.blocks[0].eval()
    flags = [m.training for m in model.modules()]
    state = model.state_dict(keep_vars=True)
    mp.swap(model)
    assert [m.training for m in model.modules()] == flags
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[key] is state[key] for key in state)


@pytest.mark.parametrize("swapped_first", [True, False])
def test_copies_and_pickles(swapped_first):
    model = Net().eval()
    x = torch.randn(2, 3, 8, 8)
    plain = model(x)
    if swapped_first:
        mp.swap(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        if not swapped_first:
            mp.swap(twin)
        assert type(twin.norm) is STAND_INS["BatchNorm2d"]
        assert twin.again is twin.norm
        assert mp.restore(twin) == 4
        assert torch.equal(twin(x), plain)
    assert type(model.norm) is (STAND_INS["BatchNorm2d"] if swapped_first else nn.BatchNorm2d)


def test_settings_of_the_new_class_go_with_restore():
    model = nn.Sequential(nn.Dropout(0.1))
    model[0].mine = "kept"
    mp.swap(model, backend="reference")
    assert model[0].backend == "reference"
    mp.restore(model)
    assert not hasattr(model[0], "backend")
    assert model[0].mine == "kept"


def test_undo_touches_only_its_own_swap():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    inner = mp.swap(model[1])
    outer = mp.swap(model)
    assert [left.reason for left in outer.left] == ["modeprobe's already"]
    assert outer.undo() == 1
    assert type(model[1][0]) is STAND_INS["Dropout"]
    assert inner.undo() == 1
    assert type(model[1][0]) is nn.Dropout


def test_layers_built_from_modeprobe_are_not_restored():
    model = nn.Sequential(STAND_INS["Dropout"](0.1), nn.Dropout(0.1))
    mp.swap(model)
    assert mp.restore(model) == 1
    assert [type(m) for m in model] == [STAND_INS["Dropout"], nn.Dropout]


def test_the_report_holds_no_model_alive():
    model = nn.Sequential(nn.Dropout())
    report, dropout = mp.swap(model), weakref.ref(model[0])
    del model
    gc.collect()
    assert dropout() is None
    assert report.undo() == 0


class Mine(nn.Dropout):
    def forward(self, x):
        return x * 2


def _parametrized():
    module = nn.BatchNorm1d(4)
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    return module


def _overridden():
    module = nn.Dropout(0.5)
    module.forward = functools.partial(nn.Dropout.forward, module)
    return module


LEFT = {
    "subclass": (lambda: Mine(), "a subclass of Dropout"),
    "parametrized": (_parametrized, "parametrized"),
    "overridden forward": (_overridden, "overridden on the instance"),
    "scripted": (lambda: torch.jit.script(nn.Dropout(0.5)), "scripted or traced"),
    "lazy": (lambda: nn.LazyBatchNorm1d(), "run one forward pass"),
    "no counterpart": (lambda: nn.SyncBatchNorm(4), "no layer of this type"),
    "attention": (lambda: nn.MultiheadAttention(4, 2, dropout=0.1), "dropout=0.1 is inside"),
    "recurrent": (lambda: nn.LSTM(4, 4, 2, dropout=0.25), "dropout=0.25 is inside"),
}


@pytest.mark.parametrize("case", list(LEFT))
def test_what_is_left_says_why(case):
    make, reason = LEFT[case]
    model = nn.Sequential(nn.Linear(4, 4), make())
    cls, keys = type(model[1]), set(model[1].__dict__)
    report = mp.swap(model)
    assert type(model[1]) is cls
    assert set(model[1].__dict__) == keys
    assert not report.swapped
    assert [left.paths for left in report.left] == [("1",)]
    assert reason in report.left[0].reason
    assert reason in str(report)


def test_a_lazy_layer_is_swapped_after_its_first_forward():
    model = nn.Sequential(nn.LazyBatchNorm1d())
    model(torch.randn(3, 4))
    assert [item.kind for item in mp.swap(model).swapped] == ["BatchNorm1d"]


def test_other_layers_are_not_mentioned():
    report = mp.swap(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.LSTM(2, 2), nn.InstanceNorm1d(2)))
    assert not report.swapped
    assert not report.left
    assert str(report) == "0 modules swapped, 0 left as they were"


@pytest.mark.parametrize("compiled", ["torch.compile(model)", "model.compile()"])
def test_a_compiled_model_sees_both_ways(compiled):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0))
    x = torch.randn(2, 4)
    if compiled == "model.compile()":
        model.compile(backend="eager")
        runner = model
    else:
        runner = torch.compile(model, backend="eager")
    plain = runner(x)
    assert [item.kind for item in mp.swap(runner).swapped] == ["Dropout"]
    assert torch.equal(runner(x), plain + 1000)
    assert mp.restore(runner) == 1
    assert torch.equal(runner(x), plain)


def test_restore_refuses_a_class_it_does_not_know_and_changes_nothing():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4))
    report = mp.swap(model)
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())
    for put_back in (functools.partial(mp.restore, model), report.undo):
        with pytest.raises(RuntimeError, match="remove_parametrizations"):
            put_back()
        assert type(model[0]) is STAND_INS["Dropout"]
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    assert mp.restore(model) == 2
    assert type(model[1]) is nn.BatchNorm1d


def test_an_interrupted_swap_changes_nothing(monkeypatch):
    class Unfit(nn.BatchNorm1d):
        __slots__ = ("extra",)  # another memory layout: Python refuses the change of class

    monkeypatch.setattr(ours, "BatchNorm1d", Unfit)
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4))
    before = fingerprint(model)
    with pytest.raises(TypeError, match="layout"):
        mp.swap(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("function", [mp.swap, mp.restore])
@pytest.mark.parametrize("model", [None, nn.Linear, [nn.Dropout()]])
def test_not_a_module(function, model):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got builtins\."):
        function(model)


def test_a_wrong_backend_changes_nothing(monkeypatch):
    monkeypatch.setattr("modeprobe.ops.backend._interpreting", lambda: False)
    model = Net()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="backend must be None or one of auto, native"):
        mp.swap(model, backend="cuda")
    with pytest.raises(RuntimeError, match="'triton' cannot be used on 'cpu' tensors"):
        mp.swap(model, backend="triton")
    assert fingerprint(model) == before


def test_a_model_on_meta_is_swapped():
    with torch.device("meta"):
        model = Net()
    report = mp.swap(model, backend="native")
    assert len(report.swapped) == 4
    assert report.backends == {}


def test_the_report_reads_well():
    model = nn.Sequential(*[nn.BatchNorm1d(2) for _ in range(6)], nn.Dropout(), Mine())
    report = mp.swap(model, backend="reference")
    assert str(report).splitlines() == [
        "7 modules swapped, 1 left as they were",
        "  BatchNorm1d     6  0, 1, 2, 3 and 2 more",
        "  Dropout         1  6",
        "left:",
        "  7: Mine, a subclass of Dropout, whose forward may differ",
        "backend: reference on cpu",
        "undo: report.undo() or modeprobe.restore(model)",
    ]
    assert repr(report) == "<SwapReport: 7 modules swapped, 1 left as they were>"
    assert report.as_dict()["left"] == [
        {"paths": ["7"], "kind": "Mine", "reason": "a subclass of Dropout, whose forward may differ"}
    ]

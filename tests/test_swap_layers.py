"""Swapped models with modeprobe's own layers: same semantics, and bitwise back."""

import copy
import io

import pytest
import torch
from torch import nn

import modeprobe as mp
import modeprobe.nn as ours
from modeprobe.ops import backend as backends
from modeprobe.swap import SWAPPED

pytestmark = pytest.mark.rung("reference")

NAMES = [name for name in SWAPPED if name != "SyncBatchNorm"]
DROPOUTS = [name for name in NAMES if "Dropout" in name]
NORMS = [name for name in NAMES if "Norm" in name]
SHAPES = {"1d": (6, 4, 8), "2d": (6, 4, 5, 5), "3d": (6, 4, 3, 4, 5)}


def layer(name, module=nn):
    return getattr(module, name)(4 if "Norm" in name else 0.5)


def sample(name):
    return torch.randn(SHAPES.get(name[-2:], (6, 4, 8)))


def everything(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("name", NAMES)
def test_restored_is_bitwise_what_it_was(name):
    model = nn.Sequential(nn.Identity(), layer(name))
    x = sample(name)
    model(x)
    model[1].register_forward_hook(lambda *_: None)
    state, tensors = copy.deepcopy(model.state_dict()), everything(model)
    keys = {path: dict(module.__dict__) for path, module in model.named_modules()}
    twin = copy.deepcopy(model)
    report = mp.swap(model)
    assert type(model[1]) is getattr(ours, name)
    assert isinstance(model[1], getattr(nn, name))
    assert [left.kind for left in report.left] == []
    report.undo()
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == keys
    assert all(a is b for a, b in zip(everything(model), tensors, strict=True))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for mode in (True, False):
        outputs = []
        for each in (model, twin):
            torch.manual_seed(3)
            outputs.append(each.train(mode)(x))
        assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(everything(model), everything(twin), strict=True))


@pytest.mark.parametrize("name", NORMS)
def test_a_swapped_norm_does_what_torchs_does(name):
    torchs = nn.Sequential(layer(name))
    nn.init.uniform_(torchs[0].weight)
    swapped = copy.deepcopy(torchs)
    mp.swap(swapped)
    exact = copy.deepcopy(torchs).double()
    x = sample(name)
    upstream = torch.randn_like(x)
    for mode in (True, True, False):
        outputs, gradients = [], []
        for model in (torchs, swapped, exact):
            data = x.detach().to(model[0].weight.dtype).requires_grad_()
            output = model.train(mode)(data)
            model.zero_grad()
            (output * upstream).sum().backward()
            outputs.append(output.detach())
            gradients.append([data.grad, model[0].weight.grad, model[0].bias.grad])
        for theirs, mine, truth in zip(
            [outputs[0], *gradients[0], *everything(torchs)],
            [outputs[1], *gradients[1], *everything(swapped)],
            [outputs[2], *gradients[2], *everything(exact)],
            strict=True,
        ):
            allowed = 2 * (theirs.double() - truth).abs().max() + 2e-7 * truth.double().abs().max()
            assert (mine.double() - truth).abs().max() <= allowed
    assert swapped[0].num_batches_tracked == 2


@pytest.mark.parametrize("name", DROPOUTS)
def test_a_swapped_dropout_drops_and_keeps_the_mean(name):
    model = nn.Sequential(layer(name))
    mp.swap(model)
    x = sample(name).repeat(64, *[1] * (sample(name).dim() - 1))
    assert torch.equal(model.eval()(x), x)
    assert model[0].p == 0.5
    y = model.train()(x)
    assert not torch.equal(y, x)
    model[0].p = 0.0
    torch.testing.assert_close(model(x), x)


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_state_dicts(name):
    model = nn.Sequential(layer(name))
    plain = copy.deepcopy(model)
    mp.swap(model)
    model(sample(name))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(twin[0]) is getattr(ours, name)
        assert all(torch.equal(a, b) for a, b in zip(everything(twin), everything(model), strict=True))
        twin(sample(name))
        assert mp.restore(twin) == 1
        twin(sample(name))
    assert list(plain.state_dict()) == list(model.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(everything(plain), everything(model), strict=True))


def network():
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout2d(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))


def test_an_optimizer_made_before_swap_trains_the_swapped_model():
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    mp.swap(model)
    x, target = torch.randn(16, 1, 8, 8), torch.randn(16, 8)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    before = model.eval()(x)
    mp.restore(model)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.SiLU(), nn.GELU(), nn.GELU("tanh")]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_fused_layers_compute_what_they_did_apart(activation):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), activation, nn.Dropout(0.0), nn.Flatten())
    nn.init.uniform_(model[1].weight, -1, 1)
    apart = copy.deepcopy(model)
    report = mp.swap(model, fuse=True)
    assert report.fused == (("1", "2", "3"),)
    assert "fused: 1 + 2 + 3" in str(report)
    x = torch.randn(3, 1, 8, 8)
    for mode in (True, False):
        outputs = [each.train(mode)(x) for each in (model, apart)]
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
        for each, output in zip((model, apart), outputs, strict=True):
            each.zero_grad()
            output.square().sum().backward()
        for mine, theirs in zip(model.parameters(), apart.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    normalised = model[1](model[0](x))
    assert torch.equal(model[2](normalised), normalised)
    assert mp.restore(model) == 3
    assert [type(module) for module in model] == [type(module) for module in apart]
    assert [sorted(module.__dict__) for module in model] == [sorted(module.__dict__) for module in apart]
    torch.testing.assert_close(model(x), apart(x), rtol=1e-5, atol=1e-6)


def test_a_fused_dropout_keeps_its_own_p_and_mode():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))
    x = torch.randn(512, 4)
    mp.swap(model, fuse=True)
    dropped = lambda: (model(x) == 0).float().mean().item()  # noqa: E731
    assert dropped() == pytest.approx(0.75, abs=0.1)
    model[2].eval()
    assert dropped() == pytest.approx(0.5, abs=0.1)
    model[2].train().p = 1.0
    assert dropped() == 1.0
    twin = copy.deepcopy(model)
    twin[2].p = 0.0
    assert dropped() == 1.0
    assert (twin(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert mp.restore(twin[0]) == 3  # the three belong together
    assert [type(module) for module in twin] == [nn.BatchNorm1d, nn.ReLU, nn.Dropout]


def watched(model, x, wide):
    """What hooks of every kind, registered on each layer or on all modules, see of a run of `model`."""
    seen = []

    def forward(module, inputs, output):
        seen.extend((inputs[0].clone(), output.clone()))

    def backward(module, of_inputs, of_outputs):
        seen.extend((of_inputs[0], of_outputs[0]))

    everywhere = nn.modules.module
    handles = []
    for layer in [None] if wide else model:
        on = everywhere if layer is None else layer
        prefix = "register_module" if layer is None else "register"
        handles += [
            getattr(on, f"{prefix}_forward_pre_hook")(lambda module, inputs: seen.append(inputs[0].clone())),
            getattr(on, f"{prefix}_forward_hook")(forward),
            getattr(on, f"{prefix}_full_backward_hook")(backward),
        ]
    model.zero_grad()
    (model(x) - 1).pow(3).sum().backward()
    for handle in handles:
        handle.remove()
    return [*seen, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("wide", [False, True], ids=["hooks of the layers", "hooks of all modules"])
def test_hooks_registered_after_fusing_see_every_layer(wide):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Dropout(0.0))
    apart = copy.deepcopy(model)
    x = torch.randn(8, 4, requires_grad=True)
    assert mp.swap(model, fuse=True).fused
    mine, theirs = watched(model, x, wide), watched(apart, x, wide)
    assert len(mine) > 4 * 5
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    doubling = [
        each[2].register_forward_hook(lambda module, inputs, output: output * 2) for each in (model, apart)
    ]
    torch.testing.assert_close(model(x), apart(x))
    for handle in doubling:
        handle.remove()
    assert torch.equal(model[1](model[0](x)), model(x))  # in one pass again


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def overridden(module):
    module.forward = module.forward  # on the instance, as accelerate's hooks do
    return module


SHARED = nn.ReLU()


@pytest.mark.parametrize(
    ("layers", "fused"),
    {
        "nothing follows": ([nn.BatchNorm1d(4)], ()),
        "another layer follows": ([nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ReLU()], ()),
        "an unknown activation": ([nn.BatchNorm1d(4), nn.Hardswish()], ()),
        "a hook on the norm": ([hooked(nn.BatchNorm1d(4)), nn.ReLU()], ()),
        "a hook on the activation": ([nn.BatchNorm1d(4), hooked(nn.ReLU())], ()),
        "a hook on the dropout": ([nn.BatchNorm1d(4), nn.ReLU(), hooked(nn.Dropout())], (("0", "1"),)),
        "a shared activation": ([nn.BatchNorm1d(4), SHARED, nn.Linear(4, 4), SHARED], ()),
        "a forward of its own": ([nn.BatchNorm1d(4), overridden(nn.ReLU())], ()),
        "channel dropout": ([nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout1d()], (("0", "1"),)),
        "dropout alone": ([nn.BatchNorm1d(4), nn.Dropout()], ()),
    }.values(),
    ids=lambda value: None,
)
def test_what_is_not_fused(layers, fused):
    model = copy.deepcopy(nn.Sequential(*layers))
    kinds = [type(module) for module in model]
    assert mp.swap(model, fuse=True).fused == fused
    model(torch.randn(6, 4) if not any(isinstance(m, nn.Dropout1d) for m in model) else torch.randn(6, 4, 3))
    mp.restore(model)
    assert [type(module) for module in model] == kinds


def test_a_container_with_its_own_forward_is_not_fused():
    class Backwards(nn.Sequential):
        def forward(self, x):
            return self[0](self[1](x))

    assert mp.swap(Backwards(nn.BatchNorm1d(4), nn.ReLU()), fuse=True).fused == ()
    assert mp.swap(overridden(nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())), fuse=True).fused == ()


def test_a_swapped_model_compiles_into_one_graph():
    model = network()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 1, 8, 8)
    mp.swap(model.eval())
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    model.train()
    tracked = model[1].running_mean.clone() if hasattr(model[1], "running_mean") else None
    compiled(x).sum().backward()
    assert tracked is None or not torch.equal(model[1].running_mean, tracked)
    mp.restore(model.eval())
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_chosen_for_a_model_is_used(name, monkeypatch):
    honest, used = backends.resolve, []

    def spy(device_type):
        used.append(honest(device_type))
        return used[-1]

    monkeypatch.setattr(backends, "resolve", spy)
    model = nn.Sequential(layer(name))
    report = mp.swap(model, backend="reference")
    assert report.backends == {"cpu": "reference"}
    used.clear()
    model(sample(name))
    assert set(used) == {"reference"}
    mp.restore(model)
    mp.swap(model)
    used.clear()
    model(sample(name))
    assert "reference" not in used  # the choice was the first swap's; the default may take a shorter way


def test_the_probe_sees_through_a_swap():
    model = network()
    x = torch.randn(4, 1, 8, 8)
    before = mp.probe(model, x)
    mp.swap(model)
    after = mp.probe(model, x)
    assert (after.effect, after.train_is_random, after.eval_is_random) == ("differs", True, False)
    assert after.causes == before.causes


def test_a_buffer_of_ours_alone_is_seen():
    norm = ours.BatchNorm1d(4, nonfinite="skip")
    norm(torch.full((3, 4), torch.nan))
    assert norm.skipped_batches == 1
    assert list(norm.state_dict()) == list(nn.BatchNorm1d(4).state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_converted_after_the_swap_runs_on_torch_again(dtype):
    model = nn.Sequential(nn.BatchNorm1d(4))
    mp.swap(model)
    model.to(dtype)
    assert model[0].running_var.dtype == torch.float32
    mp.restore(model)
    assert model[0].running_var.dtype == dtype
    x = torch.randn(8, 4, dtype=dtype)
    assert model(x).dtype == model.eval()(x).dtype == dtype


def test_dtypes_that_differed_before_the_swap_are_left_alone():
    model = nn.Sequential(nn.BatchNorm1d(4))
    model[0].weight.data = model[0].weight.data.bfloat16()
    mp.swap(model)
    mp.restore(model)
    assert model[0].running_var.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")  # torch.jit warns of everything it cannot follow
@pytest.mark.parametrize("fuse", [False, True])
def test_traces(fuse):
    """torch.fx takes swapped layers as calls, as torch's; torch.jit records their operators."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
    expected = [node.op for node in torch.fx.symbolic_trace(model).graph.nodes]
    mp.swap(model, fuse=fuse)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == expected
    x = torch.randn(2, 3, 5, 5)
    model(x)
    assert torch.equal(traced.eval()(x), model.eval()(x))
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(model, x)(x), model(x))

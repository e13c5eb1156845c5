"""The short way of the commonest layers: who takes it, and that nothing can be told from the long one."""

import pytest
import torch

import modeprobe as mp
from modeprobe.nn.batch_norm import _BatchNorm
from modeprobe.ops import backend

pytestmark = [
    pytest.mark.rung("reference"),
    pytest.mark.skipif(not backend._on_cpu, reason="no compiled kernels for the CPU"),
]


def layer(**options):
    return mp.nn.BatchNorm2d(3, **options)


ORDINARY = {
    "training": layer,
    "evaluation": lambda: layer().eval(),
    "bfloat16": lambda: layer().bfloat16(),
    "no affine": lambda: layer(affine=False),
    "frozen affine": lambda: layer().requires_grad_(False),
    "momentum=None": lambda: layer(momentum=None),
}
UNUSUAL = {
    "activation": lambda: layer(activation="relu"),
    "dropout": lambda: layer(dropout_p=0.5),
    "no buffers": lambda: layer(track_running_stats=False),
    "frozen": lambda: layer(statistics="frozen"),
    "skip": lambda: layer(nonfinite="skip"),
    "weight only": lambda: layer(bias=False),
}


@pytest.mark.parametrize("name", [*ORDINARY, *UNUSUAL])
def test_who_takes_the_short_way(monkeypatch, name):
    module = (ORDINARY | UNUSUAL)[name]()
    dtype = torch.float32 if module.weight is None else module.weight.dtype
    x = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=module.training)
    long, taken = _BatchNorm._batch_norm, []
    monkeypatch.setattr(_BatchNorm, "_batch_norm", lambda *args: taken.append(1) or long(*args))
    with torch.set_grad_enabled(module.training):
        module(x)
    assert bool(taken) is (name in UNUSUAL)
    with mp.backend("reference"):
        module(x)
    assert len(taken) == 1 + (name in UNUSUAL)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "affine"])
def test_gradients_of_the_two_ways_are_the_same_bits(monkeypatch, frozen):
    def gradients():
        torch.manual_seed(0)
        module, x = layer(), torch.randn(2, 3, 4, 4)
        torch.nn.init.normal_(module.weight)
        every = {"x": x, "weight": module.weight, "bias": module.bias}
        wanted = [t.requires_grad_() for name, t in every.items() if name != frozen]
        if frozen == "affine":
            wanted = [x]
            module.requires_grad_(False)
        y = module(x)
        once = torch.autograd.grad(y, wanted, torch.randn_like(y), create_graph=True)
        found = [y, *once, *module.buffers()]
        if frozen != "x":  # in weight and bias alone, the layer is linear
            total = sum(g.square().sum() for g in once)
            found += filter(lambda t: t is not None, torch.autograd.grad(total, wanted, allow_unused=True))
        return found

    short = gradients()
    monkeypatch.setattr(_BatchNorm, "_plain", lambda *args: None)
    for mine, expected in zip(short, gradients(), strict=True):
        assert torch.equal(mine, expected)


FAULTS = {
    "weight float64": lambda m: setattr(m, "weight", torch.nn.Parameter(m.weight.double())),
    "bias float64": lambda m: setattr(m, "bias", torch.nn.Parameter(m.bias.double())),
    "weight long": lambda m: setattr(m, "weight", torch.nn.Parameter(torch.ones(4))),
    "weight 2-D": lambda m: setattr(m, "weight", torch.nn.Parameter(torch.ones(3, 1))),
    "mean on meta": lambda m: setattr(m, "running_mean", m.running_mean.to("meta")),
    "count on meta": lambda m: setattr(m, "num_batches_tracked", m.num_batches_tracked.to("meta")),
    "weight on meta": lambda m: setattr(m, "weight", torch.nn.Parameter(m.weight.to("meta"))),
    "mean short": lambda m: setattr(m, "running_mean", torch.zeros(2)),
    "variance float64": lambda m: setattr(m, "running_var", m.running_var.double()),
    "variance missing": lambda m: setattr(m, "running_var", None),
    "mean with gradient": lambda m: m.running_mean.requires_grad_(),
    "count of float": lambda m: setattr(m, "num_batches_tracked", torch.zeros(())),
    "eps": lambda m: setattr(m, "eps", 0.0),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("x", [torch.ones(2, 3, 2, 2), torch.ones(1, 3, 1, 1)], ids=["many", "one"])
def test_faults_are_told_as_by_the_long_way(monkeypatch, name, x):
    def told():
        module = layer()
        FAULTS[name](module)
        with pytest.raises(Exception) as caught:
            module(x)
        return caught.type, str(caught.value)

    short = told()
    monkeypatch.setattr(_BatchNorm, "_plain", lambda *args: None)
    assert short == told()

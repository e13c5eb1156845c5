"""Activation, residual and dropout in the same pass, against the same in torch's float64."""

import itertools

import pytest
import torch
from support.batch_norm import assert_as_good, sample
from torch.nn import functional as F

import modeprobe as mp
from modeprobe import functional as MF
from modeprobe import reference

pytestmark = pytest.mark.rung("reference")

ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}


def leaves(shape, dtype, layout, residual):
    g = torch.Generator().manual_seed(3)
    wide = reference.accumulate_dtype(torch.empty(0, dtype=dtype))
    tensors = {
        "x": sample(shape, dtype, layout=layout),
        "weight": torch.rand(shape[1], generator=g).to(wide) + 0.5,
        "bias": torch.randn(shape[1], generator=g).to(wide),
    }
    if residual:
        tensors["residual"] = sample(shape, dtype, seed=5, mean=0, layout=layout)
    return tensors


def run(tensors, grad, function):
    own = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
    own["x"] = tensors["x"].detach().requires_grad_()
    y = function(own)
    y.backward(grad)
    return {"output": y} | {f"grad_{name}": t.grad for name, t in own.items()}


def composition(activation, training, kept=None, p=0.0):
    def function(t):
        mean, var = torch.full_like(t["bias"], 0.3), torch.full_like(t["bias"], 2.0)
        z = F.batch_norm(t["x"], mean, var, t["weight"], t["bias"], training)
        if "residual" in t:
            z = z + t["residual"]
        y = ACTIVATIONS[activation](z)
        return y if kept is None else torch.where(kept, y / (1 - p), 0.0)

    return function


def fused(activation, training, key=None, p=0.0):
    def function(t):
        mean, var = torch.full_like(t["bias"], 0.3), torch.full_like(t["bias"], 2.0)
        return MF.batch_norm(
            t["x"],
            mean,
            var,
            t["weight"],
            t["bias"],
            training,
            activation=activation,
            negative_slope=0.2,
            residual=t.get("residual"),
            dropout_p=p,
            key=key,
        )

    return function


CASES = list(itertools.product(ACTIVATIONS, [False, True], [0.0, 0.3], [True, False]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 5, 7, 7), (8, 24, 12, 12), (9, 33)], ids=str)
def test_epilogues(shape, layout):
    grad = sample(shape, seed=7)
    key = mp.mask.key(11, 3)
    mask = reference.kept(sample(shape, layout=layout), key, 0.3)
    for activation, residual, p, training in CASES:
        tensors = leaves(shape, torch.float32, layout, residual)
        kept = mask if p else None
        wide = {name: t.double() for name, t in tensors.items()}
        truth = run(wide, grad.double(), composition(activation, training, kept, p))
        own = run(tensors, grad, composition(activation, training, kept, p))
        mine = run(tensors, grad, fused(activation, training, key, p))
        for name, value in mine.items():
            label = f"{activation} residual={residual} p={p} training={training} {name}"
            assert_as_good(label, value, own[name], truth[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_epilogue_dtypes(dtype):
    shape = (6, 5, 7, 7)
    grad = sample(shape, dtype, seed=7)
    for activation, residual, _, training in CASES:
        tensors = leaves(shape, dtype, "contiguous", residual)
        own = run(tensors, grad, composition(activation, training))
        mine = run(tensors, grad, fused(activation, training))
        if dtype == torch.float64:
            for name, value in mine.items():
                torch.testing.assert_close(value, own[name], rtol=1e-12, atol=1e-12)
            continue
        wide = {name: t.double() for name, t in tensors.items()}
        truth = run(wide, grad.double(), composition(activation, training))
        for name, value in mine.items():
            assert_as_good(f"{activation} {residual} {name}", value, own[name], truth[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_saved(activation, with_residual, p, training):
    """What the backward pass recomputes is not saved: bits alone where that would take the residual."""
    kept = []
    x, residual = sample((4, 3, 8, 8)).requires_grad_(), sample((4, 3, 8, 8)).requires_grad_()
    weight, bias = (torch.rand(3, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = MF.batch_norm(
            x, torch.zeros(3), torch.ones(3), weight, bias, training, activation=activation,
            residual=residual if with_residual else None, dropout_p=p,
        )  # fmt: skip
    statistics, key, bits = 2 * 3 * 4, 2 * 8, x.numel() // 8
    expected = [x.nbytes, statistics, weight.nbytes] + [key] * bool(p)
    if with_residual and activation in ("relu", "leaky_relu"):
        expected += [bits]
    elif activation is not None:
        expected += [bias.nbytes] + [residual.nbytes] * with_residual
    assert sorted(t.nbytes for t in kept) == sorted(expected)
    assert not any(t.data_ptr() == y.data_ptr() for t in kept)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_frozen_evaluation_saves_no_input(activation):
    kept = []
    x = sample((4, 3, 8, 8)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = MF.batch_norm(x, torch.zeros(3), torch.ones(3), torch.ones(3), activation=activation)
    assert any(t.data_ptr() == x.data_ptr() for t in kept) == (activation == "relu")
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_gradient_of_the_residual_alone(activation):
    residual = sample((4, 3, 8, 8)).requires_grad_()
    MF.batch_norm(
        sample((4, 3, 8, 8), seed=1), None, None, training=True, activation=activation, residual=residual
    ).sum().backward()
    z = F.batch_norm(sample((4, 3, 8, 8), seed=1), None, None, training=True) + residual.detach()
    z.requires_grad_()
    ACTIVATIONS[activation](z).sum().backward()
    torch.testing.assert_close(residual.grad, z.grad)


def test_nan_passes_the_rectifier():
    x = torch.tensor([[float("nan")], [-1.0], [2.0]])
    y = MF.batch_norm(x, torch.zeros(1), torch.ones(1), activation="relu", eps=0.0)
    assert y[0].isnan()
    assert torch.equal(y[1:], torch.tensor([[0.0], [2.0]]))


def test_modules_with_options():
    bn = mp.nn.BatchNorm2d(4, activation="leaky_relu", negative_slope=0.3, dropout_p=0.5, nonfinite="skip")
    assert "leaky_relu" in repr(bn)
    x = sample((3, 4, 5, 5))
    residual = sample((3, 4, 5, 5), seed=9)
    torch.manual_seed(5)
    y = bn(x, residual)
    assert (y == 0).float().mean() == pytest.approx(0.5, abs=0.1)
    torch.manual_seed(5)
    assert torch.equal(bn(x, residual), y)
    bn.eval()
    torch_bn = torch.nn.BatchNorm2d(4).eval()
    torch_bn.load_state_dict(bn.state_dict())
    torch.testing.assert_close(bn(x, residual), F.leaky_relu(torch_bn(x) + residual, 0.3))


def test_bad_epilogues():
    x = sample((3, 4))
    with pytest.raises(ValueError, match="activation must be one of"):
        MF.batch_norm(x, None, None, training=True, activation="tanh")
    with pytest.raises(ValueError, match="activation must be one of"):
        mp.nn.BatchNorm1d(4, activation="tanh")
    with pytest.raises(ValueError, match="residual must have shape"):
        MF.batch_norm(x, None, None, training=True, residual=x[:2])
    with pytest.raises(ValueError, match="dropout_p must be in"):
        MF.batch_norm(x, None, None, training=True, dropout_p=1.5)
    with pytest.raises(ValueError, match="nonfinite must be"):
        mp.nn.BatchNorm1d(4, nonfinite="ignore")

"""Batch normalisation against torch in float64: within twice torch's own error."""

import pytest
import torch
from support.batch_norm import assert_as_good, compare, sample, to_layout
from torch.nn import functional as F

import modeprobe as mp
from modeprobe import functional as MF

pytestmark = pytest.mark.rung("reference")

SHAPES = [
    (4, 16),
    (2, 1),
    (5, 65),
    (300, 130),
    (8193, 3),
    (6, 2048),
    (8, 7, 49),
    (3, 3, 5),
    (1, 64, 9),
    (2, 3, 1, 1),
    (8, 64, 7, 7),
    (1, 7, 13, 11),
    (4, 64, 56, 56),
    (2, 1, 100, 90),
    (33, 5, 2, 2),
    (2, 4, 3, 5, 7),
    (2, 65, 2, 3, 3),
]
LAYOUTS = ["contiguous", "channels_last", "sliced", "misaligned"]


def parameters(channels, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return (
        (torch.rand(channels, generator=g) + 0.5).to(dtype),
        torch.randn(channels, generator=g).to(dtype),
        (torch.randn(channels, generator=g).to(dtype), (torch.rand(channels, generator=g) + 0.5).to(dtype)),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_layouts(shape, layout, training):
    x, grad = sample(shape, layout=layout), sample(shape, seed=1, mean=0.1)
    weight, bias, buffers = parameters(shape[1])
    mine = compare(x, weight, bias, buffers, grad, MF.batch_norm, training=training)
    if layout != "sliced":
        assert mine.y.stride() == x.stride()
        assert mine.x.grad.stride() == x.stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("own_type", [False, True], ids=["float32 parameters", "parameters as input"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, own_type, layout):
    shape = (6, 19, 15, 14)
    weight, bias, buffers = parameters(
        shape[1], dtype if own_type or dtype == torch.float64 else torch.float32
    )
    x, grad = sample(shape, dtype, layout=layout), sample(shape, dtype, seed=1)
    for training in (True, False):
        compare(x, weight, bias, buffers, grad, MF.batch_norm, training=training)


def test_float32_buffers_beside_parameters_of_the_input_type():
    weight, bias, _ = parameters(19, torch.bfloat16)
    buffers = torch.zeros(19), torch.ones(19)
    x, grad = sample((6, 19, 15), torch.bfloat16), sample((6, 19, 15), torch.bfloat16, seed=1)
    compare(x, weight, bias, buffers, grad, MF.batch_norm)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ratio", [1, 1e2, 1e3, 1e4])
def test_large_means(ratio, dtype, layout):
    x = sample((16, 9, 23, 21), dtype, mean=ratio, std=1.0, layout=layout)
    weight, bias, _ = parameters(9, dtype)
    buffers = torch.zeros(9, dtype=dtype), torch.ones(9, dtype=dtype)
    grad = sample((16, 9, 23, 21), dtype, seed=2)
    # torch's float64 error at these means is a matter of luck below the effect of rounding the input.
    slack = ratio * torch.finfo(dtype).eps / 8 if dtype == torch.float64 else 0.0
    mine = compare(x, weight, bias, buffers, grad, MF.batch_norm, momentum=1.0, slack=slack)
    exact = x.double().transpose(0, 1).flatten(1).var(1)
    assert ((mine.var.double() - exact) / exact).abs().max() < 1e-4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_input_has_no_variance(layout):
    x = torch.full((8, 5, 30, 30), 3.7)
    x = to_layout(x, layout)
    mean, var = torch.zeros(5), torch.ones(5)
    y = MF.batch_norm(x, mean, var, training=True, momentum=1.0)
    assert torch.equal(var, torch.zeros(5))
    assert torch.equal(mean, torch.full((5,), 3.7))
    assert torch.equal(y, torch.zeros_like(y))


def test_more_values_than_float32_counts():
    x = torch.zeros(1, 1, (1 << 24) + 9)
    x[..., 0::2] = 1.0
    mean, var = torch.zeros(1), torch.zeros(1)
    weight, bias = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    y = MF.batch_norm(x.requires_grad_(), mean, var, weight, bias, training=True, momentum=1.0)
    n, ones = x.numel(), x.numel() // 2 + 1
    p = ones / n
    assert mean.item() == pytest.approx(p, rel=1e-7)
    assert var.item() == pytest.approx(p * (1 - p) * n / (n - 1), rel=1e-7)
    y.backward(x.detach())
    invstd = (p * (1 - p) + 1e-5) ** -0.5
    assert bias.grad.item() == pytest.approx(ones, rel=1e-7)
    assert weight.grad.item() == pytest.approx(ones * (1 - p) * invstd, rel=1e-6)
    # What is left of the gradient is eps / (variance + eps) of it: the rest cancels.
    of_one = invstd * (1 - p) * (1 - p * (1 - p) * invstd**2)
    assert x.grad[0, 0, 0].item() == pytest.approx(of_one, rel=1e-2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_squares_beyond_float32(layout):
    x = sample((4, 3, 6, 6), std=3e20, mean=0, layout=layout)
    compare(x, None, None, None, sample((4, 3, 6, 6), seed=1), MF.batch_norm)


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "neither"])
@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_absent_tensors(affine, buffers, layout):
    weight, bias, running = parameters(6)
    compare(
        sample((5, 6, 4, 4), layout=layout),
        weight if affine in ("both", "weight") else None,
        bias if affine in ("both", "bias") else None,
        running if buffers else None,
        sample((5, 6, 4, 4), seed=1),
        MF.batch_norm,
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["channels_last", "contiguous", "expanded", "transposed"])
def test_gradient_in_another_layout(layout, kind):
    shape = (4, 6, 10, 10)
    grad = sample(shape, seed=3)
    if kind == "expanded":
        grad = sample((4, 6, 1, 1), seed=3).expand(shape)
    elif kind == "transposed":
        grad = grad.transpose(2, 3)
    else:
        grad = to_layout(grad, kind)
    weight, bias, buffers = parameters(6)
    compare(sample(shape, layout=layout), weight, bias, buffers, grad, MF.batch_norm)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 3), (2, 4, 0), (0, 4, 5, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(shape, training):
    ours, theirs = mp.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
    if len(shape) == 4:
        ours, theirs = mp.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)
    for module in (ours, theirs):
        module.train(training)
        x = torch.zeros(shape, requires_grad=True)
        module(x).sum().backward()
        assert x.grad.shape == shape
        assert not module.weight.grad.any()
        assert not module.bias.grad.any()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("need", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_wanted_of_some(need, training, layout):
    grads = {}
    for function in (MF.batch_norm, F.batch_norm):
        x = sample((4, 6, 5, 5), layout=layout).requires_grad_(bool(need[0]))
        weight, bias, (mean, var) = parameters(6)
        weight.requires_grad_(bool(need[1]))
        bias.requires_grad_(bool(need[2]))
        function(x, mean, var, weight, bias, training).square().sum().backward()
        grads[function] = [x.grad, weight.grad, bias.grad]
    for mine, own in zip(*grads.values(), strict=True):
        if own is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, own)


def test_evaluation_of_many_samples():
    x = sample((70000, 3))
    _, _, (mean, var) = parameters(3)
    truth = F.batch_norm(x.double(), mean.double(), var.double())
    assert_as_good("output", MF.batch_norm(x, mean, var), F.batch_norm(x, mean, var), truth)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_spread_as_in_torch(value, layout):
    x = sample((4, 3, 6, 6), layout=layout)
    x[1, 1, 2, 2] = value
    weight, bias, (mean, var) = parameters(3)
    theirs = F.batch_norm(x, mean.clone(), var.clone(), weight, bias, True)
    y = MF.batch_norm(x, mean, var, weight, bias, True)
    assert torch.equal(y.isnan(), theirs.isnan())
    assert not var[1].isfinite()
    assert var[0].isfinite()
    clean = sample((4, 3, 6, 6))
    MF.batch_norm(clean, mean, var, training=True, momentum=1.0)
    assert var.isfinite().all()
    assert mean.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_outputs_larger_than_caches(layout):
    shape = (5, 33, 171, 171)
    x = sample(shape, layout=layout)
    residual, grad = torch.empty_like(x).normal_(), torch.empty_like(x).normal_()
    results = []
    for function in (
        lambda x, r: F.relu(F.batch_norm(x.double(), None, None, training=True).float() + r),
        lambda x, r: MF.batch_norm(x, None, None, training=True, activation="relu", residual=r),
    ):
        leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
        y = function(*leaves)
        y.backward(grad)
        results.append([y.detach(), leaves[0].grad, leaves[1].grad])
    # Where z is a rounding error away from zero, either side of the rectifier is right.
    torch.testing.assert_close(results[1][0], results[0][0])
    for mine, own in zip(results[1][1:], results[0][1:], strict=True):
        assert ((mine - own).abs() > 1e-4).float().mean() < 1e-6

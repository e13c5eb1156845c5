"""What bad input gets, and any shapes and options against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batch_norm import compare, sample
from torch.nn import functional as F

import modeprobe as mp
from modeprobe import functional as MF

pytestmark = pytest.mark.rung("reference")

X = torch.randn(4, 3, 5)
ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (NotImplementedError, "not implemented for torch.int32", (X.int(), None, None, None, None, True)),
        (NotImplementedError, "torch.complex64", (X.cfloat(), None, None, None, None, True)),
        (IndexError, "must have shape", (X[0, 0], None, None, None, None, True)),
        (RuntimeError, "running_mean should contain 3 elements not 4", (X, torch.ones(4), torch.ones(4))),
        (RuntimeError, "weight should contain 3 elements not 2", (X, ONES, ONES, torch.ones(2))),
        (RuntimeError, "bias must have shape", (X, ONES, ONES, ONES, torch.ones(3, 1))),
        (RuntimeError, "mixed dtype: weight must be torch.float32", (X, ONES, ONES, ONES.double())),
        (RuntimeError, "running_mean must be on the input's device", (X, ONES.to("meta"), ONES)),
        (ValueError, "both be None or neither", (X, ONES, None, None, None, True)),
        (RuntimeError, "must be defined in evaluation mode", (X, None, None)),
        (RuntimeError, "running_var must be defined in evaluation mode", (X, ONES, None)),
        (TypeError, "argument 'input' must be Tensor, not list", ([1.0], ONES, ONES)),
        (ValueError, "eps must be positive", (X, None, None, None, None, True, 0.1, 0.0)),
        (ValueError, "eps must be non-negative", (X, ONES, ONES, None, None, False, 0.1, -1.0)),
        (ValueError, "Expected more than 1 value", (X[:1, :, :1], None, None, None, None, True)),
        (ValueError, "momentum=None", (X, ONES, ONES, None, None, True, None)),
        (RuntimeError, "not differentiable in running_mean", (X, ONES.clone().requires_grad_(), ONES)),
    ],
)
@pytest.mark.parametrize("name", ["native", "reference"])
def test_bad_arguments(error, match, arguments, name):
    with mp.backend(name), pytest.raises(error, match=match):
        MF.batch_norm(*arguments)
    assert torch.equal(ONES, torch.ones(3))


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("num_batches_tracked must be one int64", {"num_batches_tracked": torch.zeros(())}),
        ("skipped_batches must be one int64", {"skipped_batches": torch.zeros(2, dtype=torch.int64)}),
        ("residual must have shape, dtype and device", {"residual": X.double()}),
        ("residual must have shape, dtype and device", {"residual": X.to("meta")}),
        ("key must be", {"dropout_p": 0.5, "key": torch.zeros(2)}),
        ("key must be on the input's device", {"dropout_p": 0.5, "key": mp.mask.key(1).to("meta")}),
    ],
)
def test_bad_options(match, options):
    with pytest.raises((ValueError, TypeError), match=match):
        MF.batch_norm(X, None, None, training=True, **options)


def test_tensor_subclasses_are_given_the_call():
    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function, args, kwargs

    x = torch.Tensor._make_subclass(Seen, X)
    options = {"activation": "leaky_relu", "negative_slope": 0.5, "residual": X, "dropout_p": 0.1}
    options |= {
        "key": ONES,
        "num_batches_tracked": ONES,
        "skipped_batches": ONES,
        "weight": ONES,
        "bias": ONES,
    }
    options |= {"training": True, "momentum": None, "eps": 1e-3}
    assert MF.batch_norm(x, ONES, None, **options) == (MF.batch_norm, (x, ONES, None), options)


def test_sign_bits_of_another_forward():
    tail = (None, 1, 0.01, None, 0.0, torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="sign_bits must be those of the forward pass"):
        torch.ops.modeprobe.batch_norm_backward(
            X, X, torch.ones(2, 3), None, None, True, True, False, False, *tail
        )


def test_bad_module_input():
    for ours, theirs in (
        (mp.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)),
        (mp.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)),
    ):
        for x in (torch.randn(2, 3, 2, 2, 2), torch.randn(1, 3, 1)[..., :1], torch.randn(2, 4, 2, 2)):
            with pytest.raises((ValueError, RuntimeError)) as expected:
                theirs(x)
            with pytest.raises(expected.type) as found:
                ours(x)
            assert str(found.value) == str(expected.value)
            assert ours.num_batches_tracked == 0


@pytest.mark.parametrize("shape", [(4, 0), (0, 0), (4, 0, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_no_channels(shape, training):
    x, none = torch.zeros(shape), torch.zeros(0)
    assert MF.batch_norm(x, none, none, training=training).shape == shape
    for function in (MF.batch_norm, F.batch_norm):
        with pytest.raises(IndexError):
            function(x, none, none, none, none, training)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    channels=st.integers(1, 40),
    spatial=st.lists(st.integers(1, 9), max_size=3),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced", "misaligned"]),
    training=st.booleans(),
    momentum=st.floats(0, 1),
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
    affine=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_option(n, channels, spatial, layout, training, momentum, eps, affine, seed):
    shape = (n + 1, channels, *spatial)
    weight, bias = (torch.rand(channels) + 0.5, torch.randn(channels)) if affine else (None, None)
    compare(
        sample(shape, layout=layout, seed=seed),
        weight,
        bias,
        (torch.randn(channels), torch.rand(channels) + 0.5),
        sample(shape, seed=seed + 1),
        MF.batch_norm,
        training=training,
        momentum=momentum,
        eps=eps,
        # With two values per channel, 1 / std amplifies what rounding does to their difference.
        slack=1e-4 if training and n * len(spatial) < 4 else 1e-6,
    )


def test_reference_backend_agrees():
    x, residual = sample((4, 6, 5, 5)), sample((4, 6, 5, 5), seed=3)
    found = []
    for name in ("native", "reference"):
        leaf, other = x.clone().requires_grad_(), residual.clone().requires_grad_()
        mean, var, count = torch.zeros(6), torch.ones(6), torch.tensor(0)
        with mp.backend(name):
            y = MF.batch_norm(
                leaf, mean, var, torch.ones(6), None, True, None, activation="relu", residual=other,
                dropout_p=0.3, key=mp.mask.key(2), num_batches_tracked=count,
            )  # fmt: skip
            y.pow(2).sum().backward()
        found.append((y, leaf.grad, other.grad, mean, var, count))
    torch.testing.assert_close(found[0], found[1])
    assert F.relu(found[0][0]).equal(found[0][0])

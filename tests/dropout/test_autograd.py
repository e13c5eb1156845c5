"""Derivatives of every order and mode, and torch.func, for the dropout family."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import modeprobe as mp
from modeprobe import _extension, mask
from modeprobe import functional as F

pytestmark = pytest.mark.rung("reference")

KEY = mask.key(5, 6)
BACKENDS = ["native", "reference"] if _extension.loaded() else ["reference"]

FUNCTIONS = {
    "dropout": lambda x: F.dropout(x, 0.3, key=KEY, offset=3),
    "dropout of a tensor p": lambda x: F.dropout(x, torch.tensor(0.3), key=KEY),
    "in place": lambda x: F.dropout(x * 1, 0.3, key=KEY, inplace=True),
    "classic": lambda x: F.dropout(x, 0.3, key=KEY, scaling="classic"),
    "rows": lambda x: F.dropout(x, 0.3, key=KEY, offset=6, mask_shape=(x.shape[0], 1)),
    "dropout1d": lambda x: F.dropout1d(x, 0.3, key=KEY),
    "dropout1d in place": lambda x: F.dropout1d(x * 1, 0.3, key=KEY, inplace=True),
    "drop_path": lambda x: F.drop_path(x, 0.3, key=KEY),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, True, key=KEY, offset=5),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(
        x[..., None].expand(-1, -1, 3), 0.3, True, key=KEY
    ),
    "bias_dropout_add": lambda x: F.bias_dropout_add(x, x[0] * 2, x.sin(), 0.3, key=KEY, offset=7),
    "softmax_dropout": lambda x: F.softmax_dropout(x, 0.3, key=KEY, offset=9),
    "softmax_dropout, mask": lambda x: F.softmax_dropout(x, 0.3, x.detach() > -0.5, key=KEY),
    "softmax_dropout, added": lambda x: F.softmax_dropout(x, 0.3, x[:1].sin(), key=KEY),
}


def example(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with mp.backend(request.param):
        yield


def test_first_derivatives(function):
    gradcheck(
        function,
        example(6, 5),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


def test_second_derivatives(function):
    gradgradcheck(function, example(3, 4), check_fwd_over_rev=True, check_rev_over_rev=True)


def seeded(x):
    torch.manual_seed(3)
    return F.dropout(x, 0.3)


@pytest.mark.parametrize("x", [example(2, 4), example(4, 2).t()], ids=["contiguous", "transposed"])
def test_fresh_keys(x):
    gradcheck(seeded, x, check_forward_ad=True)
    gradgradcheck(seeded, x)
    y, incoming = seeded(x), torch.randn(4, 2, dtype=torch.float64).t()
    for gradient in (incoming, incoming.contiguous()):
        (grad_x,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
        torch.testing.assert_close(grad_x, incoming * seeded(torch.ones_like(x)))


def test_gradients_do_not_depend_on_whether_they_are_differentiated(function):
    x = example(6, 5)
    y = function(x)
    incoming = torch.randn_like(y)
    plain, recorded = (
        torch.autograd.grad(y, x, incoming.clone().requires_grad_(create), True, create)[0]
        for create in (False, True)
    )
    torch.testing.assert_close(recorded, plain)


@pytest.mark.parametrize("name", ["softmax_dropout", "bias_dropout_add"])
def test_curvature(name):
    """Where a gradient meets both the result and what was saved of it."""

    def slope(x):
        return torch.autograd.grad(FUNCTIONS[name](x).pow(3).sum(), x, create_graph=True)[0]

    gradcheck(slope, example(2, 3))


def test_derivatives_by_all_arguments():
    x, bias, residual = example(3, 4), example(4), example(3, 4)
    assert 0 < F.dropout_mask(x.shape, 0.3, KEY).sum() < x.numel()

    def add(*tensors):
        return F.bias_dropout_add(*tensors, 0.3, key=KEY)

    gradcheck(add, (x, bias, residual), check_forward_ad=True)
    gradgradcheck(add, (x, bias, residual))

    def softmax(scores, attended):
        return F.softmax_dropout(scores, 0.3, attended, key=KEY)

    for attended in (example(3, 4), example(1, 4), example(3, 1), example(4)):
        gradcheck(softmax, (x, attended), check_forward_ad=True)
        gradgradcheck(softmax, (x, attended))


@pytest.mark.parametrize("recorded", [False, True])
def test_only_some_arguments_want_gradients(recorded):
    tensors = [torch.randn(6, 5), torch.randn(5), torch.randn(6, 5)]
    weight = torch.randn(6, 5, requires_grad=recorded)

    def gradients(wanted):
        inputs = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(tensors)]
        y = F.bias_dropout_add(*inputs, 0.3, key=KEY)
        found = torch.autograd.grad(y, [inputs[i] for i in wanted], weight, create_graph=recorded)
        return dict(zip(wanted, found, strict=True))

    everything = gradients((0, 1, 2))
    for wanted in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)):
        for i, gradient in gradients(wanted).items():
            torch.testing.assert_close(gradient, everything[i])


def test_forward_and_backward_drop_the_same_elements():
    x = torch.randn(257, 31, requires_grad=True)
    y = F.dropout(x, 0.37)
    y.sum().backward()
    assert torch.equal(y == 0, x.grad == 0)
    assert torch.equal(
        F.dropout(torch.ones(3, 5), 0.5, key=KEY, offset=7), 2.0 * F.dropout_mask((3, 5), 0.5, KEY, 7)
    )


@pytest.mark.parametrize(
    "make_grad",
    [
        lambda y: torch.ones(()).expand_as(y),
        lambda y: torch.rand(y.shape[::-1]).t() + 1,
        lambda y: (torch.rand(y.shape[0], 2 * y.shape[1]) + 1)[:, ::2],
    ],
    ids=["expanded", "transposed", "strided"],
)
def test_gradients_of_any_strides(make_grad):
    """The mask belongs to positions of the forward tensor, whatever the strides of the gradient."""
    for function in (FUNCTIONS["dropout"], FUNCTIONS["rows"], FUNCTIONS["alpha_dropout"]):
        for x in (torch.randn(6, 5), torch.randn(5, 6).t(), torch.randn(6, 10)[:, ::2]):
            x = x.detach().requires_grad_()
            y = function(x)
            incoming = make_grad(y)
            (strided,) = torch.autograd.grad(y, x, incoming, retain_graph=True)
            dense = torch.empty_like(y).copy_(incoming)
            (expected,) = torch.autograd.grad(y, x, dense)
            torch.testing.assert_close(strided, expected)
            kept = function(torch.ones_like(x)) != function(torch.zeros_like(x))
            assert torch.equal(strided != 0, kept)


def test_accumulation_and_set_to_none():
    x = torch.randn(100, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.0)
    F.dropout(x, 0.3, key=KEY).sum().backward()
    first = x.grad.clone()
    F.dropout(x, 0.3, key=KEY).sum().backward()
    assert torch.equal(x.grad, 2 * first)
    optimizer.zero_grad(set_to_none=True)
    F.dropout(x, 0.3, key=KEY).sum().backward()
    assert torch.equal(x.grad, first)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_under_one_key(dim):
    """Each example gets the mask that it would get alone."""
    batch = torch.randn(4, 6, 5, dtype=torch.float64).movedim(0, dim)
    for name, function in FUNCTIONS.items():
        expected = torch.stack([function(x) for x in batch.unbind(dim)])
        torch.testing.assert_close(vmap(function, in_dims=dim)(batch), expected, msg=name)


def test_vmap_over_transposed_examples():
    batch = torch.randn(4, 5, 6).transpose(1, 2)
    for name in ("dropout", "alpha_dropout", "rows"):
        expected = torch.stack([FUNCTIONS[name](x) for x in batch])
        torch.testing.assert_close(vmap(FUNCTIONS[name])(batch), expected)


def test_vmap_over_keys_and_probabilities():
    keys = torch.stack([mask.fold_in(KEY, n) for n in range(3)])
    rates = torch.tensor([0.0, 0.5, 1.0])
    x = torch.randn(8, 9)
    y = vmap(lambda key, p: F.dropout(x, p, key=key))(keys, rates)
    nested = vmap(lambda p: F.dropout(x, p, key=KEY))(rates)
    for b in range(3):
        assert torch.equal(y[b], F.dropout(x, rates[b], key=keys[b]))
        assert torch.equal(nested[b], F.dropout(x, rates[b], key=KEY))


def test_vmap_randomness():
    ones = torch.ones(4, 100)
    same = vmap(lambda x: F.dropout(x, 0.5), randomness="same")(ones)
    assert (same == same[0]).all()
    different = vmap(lambda x: F.dropout(x, 0.5), randomness="different")(ones)
    assert len({tuple(row.tolist()) for row in different}) == 4
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: F.dropout(x, 0.5))(ones)


def test_gradients_per_example():
    batch = torch.randn(4, 6, 5, dtype=torch.float64, requires_grad=True)
    for name, function in FUNCTIONS.items():
        ours = vmap(grad(lambda x, function=function: function(x).square().sum()))(batch.detach())
        (expected,) = torch.autograd.grad(sum(function(x).square().sum() for x in batch), batch)
        torch.testing.assert_close(ours, expected, msg=name)


def test_jacobians_and_hessians():
    x = torch.randn(12)
    slope = FUNCTIONS["dropout"](torch.ones(12))
    for derivative in (jacrev, jacfwd):
        torch.testing.assert_close(derivative(FUNCTIONS["dropout"])(x), slope.diag())
    cubed = hessian(lambda x: FUNCTIONS["dropout"](x).pow(3).sum())(x)
    torch.testing.assert_close(cubed, (6 * slope.pow(3) * x).diag())


def test_forward_mode_of_a_plain_tensor():
    """A dual number without requires_grad keeps its tangent."""
    x, tangent = torch.randn(6, 5), torch.randn(6, 5)
    for name in ("dropout", "alpha_dropout", "dropout1d", "in place"):
        _, ours = jvp(FUNCTIONS[name], (x,), (tangent,))
        slope = FUNCTIONS[name](torch.ones(6, 5)) - FUNCTIONS[name](torch.zeros(6, 5))
        torch.testing.assert_close(ours, slope * tangent)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            _, ours = torch.autograd.forward_ad.unpack_dual(FUNCTIONS[name](dual))
        torch.testing.assert_close(ours, slope * tangent)


def test_in_place_rules_of_autograd():
    leaf = torch.randn(5, requires_grad=True)
    x = leaf * 1
    squared = x.square()
    F.dropout(x, 0.5, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()
    plain = torch.randn(5)
    version = plain._version
    F.dropout(plain, 0.5, inplace=True)
    assert plain._version == version + 1
    with torch.inference_mode():
        inference = F.dropout(torch.randn(5), 0.5, inplace=True)
    with pytest.raises(RuntimeError, match="outside InferenceMode"):
        F.dropout(inference, 0.5, inplace=True)


def refused():
    leaf, cut = torch.ones(20, requires_grad=True), torch.ones(20, requires_grad=True)
    yield "leaf", leaf, leaf
    yield "view of a leaf", cut, cut[:10]
    several = torch.ones(2, 10, requires_grad=True) * 1
    yield "one of several views", several, several.unbind()[0]


@pytest.mark.parametrize(("kind", "whole", "part"), list(refused()), ids=[kind for kind, *_ in refused()])
def test_what_may_not_be_written_stays_as_it_was(kind, whole, part):
    """Torch's rules, asked before anything is written."""
    with pytest.raises(RuntimeError):
        torch.nn.functional.dropout(part, 0.5, inplace=True)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        F.dropout(part, 0.5, inplace=True)
    assert torch.equal(whole, torch.ones_like(whole)), kind


def test_in_place_on_views():
    """The gradient of what a view is cut from, and numbers whose sign is only marked as turned."""
    x, slope = torch.randn(6, 8, requires_grad=True), torch.ones(6, 8)
    y = x * 1
    F.dropout(y[:, 1:4], 0.5, inplace=True, key=KEY)
    slope[:, 1:4] = F.dropout(torch.ones(6, 3), 0.5, key=KEY)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], slope)
    pairs = torch.randn(6, 8, 2)
    turned, expected = torch.view_as_complex(pairs).conj().imag, F.dropout(-pairs[..., 1], 0.5, key=KEY)
    F.dropout(turned, 0.5, inplace=True, key=KEY)
    assert torch.equal(turned, expected)
    assert torch.equal(pairs[..., 1], -expected)

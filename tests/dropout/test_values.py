"""Values of the dropout family against torch's operations in float64, with the mask taken from the key."""

import pytest
import torch

import modeprobe as mp
from modeprobe import _extension, mask
from modeprobe import functional as F

pytestmark = pytest.mark.rung("reference")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ["native", "reference"] if _extension.loaded() else ["reference"]
KEY = (21, 22)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with mp.backend(request.param):
        yield request.param


def assert_as_close_as_torch(ours, torchs, exact):
    """Error at most twice that of torch's own operations in this dtype, plus one unit in the last place.

    In float64 the truth is no more exact than torch: 64 roundings of the largest value are allowed there.
    """
    assert ours.dtype == torchs.dtype
    finfo = torch.finfo(ours.dtype)
    roundings = 64 * exact.abs().max() if ours.dtype == torch.float64 else exact.abs().clamp_min(finfo.tiny)
    theirs = (torchs.double() - exact).abs().max()
    error = (ours.double() - exact).abs()
    assert (error <= 2 * theirs + finfo.eps * roundings).all(), f"error {error.max():.3g}, torch {theirs:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 1 / 3, 0.5, 1 - 1e-7])
def test_dropout(backend, dtype, p):
    key, x = mask.key(*KEY), torch.randn(1000, 33).to(dtype)
    kept = F.dropout_mask(x.shape, p, key)
    y = F.dropout(x, p, key=key)
    assert torch.equal(y == 0, ~kept | (x == 0))
    assert_as_close_as_torch(y, x * kept / (1 - p), x.double() * kept / (1 - p))


@pytest.mark.parametrize("dtype", DTYPES)
def test_classic_scaling(backend, dtype):
    key, x = mask.key(*KEY), torch.randn(1000).to(dtype)
    y = F.dropout(x, 0.3, key=key, scaling="classic")
    assert torch.equal(y, torch.where(F.dropout_mask(x.shape, 0.3, key), x, 0))
    assert torch.equal(F.dropout(x, 0.3, training=False, scaling="classic"), x * 0.7)
    assert torch.equal(
        F.dropout(x, torch.tensor(0.3), training=False, scaling="classic"), x * torch.tensor(0.7).to(dtype)
    )
    z = x.clone()
    assert F.dropout(z, 0.3, training=False, inplace=True, scaling="classic") is z
    assert torch.equal(z, x * 0.7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_elements_are_selected_away(backend, dtype, value):
    """The one deliberate difference from eager torch, where NaN * 0 is NaN and -1 * 0 is -0."""
    key, x = mask.key(*KEY), torch.full((1003,), value, dtype=dtype)
    kept = F.dropout_mask(x.shape, 0.5, key)
    for y in (
        F.dropout(x, 0.5, key=key),
        F.dropout(x.clone(), 0.5, key=key, inplace=True),
        F.dropout(x.view(17, 59), 0.5, key=key, mask_shape=(17, 59)).view(-1),
    ):
        assert not y[~kept].any()
        assert not y[~kept].signbit().any()
        torch.testing.assert_close(y[kept], x[kept] * 2, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("p", [0, 0.0, 1, 1.0])
def test_the_ends(backend, p):
    x = torch.randn(100)
    before = torch.get_rng_state()
    y = F.dropout(x, p)
    assert y is x if p == 0 else not y.any()
    assert torch.equal(before, torch.get_rng_state()) == (p == 0)
    assert F.dropout(x, p, training=False) is x
    assert (F.dropout(x, p, scaling="classic") is x) == (p == 0)
    assert torch.equal(F.dropout(x, torch.tensor(float(p))), x if p == 0 else torch.zeros(100))


def test_empty(backend):
    for shape in [(0,), (3, 0), (0, 4, 5)]:
        x = torch.empty(shape, requires_grad=True)
        y = F.dropout(x, 0.5)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape
        assert F.dropout(x, 0.5, mask_shape=(1,) * len(shape)).shape == shape
        for p in (1.0, torch.tensor(1.0)):
            assert F.dropout(x.detach(), p, inplace=True).shape == shape
    for shape in [(0, 4), (4, 0), (0,)]:
        bias, x = torch.ones(shape[-1], requires_grad=True), torch.empty(shape)
        F.bias_dropout_add(x, bias, x).sum().backward()
        assert torch.equal(bias.grad, torch.zeros(shape[-1]))
    scores = torch.empty(2, 0, requires_grad=True)
    F.softmax_dropout(scores).sum().backward()
    assert scores.grad.shape == (2, 0)


def eager_alpha(x, kept, p):
    """ATen/native/Dropout.cpp, with the mask given."""
    alpha = 1.7580993408473766
    a = 1 / ((alpha**2 * p + 1) * (1 - p)) ** 0.5
    noise = kept.to(x.dtype)
    return x * (noise * a) + ((noise - 1) * (alpha * a) + alpha * a * p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_alpha_dropout(backend, dtype, p):
    key, x = mask.key(*KEY), torch.randn(64, 63).to(dtype)
    kept = F.dropout_mask(x.shape, p, key)
    y = F.alpha_dropout(x, p, True, key=key)
    assert_as_close_as_torch(y, eager_alpha(x, kept, p), eager_alpha(x.double(), kept, p))
    images = x.view(4, 16, 3, 21)
    kept = F.dropout_mask((4, 16), p, key).view(4, 16, 1, 1)
    y = F.feature_alpha_dropout(images, p, True, key=key)
    assert_as_close_as_torch(y, eager_alpha(images, kept, p), eager_alpha(images.double(), kept, p))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_alpha_dropout_keeps_mean_and_variance(backend, p):
    y = F.alpha_dropout(torch.randn(1 << 20), p, True)
    assert abs(y.mean()) < 5e-3
    assert abs(y.var() - 1) < 1e-2


def test_alpha_dropout_at_one_is_zero_as_in_torch(backend):
    x = torch.randn(100)
    expected = torch.nn.functional.alpha_dropout(x, 1.0, True)
    assert torch.equal(F.alpha_dropout(x, 1.0, True), expected)
    assert torch.equal(F.alpha_dropout(x, torch.tensor(1.0), True), expected)


CHANNELS = [
    (F.dropout1d, (6, 9, 11), (6, 9, 1)),
    (F.dropout1d, (9, 11), (9, 1)),
    (F.dropout2d, (6, 9, 5, 4), (6, 9, 1, 1)),
    (F.dropout2d, (6, 9, 5), (6, 9, 1)),
    (F.dropout3d, (6, 9, 2, 3, 4), (6, 9, 1, 1, 1)),
    (F.dropout3d, (9, 2, 3, 4), (9, 1, 1, 1)),
]


@pytest.mark.filterwarnings("ignore:dropout2d")
@pytest.mark.parametrize(("function", "shape", "mask_shape"), CHANNELS)
@pytest.mark.parametrize("inplace", [False, True])
def test_channels(backend, function, shape, mask_shape, inplace):
    key, x = mask.key(*KEY), torch.rand(shape) + 1
    theirs = getattr(torch.nn.functional, function.__name__)(x, 0.5) / x
    shared = [d for d, size in enumerate(mask_shape) if size == 1]
    torch.testing.assert_close(theirs, theirs.mean(shared, keepdim=True).expand(shape))
    kept = F.dropout_mask(mask_shape, 0.5, key)
    assert 0 < kept.sum() < kept.numel()
    argument = x.clone()
    y = function(argument, 0.5, key=key, inplace=inplace)
    assert torch.equal(y, torch.where(kept, x * 2, 0))
    assert (y is argument) == inplace
    assert function(x, 0.5, training=False) is x


def test_drop_path(backend):
    key, x = mask.key(*KEY), torch.randn(40, 3, 5)
    kept = F.dropout_mask((40, 1, 1), 0.5, key)
    assert torch.equal(F.drop_path(x, 0.5, key=key), torch.where(kept, x * 2, 0))
    assert 0 < kept.sum() < 40


def test_mask_shape_broadcasts_from_the_end(backend):
    key, x = mask.key(*KEY), torch.randn(8, 6, 5)
    kept = F.dropout_mask((6, 1), 0.5, key)
    assert torch.equal(F.dropout(x, 0.5, key=key, mask_shape=(6, 1)), torch.where(kept, x * 2, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 64), (2, 5000), (4100, 3), (11,)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_bias_dropout_add(backend, dtype, shape, with_bias):
    key, p = mask.key(*KEY), 0.3
    x, residual, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    bias = torch.randn(shape[-1]).to(dtype) if with_bias else None
    kept = F.dropout_mask(shape, p, key, 3)

    def composed(x, bias, residual):
        return residual + (x if bias is None else x + bias) * kept / (1 - p)

    def run(function, *tensors):
        inputs = [tensor if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        y = function(*inputs)
        wanted = [tensor for tensor in inputs if tensor is not None]
        return y.detach(), *torch.autograd.grad(y, wanted, grad.to(y.dtype))

    ours = run(lambda *t: F.bias_dropout_add(*t, p, key=key, offset=3), x, bias, residual)
    theirs = run(composed, x, bias, residual)
    exact = run(composed, *(t if t is None else t.double() for t in (x, bias, residual)))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert_as_close_as_torch(a, b, c)
    assert torch.equal(ours[-1], grad)


def test_bias_gradient_does_not_depend_on_threads():
    key, grad = mask.key(*KEY), torch.randn(3001, 70)
    sums, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        bias = torch.zeros(70, requires_grad=True)
        F.bias_dropout_add(torch.zeros_like(grad), bias, torch.zeros_like(grad), 0.3, key=key).backward(grad)
        sums.append(bias.grad)
    torch.set_num_threads(threads)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


MASKS = {
    "none": lambda shape: None,
    "bool": lambda shape: torch.rand(shape) > 0.3,
    "causal": lambda shape: torch.ones(shape[-2:], dtype=torch.bool).tril(),
    "keys": lambda shape: torch.rand(shape[:-2] + (1, shape[-1])) > 0.3,
    "column": lambda shape: torch.rand(shape[:-1] + (1,)) > 0.3,
    "added": lambda shape: torch.randn(shape),
    "strided": lambda shape: torch.randn(shape[:-1] + (2 * shape[-1],))[..., ::2],
    "turned": lambda shape: torch.rand(shape[:-2] + shape[:-3:-1]).transpose(-1, -2) > 0.3,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 9, 13), (4, 64, 64), (3, 5000), (300, 3)])
@pytest.mark.parametrize("kind", MASKS)
def test_softmax_dropout(backend, dtype, shape, kind):
    key, p = mask.key(*KEY), 0.3
    scores, grad = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    attended = MASKS[kind](shape)
    if attended is not None and attended.dtype != torch.bool:
        attended = attended.to(dtype)
    kept = F.dropout_mask(shape, p, key, 3)

    def composed(scores, attended):
        if attended is not None and attended.dtype == torch.bool:
            scores = scores.masked_fill(~attended, -torch.inf)
        elif attended is not None:
            scores = scores + attended
        return torch.nan_to_num(scores.softmax(-1)) * kept / (1 - p)

    def run(function, scores, attended):
        inputs = [scores.detach().requires_grad_()]
        if attended is not None and attended.dtype != torch.bool:
            attended = attended.detach().requires_grad_()
            inputs.append(attended)
        y = function(inputs[0], attended)
        return y.detach(), *(torch.nan_to_num(g) for g in torch.autograd.grad(y, inputs, grad.to(y.dtype)))

    ours = run(lambda s, m: F.softmax_dropout(s, p, m, key=key, offset=3), scores, attended)
    theirs = run(composed, scores, attended)
    double = attended if attended is None or attended.dtype == torch.bool else attended.double()
    exact = run(composed, scores.double(), double)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert_as_close_as_torch(a, b, c)
    plain = F.softmax_dropout(scores, p, attended, training=False)
    assert_as_close_as_torch(plain, composed_eval(scores, attended), composed_eval(scores.double(), double))


def composed_eval(scores, attended):
    if attended is None:
        return scores.softmax(-1)
    bool_mask = attended.dtype == torch.bool
    masked = scores.masked_fill(~attended, -torch.inf) if bool_mask else scores + attended
    return torch.nan_to_num(masked.softmax(-1))


def test_softmax_of_extremes(backend):
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor(
        [[-inf, -inf, -inf], [0.0, -inf, 1.0], [0.0, nan, 1.0], [nan, -inf, -inf], [1e30, -1e30, 0]]
    )
    for x in (rows, rows.repeat_interleave(40, 1)):
        y = F.softmax_dropout(x, 0.0)
        expected = x.softmax(-1)
        expected[0] = 0
        torch.testing.assert_close(y, expected, equal_nan=True)


def test_exponential_to_the_last_place():
    """Scores over the whole range where exp() is not zero: against float64, a row of 16 lanes at a time."""
    with mp.backend("native" if _extension.loaded() else "reference"):
        scores = -torch.linspace(0, 110, 1 << 18).view(-1, 64)
        scores[:, 0] = 0
        ours, exact = F.softmax_dropout(scores, 0.0), scores.double().softmax(-1)
    normal = exact > 2.0**-120
    assert ((ours.double() - exact).abs()[normal] <= 5 * 2**-23 * exact[normal]).all()
    assert (ours.double() - exact).abs()[~normal].max() <= 2.0**-140


def test_evaluation_leaves_the_generator_alone(backend):
    before, x = torch.get_rng_state(), torch.randn(3, 4, generator=torch.Generator())
    assert torch.equal(F.bias_dropout_add(x, x[0], x, 0.5, training=False), x + (x + x[0]))
    assert torch.equal(F.bias_dropout_add(x, x[0], x, torch.tensor(0.5), training=False), x + (x + x[0]))
    for p in (0.5, torch.tensor(0.5)):
        torch.testing.assert_close(F.softmax_dropout(x, p, training=False), x.softmax(-1))
    assert torch.equal(before, torch.get_rng_state())

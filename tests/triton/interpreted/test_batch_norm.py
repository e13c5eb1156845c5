"""Triton BatchNorm in the interpreter, against torch in float64: statistics, buffers, values, gradients."""

import pytest
import torch

pytest.importorskip("triton")

from modeprobe.triton_kernels import batch_norm, batch_norm_on_chip, batch_norm_statistics
from modeprobe.triton_kernels._layout import same_memory

from modeprobe import mask

pytestmark = [pytest.mark.rung("triton"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

EPS = 1e-5
KEY = mask.key(1234, 5)
# float16 stores round; the interpreter's bfloat16 stores truncate: two units in the last place.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-6}
# Odd spatial sizes, several programs per channel, channels that are no multiple of a vector, 2-D and 5-D.
SHAPES = [(4, 3, 7, 7), (5, 9), (3, 2, 9), (2, 8, 4, 4, 2), (6, 2, 40, 24)]


@pytest.fixture(autouse=True)
def launches(request, monkeypatch):
    """Several launches, but for tests with a parameter ``launches`` that says "one launch"."""
    if getattr(request, "param", "several launches") != "one launch":
        monkeypatch.setattr(batch_norm, "on_chip_tile", lambda x, layout: None)


both_launches = pytest.mark.parametrize("launches", ["several launches", "one launch"], indirect=True)


def with_layout(x, channels_last):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.to(memory_format=formats[x.dim()]) if channels_last else x


def assert_near(ours, truth, tolerance, what):
    scale = max(float(truth.abs().max()), 1e-6) if truth.numel() else 1.0
    error = float((ours.double() - truth.double()).abs().max()) / scale if truth.numel() else 0.0
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def channels_of(x):
    return x.double().movedim(1, 0).flatten(1)


def parameters(channels, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(channels, generator=generator) + 0.5
    bias = torch.randn(channels, generator=generator)
    return weight.to(dtype), bias.to(dtype)


def truth_of(x, weight, bias, running=None, momentum=0.1):
    """Training forward in float64 with gradients: (y, leaves, running buffers after)."""
    leaves = [one.double().detach().clone().requires_grad_() for one in (x, weight, bias)]
    buffers = [None, None] if running is None else [one.double().clone() for one in running]
    y = torch.nn.functional.batch_norm(leaves[0], *buffers, *leaves[1:], True, momentum, EPS)
    return y, leaves, buffers


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments(shape, channels_last):
    if channels_last and len(shape) < 4:
        pytest.skip("no such memory format")
    x = with_layout(torch.randn(shape) + 3, channels_last)
    ours = batch_norm.launch_batch_norm_moments(x)
    values, channels = channels_of(x), shape[1]
    assert_near(ours[:channels], values.mean(1), 1e-6, "mean")
    assert_near(ours[channels:-2], values.var(1, correction=0) * values.shape[1], 1e-6, "M2")
    assert ours[-2:].tolist() == [values.shape[1], 0]


@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_large_mean_does_not_cancel(ratio, channels_last):
    x = with_layout(torch.randn(8, 2, 32, 32) + ratio, channels_last)
    ours = batch_norm.launch_batch_norm_moments(x)
    m2 = channels_of(x).var(1, correction=0) * 8 * 32 * 32
    assert_near(ours[2:4], m2, 1e-4, "M2")


@pytest.mark.parametrize("shape", [(5, 3, 7, 7), (9, 3), (70, 3, 8, 8)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_constant_channel_has_variance_zero(shape, channels_last):
    if channels_last and len(shape) < 4:
        pytest.skip("no such memory format")
    x = with_layout(
        torch.full(shape, 0.1) * torch.arange(1, 4).view(-1, *[1] * (len(shape) - 2)), channels_last
    )
    ours = batch_norm.launch_batch_norm_moments(x)
    assert torch.equal(ours[3:6], torch.zeros(3))
    assert torch.equal(ours[:3], x[0].reshape(3, -1)[:, 0])


def test_one_outlying_first_element_does_not_spoil_the_rest():
    x = torch.randn(1, 1, 64, 64)
    x[0, 0, 0, 0] = 1e4
    ours = batch_norm.launch_batch_norm_moments(x)
    values = channels_of(x)
    assert_near(ours[1:2], values.var(1, correction=0) * 4096, 1e-6, "M2")


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
# 70 channels: more than one program of the merge kernel.
@pytest.mark.parametrize(("channels", "channels_last"), [(3, False), (70, True)])
@both_launches
def test_running_buffers(launches, momentum, channels, channels_last):
    x = with_layout(torch.randn(3, channels, 2, 3) * 2 + 1, channels_last)
    module = torch.nn.BatchNorm2d(channels, momentum=momentum).double()
    ours = [torch.zeros(channels), torch.ones(channels), torch.tensor(0)]
    for count in (1, 2):
        module(x.double())
        batch_norm.launch_batch_norm_train(x, None, None, *ours, None, momentum, EPS)
        assert_near(ours[0], module.running_mean, 1e-6, "running_mean")
        assert_near(ours[1], module.running_var, 1e-6, "running_var")
        assert int(ours[2]) == count


@both_launches
def test_a_momentum_of_one_heals_nan(launches):
    x = torch.randn(4, 2, 3, 3)
    mean, var = torch.full((2,), float("nan")), torch.full((2,), float("nan"))
    batch_norm.launch_batch_norm_train(x, None, None, mean, var, torch.tensor(0), None, 1.0, EPS)
    assert_near(mean, channels_of(x).mean(1), 1e-6, "running_mean")
    assert_near(var, channels_of(x).var(1), 1e-6, "running_var")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_is_skipped_where_asked(poison):
    x = with_layout(torch.randn(4, 70, 2, 2), True)
    x[1, 69, 0, 0] = poison
    mean, var, tracked = torch.zeros(70), torch.ones(70), torch.tensor(3)
    skipped = torch.tensor(0)
    y, _, _ = batch_norm.launch_batch_norm_train(x, None, None, mean, var, tracked, skipped, 0.1, EPS)
    assert not y[:, 69].isfinite().all()
    assert y[:, :69].isfinite().all()
    assert torch.equal(mean, torch.zeros(70))
    assert torch.equal(var, torch.ones(70))
    assert (int(tracked), int(skipped)) == (3, 1)
    batch_norm.launch_batch_norm_train(torch.randn(16, 70), None, None, mean, var, tracked, skipped, 0.1, EPS)
    assert mean.any()
    assert (int(tracked), int(skipped)) == (4, 1)


def test_an_empty_batch_is_only_counted():
    mean, var, tracked = torch.zeros(3), torch.ones(3), torch.tensor(1)
    x = torch.empty(0, 3, 4, 4)
    y, statistics, _ = batch_norm.launch_batch_norm_train(x, None, None, mean, var, tracked, None, 0.1, EPS)
    assert y.shape == x.shape
    assert statistics.shape == (2, 3)
    assert torch.equal(mean, torch.zeros(3))
    assert int(tracked) == 2


def test_moments_of_parts_merge_to_those_of_the_whole():
    x = torch.randn(9, 70) * 3 + 5
    empty = batch_norm.launch_batch_norm_moments(x[:0])
    parts = [batch_norm.launch_batch_norm_moments(x[a:b]) for a, b in ((0, 1), (1, 3), (3, 9))]
    mean, variance, tracked = torch.zeros(70), torch.ones(70), torch.tensor(0)
    merged = batch_norm.launch_batch_norm_merge(
        torch.stack([empty, *parts]), mean, variance, tracked, None, None
    )
    assert_near(merged[0], x.double().mean(0), 1e-6, "mean")
    assert_near(merged[1], x.double().var(0, correction=0), 1e-6, "variance")
    assert merged[2].tolist() == [9]
    assert_near(mean, x.double().mean(0), 1e-6, "running_mean")
    assert_near(variance, x.double().var(0), 1e-6, "running_var")
    assert int(tracked) == 1
    # One value has no unbiased variance: it is only counted.
    batch_norm.launch_batch_norm_merge(torch.stack([empty, parts[0]]), mean, variance, tracked, None, None)
    assert_near(mean, x.double().mean(0), 1e-6, "running_mean")
    assert_near(variance, x.double().var(0), 1e-6, "running_var")
    assert int(tracked) == 2


def test_counts_past_two_to_the_24():
    base = 1 << 24
    rows = torch.zeros(2, 4)
    rows[:, 1] = 1.0  # M2
    rows[:, 2], rows[:, 3] = 4, 3  # 3 * 2^24 + 4 each
    _, variance, count = batch_norm.launch_batch_norm_merge(rows, None, None, None, None, 0.1)
    assert count.tolist() == [2 * (3 * base + 4)]
    assert_near(variance, torch.tensor([2.0 / (2 * (3 * base + 4))]), 1e-6, "variance")


# (shape, channels last, elements behind a 16-byte border): sizes, channel counts and addresses that fit no
# vector, or of which some do; one value per pixel, per channel, per row.
ODD = [
    ((4, 3, 7, 7), False, 0),
    ((4, 3, 7, 7), True, 1),
    ((2, 8, 4, 2), False, 1),
    ((2, 8, 4, 2), True, 0),
    ((5, 9), False, 3),
    ((2, 1, 1, 9), False, 1),
    ((1, 5, 13), False, 0),
    ((7, 65, 1, 1), True, 1),
    ((2, 11, 1, 3), False, 3),
    ((3, 12, 5, 1), True, 1),
    ((2, 3, 2, 3, 5), False, 1),
    ((33, 2), False, 0),
]


@both_launches
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in ODD]
    + [(case, torch.bfloat16) for case in ODD[::2]]
    + [(case, dtype) for case in ODD[:3] for dtype in (torch.float64, torch.float16)],
    ids=str,
)
def test_training_forward_and_backward(launches, case, dtype):
    shape, channels_last, shift = case
    dense = with_layout((torch.randn(shape) * 2 + 1).to(dtype), channels_last)
    x = dense.new_empty(dense.numel() + shift).as_strided(shape, dense.stride(), shift).copy_(dense)
    weight, bias = parameters(shape[1], dtype)
    grad = torch.randn(shape).to(dtype)  # contiguous, whatever the layout of x
    y, statistics, _ = batch_norm.launch_batch_norm_train(x, weight, bias, None, None, None, None, 0.1, EPS)
    truth, leaves, _ = truth_of(x, weight, bias)
    truth.backward(grad.double())
    assert same_memory(y, x)
    assert y.dtype == dtype
    assert_near(y, truth.detach(), TOLERANCE[dtype], "output")
    dx, dweight, dbias, dresidual = batch_norm.launch_batch_norm_backward(
        grad, x, statistics, weight, bias, True, True, True, False
    )
    assert same_memory(dx, x)
    assert dresidual.numel() == 0
    for ours, leaf, what in zip((dx, dweight, dbias), leaves, ("x", "weight", "bias"), strict=True):
        assert_near(ours, leaf.grad, TOLERANCE[dtype], f"gradient of {what}")


# (shape, dtype, channels last) -> (programs, vectors in a tile), or None: several launches.
ON_CHIP = [
    ((32, 512, 7, 7), torch.bfloat16, False, (512, 2048)),
    ((32, 256, 14, 14), torch.float32, False, (256, 2048)),
    ((64, 256, 14, 14), torch.float32, False, None),
    ((8, 512, 7, 7), torch.float32, True, (64, 1024)),
    ((16, 512, 8, 8), torch.bfloat16, True, None),
    ((4096, 256), torch.float32, False, None),
    ((256, 256), torch.float32, False, (32, 512)),
    ((64, 65), torch.float32, False, (9, 512)),
]


@pytest.mark.parametrize("case", ON_CHIP, ids=str)
def test_which_layers_take_one_launch(case):
    shape, dtype, channels_last, want = case
    x, layout = batch_norm.layout_of(with_layout(torch.empty(shape, dtype=dtype), channels_last))
    tile = batch_norm_on_chip.on_chip_tile(x, layout)
    assert (tile and (tile.programs, tile.rows * tile.columns)) == want


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_launch_keeps_the_variance(channels_last, monkeypatch):
    monkeypatch.setattr(batch_norm, "on_chip_tile", batch_norm_on_chip.on_chip_tile)
    for x, rtol in ((torch.randn(8, 8, 4, 4) + 1e4, 1e-4), (torch.full((8, 8, 4, 4), 1234.567), 0.0)):
        x = with_layout(x, channels_last)
        buffers = torch.zeros(8), torch.ones(8), torch.tensor(0), None
        y, statistics, _ = batch_norm.launch_batch_norm_train(x, None, None, *buffers, 1.0, EPS)
        variance = channels_of(x).var(1)
        torch.testing.assert_close(buffers[1].double(), variance, rtol=rtol, atol=0.0)
        again = batch_norm.launch_batch_norm_train(x, None, None, *buffers, 1.0, EPS)
        assert torch.equal(again[0], y)
        assert torch.equal(again[1], statistics)


@pytest.mark.parametrize("channels_last", [False, True])
def test_evaluation_forward_and_backward(channels_last):
    x = with_layout(torch.randn(3, 5, 3, 4), channels_last)
    weight, bias = parameters(5, x.dtype)
    mean, variance = torch.randn(5), torch.rand(5) + 0.1
    y, statistics, _ = batch_norm.launch_batch_norm_eval(x, mean, variance, weight, bias, EPS, save=True)
    leaves = [one.double().requires_grad_() for one in (x, weight.clone(), bias.clone())]
    truth = torch.nn.functional.batch_norm(
        leaves[0], mean.double(), variance.double(), *leaves[1:], False, 0.1, EPS
    )
    assert_near(y, truth.detach(), 2e-6, "output")
    grad = torch.randn_like(x)
    truth.backward(grad.double())
    found = batch_norm.launch_batch_norm_backward(grad, x, statistics, weight, bias, False, True, True, False)
    for ours, leaf in zip(found, leaves, strict=False):
        assert_near(ours, leaf.grad, 2e-6, "gradient")
    alone = batch_norm.launch_batch_norm_backward(
        grad, None, statistics, weight, bias, False, True, False, False
    )
    assert_near(alone[0], leaves[0].grad, 2e-6, "gradient without x")
    y, statistics, _ = batch_norm.launch_batch_norm_eval(x, mean, variance, None, None, EPS)
    assert statistics.numel() == 0


def test_several_programs_per_channel_and_per_tensor():
    x = torch.randn(6, 2, 40, 24)
    y, statistics, _ = batch_norm.launch_batch_norm_train(x, None, None, None, None, None, None, 0.1, EPS)
    assert batch_norm_statistics._partial_moments(*batch_norm.layout_of(x)).shape[0] > 1
    one, zero = torch.ones(2), torch.zeros(2)
    truth, leaves, _ = truth_of(x, one, zero)
    grad = torch.randn_like(x)
    truth.backward(grad.double())
    assert_near(y, truth.detach(), 2e-6, "output")
    found = batch_norm.launch_batch_norm_backward(grad, x, statistics, None, None, True, True, True, False)
    for ours, leaf in zip(found, leaves, strict=False):
        assert_near(ours, leaf.grad, 5e-6, "gradient")


def test_sliced_and_misaligned_storage():
    storage = torch.randn(4, 3, 8, 9)
    for x in (storage[:, 1:, :, ::2], storage.flatten()[3:147].view(2, 2, 6, 6)):
        y, statistics, _ = batch_norm.launch_batch_norm_train(x, None, None, None, None, None, None, 0.1, EPS)
        weight, bias = torch.ones(x.shape[1]), torch.zeros(x.shape[1])
        truth, leaves, _ = truth_of(x, weight, bias)
        assert_near(y, truth.detach(), 2e-6, "output")
        grad = torch.randn(())
        truth.backward(grad.double().expand_as(truth))
        found = batch_norm.launch_batch_norm_backward(
            grad.expand_as(x), x, statistics, None, None, True, True, True, False
        )
        assert_near(found[2], leaves[2].grad, 2e-6, "gradient of bias")


def test_the_same_input_gives_the_same_bits():
    x = torch.randn(6, 2, 40, 24)
    first = batch_norm.launch_batch_norm_train(x, None, None, None, None, None, None, 0.1, EPS)
    second = batch_norm.launch_batch_norm_train(x, None, None, None, None, None, None, 0.1, EPS)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_pieces_make_the_whole(channels_last):
    x = with_layout(torch.randn(3, 4, 3, 3), channels_last)
    weight, bias = parameters(4, x.dtype)
    _, statistics, _ = batch_norm.launch_batch_norm_train(x, weight, bias, None, None, None, None, 0.1, EPS)
    grad = torch.randn_like(x)
    whole = batch_norm.launch_batch_norm_backward(grad, x, statistics, weight, bias, True, True, True, False)
    sums = batch_norm.launch_batch_norm_backward_reduce(grad, x, statistics, weight, bias)
    assert torch.equal(sums[0], whole[2])
    assert torch.equal(sums[1], whole[1])
    dx, _ = batch_norm.launch_batch_norm_backward_input(grad, x, statistics, sums / 27, weight, bias, False)
    assert_near(dx, whole[0].double(), 1e-6, "gradient of x")

"""BatchNorm with all that may follow it, on a GPU, on both backends, against plain torch in float64."""

import pytest
import torch
from support.gpu import close

from modeprobe import mask
from modeprobe.ops.batch_norm import operators

BACKENDS = ("native", "triton")
FORMATS = (torch.contiguous_format, torch.channels_last)
SHAPES = ((4, 24, 6, 6), (64, 24, 40, 40))  # one launch; several, and several blocks per channel
# activation, residual, dropout, sign bits
PLAIN, SMOOTH, LEAKY = (0, False, False, False), (3, True, True, False), (2, True, False, True)

on_all = pytest.mark.parametrize("backend", BACKENDS)
in_both = pytest.mark.parametrize("memory_format", FORMATS, ids=str)
of_both = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensors(shape, dtype, memory_format, count=3):
    return [torch.randn(shape, device="cuda").to(dtype, memory_format=memory_format) for _ in range(count)]


def vectors(channels, count):
    return [torch.rand(channels, device="cuda").add(0.5) for _ in range(count)]


def widened(values, dtype):
    if dtype != torch.float64:
        return [value.clone() for value in values]
    return [value.double() if value.is_floating_point() else value.clone() for value in values]


@on_all
@in_both
@of_both
@pytest.mark.parametrize(
    ("dtype", "epilogue"),
    [(torch.float32, PLAIN), (torch.float32, SMOOTH), (torch.bfloat16, SMOOTH), (torch.bfloat16, LEAKY)],
    ids=("plain", "silu", "silu-bfloat16", "leaky-bfloat16"),
)
def test_training(epilogue, dtype, shape, memory_format, backend):
    activation, added, dropped, bits = epilogue
    x, dy, residual = tensors(shape, dtype, memory_format)
    parameters = vectors(shape[1], 4)
    key = mask.key(3, 4, device="cuda") if dropped else None
    signs = []

    def run(name, kind):
        ops = operators(name)
        weight, bias, mean, var = widened(parameters, kind)
        count = torch.zeros((), dtype=torch.int64, device="cuda")
        a, g, r = (tensor.to(kind) for tensor in (x, dy, residual))
        tail = (r if added else None, activation, 0.1, key, 0.2)
        y, statistics, own = ops.batch_norm_train(
            a, weight, bias, mean, var, count, None, 0.1, 1e-5, *tail, bits
        )
        signs.append(own)  # the first one's decide for all: next to zero, rounding does
        gradients = ops.batch_norm_backward(
            g, a, statistics, weight, bias, True, True, True, added, *tail, signs[0] if bits else None
        )
        assert count.item() == 1
        return y, statistics, mean, var, *gradients[: 3 + added]

    got, same, truth = run(backend, dtype), run("reference", dtype), run("reference", torch.float64)
    for number, (mine, theirs, right) in enumerate(zip(got, same, truth, strict=True)):
        assert mine.stride() == theirs.stride()
        close(mine, theirs, right, f"result {number}", backend=backend, exp=activation == 3)


@on_all
@in_both
def test_evaluation(memory_format, backend):
    x, dy = tensors(SHAPES[0], torch.float32, memory_format, 2)
    parameters = vectors(SHAPES[0][1], 4)

    def run(name, kind):
        ops = operators(name)
        weight, bias, mean, var = widened(parameters, kind)
        y, statistics, _ = ops.batch_norm_eval(x.to(kind), mean, var, weight, bias, 1e-5, save=True)
        gradients = ops.batch_norm_backward(
            dy.to(kind), x.to(kind), statistics, weight, bias, False, True, True, False
        )
        return y, statistics, *gradients[:3]

    results = run(backend, torch.float32), run("reference", torch.float32), run("reference", torch.float64)
    for number, three in enumerate(zip(*results, strict=True)):
        close(*three, f"result {number}", backend=backend)


@on_all
@in_both
@of_both
def test_the_pieces_make_the_whole(shape, memory_format, backend):
    x, dy = tensors(shape, torch.float32, memory_format, 2)
    weight, bias, mean, var = vectors(shape[1], 4)
    ops = operators(backend)
    halves = torch.stack(
        [ops.batch_norm_moments(part) for part in x.split((shape[0] // 4, shape[0] * 3 // 4))]
    )
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    merged = ops.batch_norm_merge(halves, mean.clone(), var.clone(), count, None, None)
    truth = x.double().transpose(0, 1).flatten(1)
    close(merged[0], truth.mean(1).float(), truth.mean(1), "mean", backend=backend, scale=1.0)
    variance = truth.var(1, correction=0)
    close(merged[1], variance.float(), variance, "variance", backend=backend)
    assert (merged[2].item(), count.item()) == (truth.shape[1], 1)

    statistics = torch.stack((merged[0], (merged[1] + 1e-5).rsqrt()))
    sums = ops.batch_norm_backward_reduce(dy, x, statistics, weight, bias)
    dx, _ = ops.batch_norm_backward_input(dy, x, statistics, sums / truth.shape[1], weight, bias, False)
    whole = ops.batch_norm_backward(dy, x, statistics, weight, bias, True, True, True, False)
    for mine, theirs in ((dx, whole[0]), (sums[1], whole[1]), (sums[0], whole[2])):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@on_all
def test_batches_that_are_not_finite_are_skipped(backend):
    x = torch.randn(4, 300, 5, 5, device="cuda")
    x[1, 299, 2, 2] = float("nan")
    mean, var = torch.zeros(300, device="cuda"), torch.ones(300, device="cuda")
    count, skipped = (torch.zeros((), dtype=torch.int64, device="cuda") for _ in range(2))
    operators(backend).batch_norm_train(x, None, None, mean, var, count, skipped, 0.1, 1e-5)
    assert (count.item(), skipped.item()) == (0, 1)
    assert torch.equal(mean, torch.zeros_like(mean))

"""The other CUDA kernels of the dropout family, executed on the CPU, against plain torch."""

import math

import pytest
import torch
from support import emulator
from support.emulator import DTYPES, acc_dtype, address, placed, poisoned

from modeprobe import mask

pytestmark = [
    pytest.mark.rung("emulator"),
    pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not())),
]

ALPHA = -1.7580993408473766
# shape, shared dimensions, order of dimensions in memory
LAYOUTS = [
    ((3, 5, 7, 9), (2, 3), (0, 1, 2, 3)),  # Dropout2d, rows that straddle chunks
    ((2, 3, 8, 8), (2, 3), (0, 1, 2, 3)),
    ((3, 17, 4, 5), (2, 3), (0, 2, 3, 1)),  # channels last
    ((6, 33), (1,), (0, 1)),  # stochastic depth
    ((4, 5, 6), (0, 2), (2, 0, 1)),
    ((4, 5, 6), (), (1, 2, 0)),
    ((1, 1), (0,), (0, 1)),
    ((2, 4097), (0,), (0, 1)),
]


def dense(shape, order, dtype, shift=0):
    x = torch.randn([shape[d] for d in order]).to(dtype)
    return placed(x, shift).permute([order.index(d) for d in range(len(shape))])


def walk_of(shape, shared, order):
    steps, numel = [0] * len(shape), 1
    for d in reversed(range(len(shape))):
        if d not in shared:
            steps[d] = numel
            numel *= shape[d]
    return [shape[d] for d in order], [steps[d] for d in order]


def structured(x, shared, order, key, p, *, offset=0, scaled=True, alpha=False, linear=False, p_tensor=None):
    y = torch.full_like(x, float("nan"))
    size, step = walk_of(x.shape, shared, order)
    emulator.module().structured_dropout(
        DTYPES.index(x.dtype), address(x), address(y), x.numel(), size, step, address(key), offset % 2**64, p,
        address(p_tensor), scaled, alpha, linear,
    )  # fmt: skip
    return y


def keep_of(shape, shared, key, p, offset=0):
    small = [1 if d in shared else n for d, n in enumerate(shape)]
    return mask.keep_mask(small, p, key, offset).expand(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "shared", "order"), LAYOUTS, ids=str)
def test_structured_dropout(shape, shared, order, dtype):
    key = mask.key(21, 4)
    for seed, (p, offset, shift) in enumerate([(0.3, 0, 0), (0.5, 5, 1), (1.0, 2**33, 0), (0.0, 8, 0)]):
        emulator.configure(seed=seed)
        x = dense(shape, order, dtype, shift)
        keep = keep_of(shape, shared, key, p, offset)
        scale = torch.tensor(1 / (1 - p) if p < 1 else 0, dtype=acc_dtype(dtype))
        want = torch.where(keep, (x.to(scale.dtype) * scale).to(dtype), torch.zeros((), dtype=dtype))
        assert torch.equal(structured(x, shared, order, key, p, offset=offset), want)
        unscaled = structured(x, shared, order, key, p, offset=offset, scaled=False)
        assert torch.equal(unscaled, torch.where(keep, x, torch.zeros((), dtype=dtype)))


def test_dropped_channels_are_not_read():
    x = torch.full((4, 16, 8, 8), float("nan"))
    y = structured(x, (2, 3), (0, 1, 2, 3), mask.key(1), 1.0)
    assert torch.equal(y, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shared", "shape"), [(None, (3, 5, 7, 9)), (None, (3, 5, 7, 180)), ((2, 3), (3, 5, 7, 9))]
)
def test_alpha_dropout(dtype, shared, shape):
    order, key = (0, 1, 2, 3), mask.key(3)
    emulator.configure(multiprocessors=1)
    x = dense(shape, order, dtype)
    for p in (0.0, 0.1, 0.5, 1.0):
        keep = keep_of(shape, shared or (), key, p)
        a = 1 / math.sqrt((1 - p) * (1 + p * ALPHA**2)) if p < 1 else 0.0
        b = -a * ALPHA * p
        want = torch.where(keep, a * x.double() + b, torch.tensor(a * ALPHA + b, dtype=torch.float64))
        linear = torch.where(keep, a * x.double(), torch.zeros((), dtype=torch.float64))
        tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
        p_tensor = torch.tensor(p, dtype=torch.float64)
        for device_p in (None, p_tensor):
            walk = (x, shared, order) if shared else (x, (), ())
            arguments = {"alpha": True, "p_tensor": device_p}
            if shared is None:
                arguments["offset"] = 0
                y, dx = (torch.full_like(x, float("nan")) for _ in range(2))
                for out, is_linear in ((y, False), (dx, True)):
                    emulator.module().structured_dropout(
                        DTYPES.index(dtype), address(x), address(out), x.numel(), [], [], address(key), 0, p,
                        address(device_p), True, True, is_linear,
                    )  # fmt: skip
            else:
                y = structured(*walk, key, p, **arguments)
                dx = structured(*walk, key, p, linear=True, **arguments)
            torch.testing.assert_close(y.double(), want, **tolerance)
            torch.testing.assert_close(dx.double(), linear, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 8, 37, 64, 300, 456])
@pytest.mark.parametrize("shift", [0, 1])
def test_bias_dropout_add(dtype, columns, shift):
    emulator.configure(seed=columns, multiprocessors=1 + columns % 3)
    rows, key, p, offset = 41, mask.key(5, 5), 0.25, 3
    x, residual, dy = (placed(torch.randn(rows, columns).to(dtype), shift) for _ in range(3))
    bias = torch.randn(columns).to(dtype)
    keep = mask.keep_mask((rows, columns), p, key, offset)
    dropped = torch.zeros((), dtype=torch.float64)
    for b in (bias, None):
        y = poisoned(x.shape, dtype)
        emulator.module().bias_dropout_add(
            DTYPES.index(dtype), address(x), address(b), address(residual), address(y), x.numel(), columns,
            address(key), offset, p,
        )  # fmt: skip
        inner = x.double() + (b.double() if b is not None else 0)
        want = residual.double() + torch.where(keep, inner / (1 - p), dropped)
        torch.testing.assert_close(y.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    dx, d_bias = poisoned(x.shape, dtype), poisoned((columns,), dtype)
    emulator.module().bias_dropout_add_backward(
        DTYPES.index(dtype), address(dy), address(dx), address(d_bias), rows, columns, address(key), offset, p
    )
    want = torch.where(keep, dy.double() / (1 - p), dropped)
    torch.testing.assert_close(dx.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    allowed = torch.finfo(dtype).eps * want.sum(0).abs() + torch.finfo(acc_dtype(dtype)).eps * want.abs().sum(
        0
    )
    assert ((d_bias.double() - want.sum(0)).abs() <= allowed + 1e-7).all()


def softmax(scores, score_mask, key, p, offset=0, save=True):
    y = poisoned(scores.shape, scores.dtype)
    saved = poisoned(scores.shape, scores.dtype) if save else None
    size, step, inner, is_bool = [], [], 0, False
    if score_mask is not None:
        steps = [0 if n == 1 else s for n, s in zip(score_mask.shape, score_mask.stride(), strict=True)]
        size, step, inner = list(scores.shape[:-1]), steps[:-1], steps[-1]
        is_bool = score_mask.dtype == torch.bool
    length = scores.shape[-1]
    emulator.module().softmax_dropout(
        DTYPES.index(scores.dtype), address(scores), address(score_mask), is_bool, size, step, inner,
        address(y), address(saved), scores.numel() // length, length, address(key), offset, p,
    )  # fmt: skip
    return y, saved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 7, 8, 111, 300, 600, 1500, 2200])
@pytest.mark.parametrize("kind", ["none", "bool", "added"])
def test_softmax_dropout(dtype, length, kind):
    emulator.configure(seed=length)
    heads, rows, key, p, offset = 2, 5, mask.key(8), 0.2, 2**32 + 5
    for shift in (0, 1):
        scores, dy = (placed((torch.randn(3, heads, rows, length) * 4).to(dtype), shift) for _ in range(2))
        added, score_mask = torch.zeros((), dtype=torch.float64), None
        if kind == "bool":
            score_mask = torch.rand(3, 1, 1, length) < 0.7
            score_mask[1] = False  # nothing takes part
            added = torch.zeros(score_mask.shape, dtype=torch.float64).masked_fill(~score_mask, -math.inf)
        elif kind == "added":
            score_mask = torch.randn(1, heads, rows, length).to(dtype)
            score_mask[..., 0] = -math.inf
            added = score_mask.double()
        y, saved = softmax(scores, score_mask, key, p, offset)
        probabilities = torch.softmax(scores.double() + added, -1).nan_to_num(0.0)
        keep = mask.keep_mask(scores.shape, p, key, offset)
        tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 1e-7}
        torch.testing.assert_close(saved.double(), probabilities, **tolerance)
        want = torch.where(keep, probabilities / (1 - p), torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(y.double(), want, **tolerance)
        assert torch.equal(softmax(scores, score_mask, key, p, offset, save=False)[0], y)
        ds = poisoned(scores.shape, dtype)
        emulator.module().softmax_dropout_backward(
            DTYPES.index(dtype), address(dy), address(saved), address(ds), scores.numel() // length, length,
            address(key), offset, p,
        )  # fmt: skip
        d = torch.where(keep, dy.double() / (1 - p), torch.zeros((), dtype=torch.float64))
        exact = saved.double()
        want = exact * (d - (d * exact).sum(-1, keepdim=True))
        torch.testing.assert_close(
            ds.double(), want, rtol=8 * torch.finfo(dtype).eps, atol=32 * torch.finfo(acc_dtype(dtype)).eps
        )


def test_softmax_keeps_nan_and_ignores_dropped_infinities():
    scores = torch.randn(2, 40)
    scores[1, 7] = float("nan")
    y, saved = softmax(scores, None, mask.key(1), 0.5)
    assert torch.isnan(saved[1]).all()
    assert torch.isfinite(y[0]).all()

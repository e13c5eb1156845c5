"""CUDA BatchNorm, executed on the CPU, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from support import emulator
from support.emulator import BatchNorm

from modeprobe import mask

pytestmark = [
    pytest.mark.rung("emulator"),
    pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not())),
]

# (N, C, spatial): per-channel counts 1 to 4097 and beyond, odd channels, rows that straddle chunks.
SHAPES = [
    (1, 1, (1,)),
    (1, 3, (7,)),
    (2, 3, (4,)),
    (9, 1, (1,)),
    (3, 5, (37,)),
    (2, 7, (7, 7)),
    (33, 8, (31,)),
    (2, 64, (9,)),
    (17, 65, (1,)),
    (1, 2, (4097,)),
    (6, 3, (1023,)),
    (120, 24, (1,)),
    (8193, 2, (3,)),
]
FORMATS = {False: "contiguous", True: "channels_last"}
LAUNCHES = {False: "two-launches", True: "one-launch"}


def fits(shape, channels_last):
    """Whether the one-launch kernels take float32 tensors of this shape, of few channels."""
    n, c, spatial = shape
    s = torch.Size(spatial).numel()
    if channels_last:
        return c % 8 == 0 and n * s <= 512
    return n * ((s + 14) // 8) <= 512


def name_of(case):
    n, c, spatial = case[0]
    return f"{n}x{c}x{'x'.join(map(str, spatial))}-{FORMATS[case[1]]}-{LAUNCHES[case[2]]}"


def cases(shapes):
    """(shape, channels_last, one launch): every kernel that takes the shape."""
    return [
        pytest.param(*case, id=name_of(case))
        for shape in shapes
        for channels_last in (False, True)
        for case in ((shape, channels_last, one) for one in (False, True)[: 1 + fits(shape, channels_last)])
    ]


both_launches = pytest.mark.parametrize("on_chip", LAUNCHES, ids=LAUNCHES.values())
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.01),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}


def format_of(x, channels_last):
    """x, dense, with its channels innermost or not."""
    if not channels_last:
        return x.contiguous()
    order = [0, *range(2, x.dim()), 1]
    back = [0, x.dim() - 1, *range(1, x.dim() - 1)]
    return x.permute(order).contiguous().permute(back)


def make(shape, dtype, channels_last, shift=0, mean=0.5, std=2.0):
    n, c, spatial = shape
    x = (torch.randn(n, c, *spatial) * std + mean).to(dtype)
    return emulator.placed(format_of(x, channels_last), shift)


def check(actual, torch_same_dtype, truth, dtype, what, units=1.0, magnitude=None):
    """The error is at most twice torch's own in that dtype, plus units in the last place.

    ``magnitude``: of what was summed up, where terms of both signs cancel; else of the largest value.
    """
    assert torch.isfinite(actual).all(), what
    error = (actual.double() - truth).abs()
    allowed = 2 * (torch_same_dtype.double() - truth).abs().max()
    magnitude = truth.abs().max() if magnitude is None else magnitude
    if dtype == torch.float64:
        units *= 64  # the truth is no better
    assert (error <= allowed + units * torch.finfo(dtype).eps * magnitude).all(), (what, error.max(), allowed)


def torch_batch_norm(x, weight, bias, dtype, activation="none", residual=None, dy=None):
    """Output, gradients and statistics by torch in ``dtype``, and the values that go with them."""
    x = x.detach().to(dtype).requires_grad_()
    weight, bias = (
        t.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for t in (weight, bias)
    )
    residual = None if residual is None else residual.detach().to(dtype).requires_grad_()
    z = F.batch_norm(x, None, None, weight, bias, training=True)
    z = z if residual is None else z + residual
    y = ACTIVATIONS[activation](z)
    grads = torch.autograd.grad(
        y, [x, weight, bias] + ([residual] if residual is not None else []), dy.to(dtype)
    )
    return y.detach(), grads


@pytest.mark.parametrize(
    ("shape", "channels_last", "on_chip", "dtype"),
    [
        pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}")
        for case in cases([shape for shape in SHAPES if shape[0] * torch.Size(shape[2]).numel() > 1])
        for dtype in emulator.DTYPES
        if not (case.values[2] and dtype == torch.float64)  # float64 always takes two launches
    ],
)
def test_training_forward_and_backward(dtype, shape, channels_last, on_chip):
    c = shape[1]
    wide = emulator.acc_dtype(dtype)
    for seed, shift in enumerate((0, 1)):
        emulator.configure(seed=seed, multiprocessors=1 + 3 * seed)
        x, dy = (make(shape, dtype, channels_last, shift, m) for m in (0.5, 0.1))
        weight, bias = torch.randn(c, dtype=wide), torch.randn(c, dtype=wide)
        layer = BatchNorm(channels_last, weight=weight, bias=bias, on_chip=on_chip)
        y, statistics = layer.train(x)
        truth, truth_grads = torch_batch_norm(x, weight, bias, torch.float64, dy=dy)
        same, same_grads = torch_batch_norm(x, weight, bias, dtype, dy=dy)
        check(y, same, truth, dtype, "y")
        flat = x.double().transpose(0, 1).reshape(c, -1)
        invstd = 1 / (flat.var(1, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(statistics[0].double(), flat.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics[1].double(), invstd, rtol=1e-5, atol=0)
        got = layer.backward(dy, x, statistics)
        for name, mine, same_g, truth_g in zip(
            ("dx", "dweight", "dbias"), got, same_grads, truth_grads, strict=False
        ):
            kind = dtype if name == "dx" else wide
            magnitude = dy.abs().sum().double() / c if name != "dx" else None
            check(mine, same_g, truth_g, kind, name, magnitude=magnitude)


@pytest.mark.parametrize(
    ("shape", "channels_last", "on_chip"), cases([(4, 8, (9, 8)), (3, 5, (7,)), (50, 64, (1,))])
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_schedule_or_repetition(shape, dtype, channels_last, on_chip):
    x, dy = make(shape, dtype, channels_last), make(shape, dtype, channels_last)
    layer = BatchNorm(channels_last, on_chip=on_chip)
    results = []
    for seed in (0, 1, 2, 3):
        emulator.configure(seed=seed, resident_blocks=1 + seed)
        y, statistics = layer.train(x)
        results.append((y, statistics, *layer.backward(dy, x, statistics)[:3]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [1, 1e2, 1e3, 1e4])
def test_variance_survives_a_large_mean(ratio, channels_last):
    emulator.configure(multiprocessors=4)
    x = make((16, 16, (40,)), torch.float32, channels_last, mean=ratio, std=1.0)
    packed = BatchNorm(channels_last).moments(x)
    flat = x.double().transpose(0, 1).reshape(16, -1)
    variance = packed[16:32].double() / flat.shape[1]
    torch.testing.assert_close(variance, flat.var(1, correction=0), rtol=1e-4, atol=0)
    assert packed[32:].tolist() == [640.0, 0.0]
    _, statistics = BatchNorm(channels_last, on_chip=True).train(x)
    torch.testing.assert_close(
        statistics[1].double(), (flat.var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-4, atol=0
    )


def test_more_partials_than_a_thread_waits_for():
    # 17 slices of 256 channels, one thread each in the last block.
    emulator.configure(seed=1, multiprocessors=16)
    x = make((2170, 256, (1,)), torch.bfloat16, True, mean=3.0)
    packed, flat = BatchNorm(True).moments(x).double(), x.double().squeeze(2)
    torch.testing.assert_close(packed[:256], flat.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(packed[256:512] / 2170, flat.var(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@both_launches
def test_constant_input_has_variance_zero(channels_last, on_chip):
    x = format_of(torch.full((6, 8, 33), 1234.567), channels_last)
    y, statistics = BatchNorm(channels_last, on_chip=on_chip).train(x)
    assert torch.equal(statistics[1], torch.full((8,), 1 / torch.tensor(1e-5).sqrt()))
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("narrow", [False, True])
@both_launches
def test_running_statistics(momentum, channels_last, narrow, on_chip):
    c, dtype = 72 if on_chip else 70, torch.bfloat16 if narrow else torch.float32
    mean, var, batches = torch.zeros(c, dtype=dtype), torch.ones(c, dtype=dtype), torch.tensor(0)
    reference = torch.nn.BatchNorm1d(c, momentum=momentum)
    layer = BatchNorm(
        channels_last,
        running_mean=mean,
        running_var=var,
        batches=batches,
        momentum=momentum,
        on_chip=on_chip,
    )
    for step in range(3):
        emulator.configure(seed=step)
        x = make((5, c, (6,)), dtype, channels_last)
        layer.train(x)
        reference(x.float())
    assert batches.item() == 3
    tolerance = {"rtol": 0.02, "atol": 0.02} if narrow else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(mean.float(), reference.running_mean, **tolerance)
    torch.testing.assert_close(var.float(), reference.running_var, **tolerance)


def test_a_factor_of_one_heals_nan():
    mean, var = torch.full((4,), float("nan")), torch.full((4,), float("nan"))
    x = make((5, 4, (6,)), torch.float32, False)
    BatchNorm(running_mean=mean, running_var=var, momentum=1.0).train(x)
    torch.testing.assert_close(mean, x.transpose(0, 1).reshape(4, -1).mean(1))
    assert torch.isfinite(var).all()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
@both_launches
def test_non_finite_batches_are_skipped_and_counted(bad, channels_last, on_chip):
    emulator.configure(seed=1 + on_chip)
    c = 72 if on_chip else 70
    mean, var = torch.zeros(c), torch.ones(c)
    batches, skipped = torch.tensor(4), torch.tensor(7)
    x = make((5, c, (6,)), torch.float32, channels_last)
    if bad is not None:
        x[3, 69, 2] = bad
    layer = BatchNorm(
        channels_last, running_mean=mean, running_var=var, batches=batches, skipped=skipped, on_chip=on_chip
    )
    y, _ = layer.train(x)
    if bad is None:
        assert (batches.item(), skipped.item()) == (5, 7)
        assert not torch.equal(mean, torch.zeros(c))
        return
    assert (batches.item(), skipped.item()) == (4, 8)
    assert torch.equal(mean, torch.zeros(c))
    assert torch.equal(var, torch.ones(c))
    assert torch.isnan(y[:, 69]).any()
    assert torch.isfinite(y[:, :69]).all()
    assert torch.isfinite(y[:, 70:]).all()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", emulator.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, (4,)), (5, 64, (9,)), (3, 7, (37,)), (2, 1, (4097,))], ids=str)
def test_evaluation_forward_and_backward(shape, dtype, channels_last):
    c, wide = shape[1], emulator.acc_dtype(dtype)
    x, dy = make(shape, dtype, channels_last), make(shape, dtype, channels_last)
    weight, bias = torch.randn(c, dtype=dtype), torch.randn(c, dtype=dtype)
    mean, var = torch.randn(c, dtype=wide), torch.rand(c, dtype=wide) + 0.5
    layer = BatchNorm(channels_last, weight=weight, bias=bias, running_mean=mean, running_var=var)
    y, statistics = layer.eval(x)
    leaf = [t.double().requires_grad_() for t in (x, weight, bias)]
    truth = F.batch_norm(leaf[0], mean.double(), var.double(), leaf[1], leaf[2])
    same = F.batch_norm(x.to(wide), mean, var, weight.to(wide), bias.to(wide)).to(dtype)
    check(y, same, truth, dtype, "y")
    assert torch.equal(statistics[0], mean)
    torch.testing.assert_close(statistics[1], 1 / (var + 1e-5).sqrt())
    dx, dw, db, _ = layer.backward(dy, x, statistics, batch_statistics=False)
    gx, gw, gb = torch.autograd.grad(truth, leaf, dy.double())
    for mine, want in ((dx, gx), (dw, gw), (db, gb)):
        check(mine, want.to(dtype), want, dtype, "gradient", units=2)
    # Only the input's gradient, without the input.
    layer_x = layer.layer(x)
    alone = torch.full_like(x, float("nan"))
    emulator.module().batch_norm_backward(
        emulator.DTYPES.index(dtype), layer_x, False, dy.data_ptr(), 0, statistics.data_ptr(), 0,
        alone.data_ptr(), 0, 0, 0,
    )  # fmt: skip
    assert torch.equal(alone, dx)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
@both_launches
def test_epilogues(activation, with_residual, channels_last, on_chip):
    for dtype in (torch.float32, torch.bfloat16):
        shape = (3, 6 if activation == "silu" and not on_chip else 8, (35,))
        c = shape[1]
        x, dy, r = (make(shape, dtype, channels_last) for _ in range(3))
        weight, bias = torch.randn(c), torch.randn(c)
        residual = r if with_residual else None
        layer = BatchNorm(
            channels_last,
            weight=weight,
            bias=bias,
            residual=residual,
            activation=activation,
            on_chip=on_chip,
        )
        y, statistics = layer.train(x)
        got = layer.backward(dy, x, statistics, need_residual=with_residual)
        truth, truth_grads = torch_batch_norm(x, weight, bias, torch.float64, activation, residual, dy)
        same, same_grads = torch_batch_norm(x, weight, bias, dtype, activation, residual, dy)
        check(y, same, truth, dtype, "y", units=2)
        for mine, same_g, truth_g, kind in zip(
            got, same_grads, truth_grads, (dtype, torch.float32, torch.float32, dtype), strict=False
        ):
            check(mine, same_g, truth_g, kind, "gradient", units=2)


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@both_launches
def test_dropout_and_sign_bits(activation, shift, channels_last, on_chip):
    # In two launches rows straddle chunks, and the last chunk is ragged.
    for dtype in emulator.DTYPES[: 3 if on_chip else 4]:
        shape = (3, 8, (16,)) if on_chip else (3, 5, (7,))
        x, dy, residual = (make(shape, dtype, channels_last, shift) for _ in range(3))
        key, n = mask.key(9, 1), x.numel()
        bits = torch.full(((n + 7) // 8,), 0xFF, dtype=torch.uint8)
        layer = BatchNorm(
            channels_last,
            residual=residual,
            activation=activation,
            key=key,
            p=0.3,
            sign_bits=bits,
            on_chip=on_chip,
        )
        y, statistics = layer.train(x)
        order = (0, 2, 1) if channels_last else (0, 1, 2)

        def in_memory(t, order=order):
            return t.permute(order).reshape(-1)

        same = {"residual": residual, "on_chip": on_chip}
        plain, _ = BatchNorm(channels_last, activation=activation, **same).train(x)
        keep = mask.keep_mask((n,), 0.3, key)
        z, _ = BatchNorm(channels_last, **same).train(x)
        want = torch.where(keep, in_memory(plain).double() / 0.7, torch.zeros(n, dtype=torch.float64))
        torch.testing.assert_close(in_memory(y).double(), want, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        unpacked = (bits[:, None] >> torch.arange(8) & 1).reshape(-1).bool()
        assert not unpacked[n:].any()
        positive = in_memory(z)
        assert torch.equal(unpacked[:n][positive != 0], (positive > 0)[positive != 0])
        # The sign bits stand in for z + residual.
        kept_bits = layer.backward(dy, x, statistics, need_residual=True)
        layer.tensors["sign_bits"] = None
        recomputed = layer.backward(dy, x, statistics, need_residual=True)
        assert all(torch.equal(a, b) for a, b in zip(kept_bits, recomputed, strict=True))
        assert torch.equal(in_memory(kept_bits[3])[~keep], torch.zeros((~keep).sum(), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merge_of_processes_with_an_empty_one(dtype):
    c = 300
    parts = [make((n, c, (5,)), dtype, False, mean=3.0) for n in (4, 1, 9)]
    packed = [BatchNorm().moments(x) for x in parts]
    packed.insert(1, torch.zeros_like(packed[0]))
    mean, variance = (emulator.poisoned((c,), dtype) for _ in range(2))
    count = emulator.poisoned((1,), dtype)
    running_mean, running_var, batches = (
        torch.zeros(c, dtype=dtype),
        torch.ones(c, dtype=dtype),
        torch.tensor(0),
    )
    layer = BatchNorm(running_mean=running_mean, running_var=running_var, batches=batches, momentum=None)

    def merge(packed):
        stacked = torch.stack(packed)
        emulator.module().batch_norm_merge(
            emulator.DTYPES.index(dtype), layer.layer(parts[0]), stacked.data_ptr(), len(packed),
            mean.data_ptr(), variance.data_ptr(), count.data_ptr(),
        )  # fmt: skip

    merge(packed)
    flat = torch.cat(parts).double().transpose(0, 1).reshape(c, -1)
    torch.testing.assert_close(mean.double(), flat.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.double(), flat.var(1, correction=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(running_var.double(), flat.var(1), rtol=1e-5, atol=0)
    assert (count.item(), batches.item()) == (70.0, 1)
    before = running_mean.clone(), running_var.clone()
    merge([BatchNorm().moments(make((1, c, (1,)), dtype, False)), packed[1]])
    assert (count.item(), batches.item()) == (1.0, 2)
    assert torch.equal(running_mean, before[0])
    assert torch.equal(running_var, before[1])  # one value has no unbiased variance


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@both_launches
def test_evaluation_statistics_in_training(channels_last, on_chip):
    # The backward pass of frozen statistics, with the gradients of weight and bias.
    x, dy = (make((6, 16, (5,)), torch.float32, channels_last) for _ in range(2))
    weight, bias = torch.randn(16), torch.randn(16)
    leaf = [t.double().requires_grad_() for t in (x, weight, bias)]
    mean, var = torch.randn(16), torch.rand(16) + 0.5
    truth = F.batch_norm(leaf[0], mean.double(), var.double(), leaf[1], leaf[2])
    want = torch.autograd.grad(truth, leaf, dy.double())
    layer = BatchNorm(channels_last, weight=weight, bias=bias, on_chip=on_chip)
    statistics = torch.stack((mean, (var.double() + 1e-5).rsqrt().float()))
    got = layer.backward(dy, x, statistics, batch_statistics=False)
    for mine, one in zip(got, want, strict=False):
        torch.testing.assert_close(mine.double(), one, rtol=1e-5, atol=1e-5)


# What a layer of ResNet-50 takes: (N, C, H, W), channels_last, bytes per element, tensors -> blocks, threads
# side by side and KiB of shared memory, or None: two launches.
SHAPES_ON_CHIP = [
    ((32, 512, 7, 7), False, 2, 1, (512, 1, 4)),
    ((32, 512, 7, 7), False, 4, 2, (512, 1, 16)),
    ((32, 2048, 7, 7), False, 2, 1, (2048, 1, 4)),
    ((32, 256, 14, 14), False, 4, 2, (256, 1, 64)),
    ((64, 256, 14, 14), False, 4, 1, (256, 1, 56)),
    ((32, 128, 28, 28), False, 2, 2, (128, 1, 104)),
    ((32, 128, 28, 28), False, 4, 2, None),
    ((32, 64, 56, 56), False, 2, 1, None),
    ((32, 32, 14, 14), False, 4, 1, (32, 1, 32)),
    ((32, 32, 14, 14), False, 4, 2, None),
    ((32, 2048, 7, 7), True, 2, 1, (128, 2, 52)),
    ((32, 512, 7, 7), True, 4, 1, (64, 1, 56)),
    ((32, 256, 14, 14), True, 2, 1, None),
    ((32, 250, 2, 2), True, 4, 1, None),
    ((256, 256, 1, 1), True, 4, 2, (32, 1, 16)),
    ((256, 2048, 1, 1), True, 4, 2, (128, 2, 32)),
    ((4096, 256, 1, 1), True, 4, 1, None),
]


@pytest.mark.parametrize(("shape", "channels_last", "itemsize", "tensors", "want"), SHAPES_ON_CHIP, ids=str)
def test_which_layers_take_one_launch(shape, channels_last, itemsize, tensors, want):
    layer = BatchNorm(channels_last).layer(torch.empty(shape, device="meta"))
    got = emulator.module().on_chip_shape(layer, itemsize, tensors)
    assert got == ([] if want is None else [*want[:2], want[2] * 1024])

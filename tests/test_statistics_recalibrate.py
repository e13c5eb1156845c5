"""Recalibrated buffers against float64 `var_mean` of the concatenated activations; nothing else changes."""

import copy
import random

import pytest
import torch
from torch import nn

import modeprobe as mp
from modeprobe.ops.backend import why_not
from modeprobe.statistics import recalibrate
from modeprobe.statistics.pooled import Pool, batch_moments

pytestmark = pytest.mark.rung("reference")


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


MIXED = (1, 2, 1024, 1, 37)


def population(parts):
    """Mean and unbiased variance per channel of all values, in float64."""
    values = torch.cat([part.detach().double().transpose(0, 1).flatten(1) for part in parts], 1)
    return values.mean(1), values.var(1)


def close(layer, parts, rtol=1e-5):
    mean, variance = population(parts)
    scale = variance.sqrt()
    # a float32 mean cannot be nearer than its own rounding
    assert ((layer.running_mean.double() - mean).abs() <= rtol * scale + 2**-24 * mean.abs()).all()
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=rtol, atol=0)


def state(model):
    """Everything that must not change, bit for bit: NaN-proof."""
    entries = model.state_dict().items()
    tensors = {name: tensor.clone().view(torch.uint8) for name, tensor in entries if tensor.dim()}
    counters = {name: int(tensor) for name, tensor in entries if not tensor.dim()}
    return tensors, counters, [module.training for module in model.modules()]


def same(a, b):
    return a[1:] == b[1:] and all(torch.equal(a[0][name], b[0][name]) for name in a[0] | b[0])


class Probe(nn.Module):
    """Keeps what it is given, then normalises."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.seen = layer, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.layer(x)


def two_layers():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3), nn.BatchNorm1d(3))


@pytest.fixture(params=["native", "reference"])
def backend(request):
    """The kernel that reads each activation once, and plain torch."""
    why = why_not(request.param, "cpu")
    if why:
        pytest.skip(why)
    with mp.backend(request.param):
        yield request.param


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("order", ["shuffled", "sorted"])
def test_offset_and_order(offset, order, backend):
    layer = nn.BatchNorm1d(6)
    data = torch.randn(sum(MIXED), 6) * torch.tensor([1, 2, 0.5, 1, 1, 3]) + offset
    if order == "sorted":
        data = data.sort(0).values
    batches = data.split(MIXED)
    report = recalibrate(layer, batches)
    close(layer, batches)
    assert layer.num_batches_tracked == len(MIXED)
    assert report.layers[0].values == len(data)


@pytest.mark.parametrize("offset", [0.0, 25.0, 1e2, 1e4])
def test_kernels_that_round_their_means(offset, monkeypatch):
    """As on a GPU, in float32: far from zero that would cost the pooled variance its digits."""
    from modeprobe.statistics import measure, pooled

    def rounded(x):
        _, mean, m2 = batch_moments(x)
        return len(x), mean.float().double(), m2.float().double()

    monkeypatch.setattr(pooled, "kernel_moments", rounded)
    monkeypatch.setattr(measure.Measure, "instead", lambda *_: None)
    layer = nn.BatchNorm1d(6)
    batches = (torch.randn(1500, 6).sort(0).values + offset).split(500)
    recalibrate(layer, batches)
    mean, variance = population(batches)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=2**-23, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-5, atol=0)


def test_one_call_measures_and_normalises(monkeypatch):
    """The training kernel does both for layers of these exact classes, and so may any other way."""
    from modeprobe.statistics import measure

    class Two(nn.Module):
        def __init__(self, package):
            super().__init__()
            self.norms = nn.ModuleList(package.BatchNorm2d(3) for _ in range(2))
            self.single = nn.BatchNorm1d(3)

        def forward(self, x):
            x = self.norms[1](self.norms[0](x).abs() + self.norms[0](x * 2))
            return self.single(x.mean((2, 3)))

    batches = [torch.randn(n, 3, 4, 4) * 2 + 5 for n in (6, 1, 30)]
    fused = measure.Measure.instead
    calls = []

    def counted(self, *args):
        calls.append(fused(self, *args))
        return calls[-1]

    for package in (nn, mp.nn):
        found = []
        for instead in (counted, lambda *_: None):
            monkeypatch.setattr(measure.Measure, "instead", instead)
            model = Two(package)
            recalibrate(model, batches)
            found.append(dict(model.named_buffers()))
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
        assert [call is None for call in calls] == [False] * 4 + [False] * 3 + [True] + [False] * 4
        calls.clear()
    monkeypatch.setattr(measure.Measure, "instead", counted)
    model = Two(nn)
    mp.swap(model, backend="reference")
    recalibrate(model, batches)
    assert set(calls) == {None}  # a layer's own backend is the one that runs


@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("swapped", [False, True])
def test_layouts_and_dtypes(format_, dtype, swapped, backend):
    layer = (mp.nn if swapped else nn).BatchNorm2d(5).to(dtype)
    batches = [
        (torch.randn(n, 5, 3, 7, dtype=dtype) + torch.arange(5).view(1, 5, 1, 1) * 2500).to(
            memory_format=format_
        )
        for n in (1, 2, 40)
    ]
    recalibrate(layer, batches)
    close(layer, batches, rtol=1e-5 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_pool_in_float32(dtype, backend):
    """Half-precision activations, float32 buffers: as under autocast."""
    layer = nn.BatchNorm2d(4)
    batches = [(torch.randn(n, 4, 5, 5) + 3).to(dtype) for n in (2, 30)]
    recalibrate(layer, batches)
    close(layer, batches)


def test_lower_layers_normalise_with_the_batch():
    """One pass: the second layer's population lies behind batch statistics, as in a training forward."""
    model = two_layers()
    batches = [torch.randn(n, 5) * 2 + 1 for n in (4, 64)]
    recalibrate(model, batches)
    inputs = []
    trained = copy.deepcopy(model).train()
    trained[4].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for batch in batches:
        trained(batch)
    close(model[1], [model[0](batch) for batch in batches])
    close(model[4], inputs)


@pytest.mark.parametrize("sizes", [(1, 2, 64), (1, 1, 1, 1, 63)])
def test_layerwise_is_the_population_of_evaluation(sizes, backend):
    """Behind recalibrated layers batches do not matter, and evaluation sees exactly that population."""
    model = two_layers()
    data = torch.randn(sum(sizes), 5).sort(0).values * 3
    recalibrate(model, data.split(sizes), layerwise=True)
    model.eval()
    close(model[1], [model[0](data)])
    close(model[4], [model[:4](data)])
    assert model[1].num_batches_tracked == len(sizes)


def test_single_values_use_what_is_pooled():
    """A batch of one value per channel is normalised with the pooled statistics, its own value included."""
    model = two_layers()
    first, single = torch.randn(30, 5), torch.randn(1, 5)
    recalibrate(model, [first, single])
    hidden = [model[0](first).double(), model[0](single).double()]
    mean, variance = hidden[0].mean(0), hidden[0].var(0, correction=0)
    pooled = torch.cat(hidden)
    behind = [
        (hidden[0] - mean) / (variance + 1e-5).sqrt(),
        (hidden[1] - pooled.mean(0)) / (pooled.var(0, correction=0) + 1e-5).sqrt(),
    ]
    close(model[4], [model[3](part.float().relu()) for part in behind], rtol=2e-5)


@pytest.mark.parametrize("sound", [True, False])
def test_single_values_before_there_is_a_variance(sound):
    """They are normalised with the layer's buffers, or become zero where those are unusable."""
    model = two_layers()
    if not sound:
        model[1].running_var.fill_(torch.nan)
    first, single = torch.randn(30, 5), torch.randn(1, 5)
    recalibrate(model, [single, single, first])
    hidden, alone = model[0](first).double(), model[0](single).double()
    mean, variance = hidden.mean(0), hidden.var(0, correction=0)
    alone = alone / (1 + 1e-5) ** 0.5 if sound else torch.zeros_like(alone)
    behind = [alone, alone, (hidden - mean) / (variance + 1e-5).sqrt()]
    close(model[4], [model[3](part.float().relu()) for part in behind], rtol=2e-5)


@pytest.mark.parametrize("swapped", [False, True])
def test_reused_layer(swapped):
    probe = Probe((mp.nn if swapped else nn).BatchNorm1d(4))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.probe, self.linear = probe, nn.Linear(4, 4)

        def forward(self, x):
            return self.probe(self.linear(self.probe(x)) * 3)

    model = Twice()
    batches = [torch.randn(n, 4) + 1 for n in (8, 3, 1)]
    recalibrate(model, batches)
    close(probe.layer, probe.seen)
    assert probe.layer.num_batches_tracked == 6
    probe.seen.clear()
    recalibrate(model, batches, layerwise=True)
    close(probe.layer, probe.seen[6:])  # the first six calls are those that find the order
    assert probe.layer.num_batches_tracked == len(probe.seen[6:]) == 6


def test_heals_nan_and_writes_in_place():
    layer = nn.BatchNorm1d(3)
    layer.running_mean.fill_(torch.nan)
    layer.running_var.fill_(torch.inf)
    buffers = dict(layer.named_buffers())
    data = torch.randn(50, 3)
    recalibrate(layer, data.split(13))
    close(layer, [data])
    assert all(getattr(layer, name) is buffer for name, buffer in buffers.items())


def test_nonfinite_batches():
    data = torch.randn(40, 3)
    bad = torch.randn(10, 3)
    bad[3, 1] = torch.nan
    layer = nn.BatchNorm1d(3)
    with pytest.warns(RuntimeWarning, match="1 of 3 batches"):
        report = recalibrate(layer, [data[:20], bad, data[20:]])
    mean, variance = population([data, bad])
    clean_mean, clean_variance = population([data])
    mean[1], variance[1] = clean_mean[1], clean_variance[1]
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-5, atol=0)
    assert report.layers[0].left_out == 1
    before = state(layer)
    with pytest.raises(ValueError, match="1 of 3 batches gave NaN or Inf; nothing was written"):
        recalibrate(layer, [data[:20], bad, data[20:]], nonfinite="raise")
    with pytest.raises(ValueError, match="no finite batch"):
        recalibrate(layer, [bad])
    assert same(before, state(layer))


def frozen_model(kind):
    model = two_layers()
    for _ in range(3):
        model(torch.randn(8, 5))
    if kind == "mode":
        model.train()
        model[1].eval()
    elif kind == "parameters":
        model.eval()
        model[1].requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", ["mode", "parameters"])
@pytest.mark.parametrize("layerwise", [False, True])
def test_frozen_layers_are_left_alone_and_used(kind, layerwise):
    model = frozen_model(kind)
    before = state(model[1])
    batches = [torch.randn(n, 5) + 2 for n in (8, 30)]
    report = recalibrate(model, batches, layerwise=layerwise)
    assert same(before, state(model[1]))
    assert report.layers[0].state.startswith("frozen")
    frozen = copy.deepcopy(model).eval()
    close(model[4], [frozen[:4](batch) for batch in batches])
    recalibrate(model, batches, layers=["1"])
    close(model[1], [model[0](batch) for batch in batches])


def test_training_with_frozen_parameters_is_not_frozen_statistics():
    """As in torch: requires_grad=False does not stop a layer in training from updating its statistics."""
    model = two_layers()
    model[1].requires_grad_(False)
    assert recalibrate(model, [torch.randn(9, 5)]).layers[0].state == "recalibrated"


def test_layers_without_running_statistics():
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4))
    report = recalibrate(model, [torch.randn(9, 4)])
    assert [row.state for row in report.layers] == ["no running statistics", "recalibrated"]
    assert "BatchNorm" in recalibrate(nn.Linear(2, 2), [torch.randn(3, 2)]).verdict


def test_modes_random_states_and_other_buffers_are_restored():
    numpy = pytest.importorskip("numpy")

    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))
            self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout()
            self.other = nn.InstanceNorm1d(4, track_running_stats=True)

        def forward(self, x):
            self.seen += 1
            random.random()
            numpy.random.random()
            return self.other(self.drop(self.norm(x)).unsqueeze(-1).expand(-1, -1, 3))

    model = Stateful()
    model.drop.training = False
    before = state(model)
    objects = dict(model.named_buffers())
    loader = torch.utils.data.DataLoader(torch.randn(20, 4), batch_size=6, shuffle=True)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    recalibrate(model, loader, mode="train")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    numpy.testing.assert_equal(numpy.random.get_state(), states[2])
    assert all(buffer is objects[name] for name, buffer in model.named_buffers())
    model.norm.reset_running_stats()
    assert same(before, state(model))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("layerwise", [False, True])
def test_interruption_leaves_the_model_bitwise(error, layerwise):
    model = two_layers()
    model(torch.randn(8, 5))
    model[1].running_mean[0] = torch.nan
    model[2].training = False
    before = state(model)

    class Loader:
        walks = 0

        def __iter__(self):
            self.walks += 1
            yield torch.randn(6, 5)
            if self.walks >= (3 if layerwise else 1):
                raise error("stop")

    with pytest.raises(error):
        recalibrate(model, Loader(), layerwise=layerwise)
    assert same(before, state(model))
    assert not any("forward" in vars(module) for module in model.modules())


def test_interrupted_inside_a_layer():
    """Also between the hooks, where a layer's buffers are put aside."""
    model = two_layers()
    before, objects = state(model), dict(model.named_buffers())
    model[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, [torch.randn(6, 5)])
    assert same(before, state(model))
    assert all(buffer is objects[name] for name, buffer in model.named_buffers())


def test_loaders():
    data, target = torch.randn(24, 5), torch.zeros(24)
    expected = two_layers()
    recalibrate(expected, data.split(6))

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(expected)

        def forward(self, features, extra=None):
            return self.inner(features)

    def check(model, loader, **options):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.reset_running_stats()
        recalibrate(model, loader, **options)
        inner = getattr(model, "inner", model)
        torch.testing.assert_close(list(inner.buffers()), list(expected.buffers()))

    plain = copy.deepcopy(expected)
    check(plain, iter(data.split(6)))
    check(plain, list(zip(data.split(6), target.split(6), strict=True)))
    check(plain, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data, target), batch_size=6))
    check(Named(), [{"features": part, "extra": 1} for part in data.split(6)])
    check(plain, range(4), call=lambda model, i: model(data.split(6)[i]))
    check(plain, [*data.split(6), data[:5]], batches=4)
    with pytest.raises(TypeError, match="iterable of batches, got Tensor"):
        recalibrate(plain, data)
    with pytest.raises(ValueError, match="iterated again"):
        recalibrate(plain, iter(data.split(6)), layerwise=True)
    with pytest.raises(ValueError, match="no BatchNorm layer"):
        recalibrate(plain, data.split(6), layers=["nowhere"])


def test_last_and_momentum():
    data = torch.randn(60, 3).split(10)
    layer = nn.BatchNorm1d(3)
    recalibrate(layer, data, last=2)
    close(layer, data[-2:])
    recalibrate(layer, data, momentum=0.25)
    weights = torch.tensor([0.75**age for age in range(5, -1, -1)], dtype=torch.float64).repeat_interleave(10)
    values = torch.cat(data).double()
    mean = (weights[:, None] * values).sum(0) / weights.sum()
    m2 = (weights[:, None] * (values - mean).square()).sum(0)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), m2 / (weights.sum() - 1), rtol=1e-5, atol=0)
    recalibrate(layer, data[2:], momentum=0.25)
    short = layer.running_var.clone()
    recalibrate(layer, data, momentum=0.25, last=4)
    torch.testing.assert_close(layer.running_var, short)
    # What is left out does not let the others age.
    broken = [batch for part in data for batch in (part, part * torch.nan)]
    with pytest.warns(RuntimeWarning, match="left out"):
        recalibrate(layer, broken, momentum=0.25, last=8)
    torch.testing.assert_close(layer.running_var, short)
    with pytest.warns(RuntimeWarning, match="left out"):
        recalibrate(layer, broken, momentum=0.25)
    torch.testing.assert_close(layer.running_var.double(), m2 / (weights.sum() - 1), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="momentum"):
        recalibrate(layer, data, momentum=1.5)


def test_swapped_with_activation_and_residual():
    """The layer's input is measured, not what its epilogue makes of it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), mp.nn.BatchNorm1d(4, activation="relu")
            self.last = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.last(self.norm(self.linear(x), x))

    model = Block()
    batches = [torch.randn(n, 4) * 3 for n in (5, 64)]
    recalibrate(model, batches, layerwise=True)
    model.eval()
    close(model.norm, [model.linear(batch) for batch in batches])
    close(model.last, [model.norm(model.linear(batch), batch) for batch in batches])


def test_wrappers_and_subclasses():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.DataParallel(nn.Sequential(nn.Conv2d(2, 3, 1), Activated(3), nn.SyncBatchNorm(3)))
    batches = [torch.randn(n, 2, 4, 4) for n in (3, 5)]
    recalibrate(model, batches, layerwise=True)
    inner = model.module.eval()
    close(inner[1], [inner[0](batch) for batch in batches])
    close(inner[2], [inner[:2](batch) for batch in batches])
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    own = model[0].forward
    model[0].forward = lambda x: own(x).relu()  # on the instance, as accelerate's hooks do
    recalibrate(model, batches)
    normalised = [nn.functional.batch_norm(batch, None, None, training=True) for batch in batches]
    close(model[1], [batch.relu() for batch in normalised])


@pytest.mark.parametrize("shape", [(100_000, 3), (64, 3, 9), (8, 3, 20, 20)])
def test_moments_do_not_cancel(shape, backend):
    """A few roundings from float64 up to mean / std = 1e4, where E[x^2] - E[x]^2 has no digit left."""
    x = torch.randn(shape) + 1e4
    n, mean, m2 = Pool([shape[1]], x.device).measure(0, x)
    dims = [0, *range(2, len(shape))]
    torch.testing.assert_close(mean, x.double().mean(dims), rtol=1e-10, atol=0)
    torch.testing.assert_close(m2 / n, x.double().var(dims, correction=0), rtol=2e-6, atol=0)
    assert batch_moments(torch.empty(0, 3))[0] == 0
    assert Pool([shape[1]], x.device).measure(0, torch.full(shape, 3.3))[2].eq(0).all()

"""Statistics policies and contexts: what reaches the buffers, and when."""

import copy

import pytest
import torch
from torch import nn

import modeprobe as mp

pytestmark = pytest.mark.rung("reference")


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SHAPES = {1: (4,), 2: (4, 5, 3), 3: (4, 2, 3, 2)}
CLASSES = {1: mp.nn.BatchNorm1d, 2: mp.nn.BatchNorm2d, 3: mp.nn.BatchNorm3d}


def batch(n, dims=1, shift=0.0):
    channels, *rest = SHAPES[dims]
    return torch.randn(n, channels, *rest) * 2 + shift


def buffers(layer):
    return [buffer.clone() for buffer in (layer.running_mean, layer.running_var, layer.num_batches_tracked)]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_pending_micro_batches_equal_their_union(dims, momentum):
    layer, whole = (CLASSES[dims](4, momentum=momentum, statistics=policy) for policy in ("pending", "ema"))
    for step in range(3):
        parts = [batch(n, dims, shift=step) for n in (2, 9, 5)]
        before = buffers(layer)
        outputs = [layer(part) for part in parts]
        assert equal(before, buffers(layer))
        torch.testing.assert_close(outputs[1], nn.functional.batch_norm(parts[1], None, None, training=True))
        layer.commit()
        layer.commit()  # nothing is pending any more
        whole(torch.cat(parts))
        torch.testing.assert_close(layer.running_mean, whole.running_mean, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(layer.running_var, whole.running_var, rtol=2e-6, atol=0)
        assert layer.num_batches_tracked == whole.num_batches_tracked == step + 1


def test_pending_trains_and_evaluates_as_torch():
    layer, theirs = mp.nn.BatchNorm1d(4, statistics="pending"), nn.BatchNorm1d(4)
    x = batch(16).requires_grad_()
    y = x.detach().clone().requires_grad_()
    for module, value in ((layer, x), (theirs, y)):
        module(value).pow(3).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    layer.eval()
    assert torch.allclose(layer(x), x / (1 + layer.eps) ** 0.5)  # not committed: still (0, 1)


def test_discard_and_policy_changes():
    layer = mp.nn.BatchNorm1d(4, statistics="pending")
    before = buffers(layer)
    layer(batch(8))
    layer.discard()
    layer.commit()
    assert equal(before, buffers(layer))
    layer(batch(8))
    layer.statistics = "pending"  # set again: what was pending is forgotten
    layer.commit()
    assert equal(before, buffers(layer))
    layer.statistics = "ema"
    for method in (layer.commit, layer.discard):
        with pytest.raises(RuntimeError, match="policy is 'ema'"):
            method()
    with pytest.raises(ValueError, match="got 'mean'"):
        layer.statistics = "mean"
    with pytest.raises(ValueError, match="needs running statistics"):
        mp.nn.BatchNorm1d(4, track_running_stats=False, statistics="pending")


def test_pending_nonfinite():
    good, bad = batch(8), batch(8)
    bad[0, 1] = torch.nan
    whole = mp.nn.BatchNorm1d(4)
    whole(good)
    layer = mp.nn.BatchNorm1d(4, statistics="pending", nonfinite="skip")
    layer(good)
    layer(bad)
    layer.commit()
    torch.testing.assert_close(layer.running_var, whole.running_var)
    assert layer.skipped_batches == 1
    layer = mp.nn.BatchNorm1d(4, statistics="pending")
    layer(bad)
    layer.commit()
    assert layer.running_mean.isnan().tolist() == [False, True, False, False]
    for momentum in (1.0, None):  # a factor of 1 assigns
        layer, whole = (mp.nn.BatchNorm1d(4, momentum=momentum, statistics=s) for s in ("pending", "ema"))
        layer.running_mean.fill_(torch.nan)
        layer.running_var.fill_(torch.nan)
        layer(good)
        layer.commit()
        whole(good)
        torch.testing.assert_close(dict(layer.state_dict()), dict(whole.state_dict()))


def test_pending_counts_a_checkpointed_batch_once():
    layer = mp.nn.BatchNorm1d(4, statistics="pending")
    x = batch(8).requires_grad_()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    layer(batch(4, shift=1))
    assert layer._pending[-1] == 12


def test_pending_keeps_its_digits_and_stays_out_of_the_state():
    layer = mp.nn.BatchNorm1d(4, statistics="pending")
    assert layer.state_dict().keys() == nn.BatchNorm1d(4).state_dict().keys()
    x = batch(8, shift=100)
    layer(x)
    layer.half().float()
    pending = layer._pending
    assert pending.dtype == torch.float64
    torch.testing.assert_close(pending[:4], x.double().mean(0), rtol=1e-6, atol=0)
    assert torch.equal(copy.deepcopy(layer)._pending, pending)
    assert torch.equal(layer.to("meta").to_empty(device="cpu")._pending, torch.zeros(9, dtype=torch.float64))


def test_skipped_step_leaves_the_buffers_untouched():
    """The loop of a GradScaler: commit after a step, discard after a skipped one."""
    model = nn.Sequential(mp.nn.BatchNorm1d(4), nn.Linear(4, 1))
    mp.set_statistics(model, "pending")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    history = []
    for overflow in (False, True, False):
        before = buffers(model[0])
        optimizer.zero_grad()
        loss = model(batch(8)).square().mean() * (torch.inf if overflow else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() < scale:
            mp.discard_statistics(model)
        else:
            mp.commit_statistics(model)
        history.append(equal(before, buffers(model[0])))
    assert history == [False, True, False]
    assert model[0].num_batches_tracked == 2


def test_cumulative_and_frozen():
    cumulative, theirs = mp.nn.BatchNorm1d(4, statistics="cumulative"), nn.BatchNorm1d(4, momentum=None)
    for _ in range(4):
        x = batch(8)
        cumulative(x)
        theirs(x)
    torch.testing.assert_close(buffers(cumulative), buffers(theirs))
    frozen = mp.nn.BatchNorm1d(4)
    frozen(batch(8, shift=3))
    frozen.statistics = "frozen"
    before = buffers(frozen)
    x = batch(1).requires_grad_()
    trained = frozen.train()(x)
    trained.sum().backward()
    assert equal(before, buffers(frozen))
    assert torch.equal(trained, frozen.eval()(x))
    assert frozen.weight.grad is not None
    assert "frozen" in repr(frozen)
    x = batch(8)
    with mp.batch_statistics(frozen):
        torch.testing.assert_close(frozen(x), nn.functional.batch_norm(x, None, None, training=True))
    assert equal(before, buffers(frozen))
    report = mp.recalibrate(nn.Sequential(frozen), [batch(8)])
    assert report.layers[0].state == 'frozen: statistics="frozen"'
    assert equal(before, buffers(frozen))


def test_swapped_models_and_policies():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(TypeError, match=r"1 is BatchNorm1d.*swap"):
        mp.set_statistics(model, "frozen")
    with pytest.raises(ValueError, match="policy must be one of"):
        mp.set_statistics(model, "none")
    mp.swap(model)
    mp.set_statistics(model, "pending")
    before = buffers(model[1])
    model(batch(8))
    assert equal(before, buffers(model[1]))
    mp.commit_statistics(model)
    assert not equal(before, buffers(model[1]))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_contexts(swapped, training):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    if swapped:
        mp.swap(model)
    model(batch(16, shift=2))
    model.train(training)
    model[2].eval()
    x, before = batch(8), [buffers(model[0]), buffers(model[2])]
    flags = [module.training for module in model.modules()]
    running = nn.functional.batch_norm(x, model[0].running_mean, model[0].running_var)
    own = nn.functional.batch_norm(x, None, None, training=True)
    for context, expected in ((mp.frozen_statistics, running), (mp.batch_statistics, own)):
        with context(model):
            torch.testing.assert_close(model[0](x), expected)
            assert model[1].training == training
            model(x)
        assert flags == [module.training for module in model.modules()]
        assert all(layer.track_running_stats for layer in (model[0], model[2]))
        assert equal(before[0] + before[1], buffers(model[0]) + buffers(model[2]))
        with pytest.raises(OSError), context(model):
            raise OSError
        assert flags == [module.training for module in model.modules()]


@pytest.mark.parametrize("policy", ["cumulative", "frozen", "pending"])
def test_compiles_in_one_graph(policy):
    layer = mp.nn.BatchNorm1d(4, statistics=policy)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for _ in range(2):
        x = batch(8)
        torch.testing.assert_close(compiled(x), eager(x))
    if policy == "pending":
        layer.commit()
        eager.commit()
    torch.testing.assert_close(buffers(layer), buffers(eager))

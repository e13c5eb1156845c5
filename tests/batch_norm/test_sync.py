"""Statistics shared between processes, over gloo, against one BatchNorm over the concatenated batch."""

import copy
import os
import socket

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.utils.checkpoint import checkpoint

import modeprobe as mp

pytestmark = pytest.mark.rung("reference")


def batches(kind):
    sizes = {"even": (4, 4), "uneven": (5, 2), "empty": (6, 0), "single": (1, 1)}[kind]
    g = torch.Generator().manual_seed(4)
    shape = (3, 1, 1) if kind == "single" else (3, 5, 6)
    return [torch.randn(n, *shape, generator=g, dtype=torch.float32) * 2 + 1 for n in sizes]


def twice_differentiated(function, x, reduce=lambda value: None):
    """Gradients of what the first gradients make; those of parameters summed over the processes."""
    g = torch.Generator().manual_seed(7)
    x = x.requires_grad_()
    weight, bias = (torch.rand(3, dtype=torch.float64, generator=g).requires_grad_() for _ in range(2))
    loss = function(x, weight, bias).pow(3).sum()
    first = torch.autograd.grad(loss, x, create_graph=True)[0]
    first.pow(2).sum().backward()
    for grad in (weight.grad, bias.grad):
        reduce(grad)
    return first.detach(), x.grad, weight.grad, bias.grad


def layers(kind=mp.nn):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 3), kind.BatchNorm1d(3))


def worker(rank, world, port, kinds, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    results = {}
    for kind in kinds:
        for options in OPTIONS:
            for recompute in (False, True):
                torch.manual_seed(1)
                bn = mp.nn.SyncBatchNorm(3, **options)
                with torch.no_grad():
                    bn.weight.uniform_(0.5, 1.5)
                x = batches(kind)[rank].requires_grad_()
                for _ in range(2):
                    y = checkpoint(bn, x, use_reentrant=False) if recompute else bn(x)
                    (y * (rank + 1)).pow(2).sum().backward()
                state = {k: v.clone() for k, v in bn.state_dict().items()}
                grads = [bn.weight.grad, bn.bias.grad]
                for grad in grads:
                    dist.all_reduce(grad)
                results[kind, str(options), recompute] = (y.detach(), x.grad, grads, state)
    # A buffer broadcast between two forwards and the backward pass.
    model = DistributedDataParallel(layers(), broadcast_buffers=True)
    for kind in ("even", "uneven"):
        y = model(batches(kind)[rank].flatten(1)[:, :3])
        y.pow(3).sum().backward()
    results["ddp"] = [p.grad for p in model.parameters()], dict(model.module[1].state_dict())
    # Sharded parameters, whole buffers.
    model = layers()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    model(batches("even")[rank].flatten(1)[:, :3]).pow(3).sum().backward()
    grads = [p.grad.full_tensor() for p in model.parameters()]
    results["fsdp"] = grads, dict(model[1].named_buffers())
    lonely = mp.nn.SyncBatchNorm(3)
    results["lonely"] = lonely(torch.ones(1 - rank, 3)), dict(lonely.state_dict())
    bad = mp.nn.SyncBatchNorm(3, nonfinite="skip")
    bad(torch.full((2, 3), float("nan") if rank == 1 else 1.0))
    results["skipped"] = (bad.skipped_batches.item(), bad.num_batches_tracked.item(), bad.running_mean)
    # Micro-batches of different sizes, kept until commit.
    pending = mp.nn.SyncBatchNorm(3, statistics="pending")
    for kind in ("uneven", "empty"):
        pending(batches(kind)[rank])
    pending.commit()
    results["pending"] = dict(pending.state_dict())
    frozen = mp.nn.SyncBatchNorm(3, statistics="frozen")
    results["frozen"] = frozen(batches("uneven")[rank]), frozen.num_batches_tracked.item()
    # Compiled, whether a forward is a recomputation is asked when the graph runs.
    bn = mp.nn.SyncBatchNorm(3)
    x = batches("uneven")[rank].requires_grad_()
    checkpoint(torch.compile(bn, backend="aot_eager"), x, use_reentrant=False).pow(3).sum().backward()
    results["compiled"] = x.grad, dict(bn.state_dict())
    for activation in (None, "gelu"):
        results["twice", activation] = twice_differentiated(
            lambda x, w, b, a=activation: mp.functional.sync_batch_norm(x, None, None, w, b, activation=a),
            batches("uneven")[rank].double(),
            dist.all_reduce,
        )
    alone = [dist.new_group([r]) for r in range(world)][rank]
    torch.manual_seed(1)
    tensors = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 2), (2,), (2,))]

    def function(x, weight, bias):
        return mp.functional.sync_batch_norm(x, None, None, weight, bias, group=alone, activation="silu")

    results["gradcheck"] = torch.autograd.gradcheck(function, tensors)
    results["gradgradcheck"] = torch.autograd.gradgradcheck(function, tensors)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


OPTIONS = ({}, {"momentum": None}, {"activation": "relu", "nonfinite": "skip"})
KINDS = ("even", "uneven", "empty", "single")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    folder = tmp_path_factory.mktemp("sync")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(worker, (2, port, KINDS, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"activation": "relu", "nonfinite": "skip"}], ids=str
)
@pytest.mark.parametrize("recompute", [False, True])
def test_as_one_batch(results, kind, options, recompute):
    torch.manual_seed(1)
    one = nn.BatchNorm2d(3, momentum=options.get("momentum", 0.1))
    with torch.no_grad():
        one.weight.uniform_(0.5, 1.5)
    parts = batches(kind)
    x = torch.cat(parts).requires_grad_()
    scale = torch.cat([torch.full((len(p), 1, 1, 1), r + 1.0) for r, p in enumerate(parts)])
    for _ in range(2):
        y = one(x)
        y = y.relu() if "activation" in options else y
        (y * scale).pow(2).sum().backward()
    mine = [r[kind, str(options), recompute] for r in results]
    torch.testing.assert_close(torch.cat([m[0] for m in mine]), y)
    torch.testing.assert_close(torch.cat([m[1] for m in mine]), x.grad, rtol=1e-4, atol=1e-4)
    for rank in range(2):
        torch.testing.assert_close(mine[rank][2], [one.weight.grad, one.bias.grad], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine[rank][3], dict(one.state_dict()))


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_second_derivatives(results, activation):
    def function(x, weight, bias):
        y = nn.functional.batch_norm(x, None, None, weight, bias, training=True)
        return nn.functional.gelu(y) if activation else y

    expected = twice_differentiated(function, torch.cat(batches("uneven")).double())
    mine = [r["twice", activation] for r in results]
    for i in range(2):
        torch.testing.assert_close(torch.cat([m[i] for m in mine]), expected[i], rtol=1e-6, atol=1e-8)
        for m in mine:
            torch.testing.assert_close(m[2 + i], expected[2 + i], rtol=1e-6, atol=1e-8)
    assert all(r["gradcheck"] and r["gradgradcheck"] for r in results)


def test_pending_statistics_are_those_of_all_processes(results):
    one = nn.BatchNorm2d(3)
    one(torch.cat([part for kind in ("uneven", "empty") for part in batches(kind)]))
    for result in results:
        torch.testing.assert_close(result["pending"], dict(one.state_dict()))


def test_frozen_statistics_are_not_shared(results):
    for result, x in zip(results, batches("uneven"), strict=True):
        y, tracked = result["frozen"]
        torch.testing.assert_close(y, nn.BatchNorm2d(3).eval()(x))
        assert tracked == 0


def test_checkpointing_compiled_counts_a_batch_once(results):
    one, x = nn.BatchNorm2d(3), torch.cat(batches("uneven")).requires_grad_()
    one(x).pow(3).sum().backward()
    torch.testing.assert_close(torch.cat([r["compiled"][0] for r in results]), x.grad, rtol=1e-4, atol=1e-4)
    for result in results:
        torch.testing.assert_close(result["compiled"][1], dict(one.state_dict()))


def test_under_torchs_wrappers(results):
    """Each process normalises with its own batch; gradients are averaged; DDP hands out rank 0's buffers."""
    models = [layers(nn) for _ in range(2)]
    for kind, wrapper in (("even", "fsdp"), ("uneven", "ddp")):
        for model, x in zip(models, batches(kind), strict=True):
            model(x.flatten(1)[:, :3]).pow(3).sum().backward()
        for rank, result in enumerate(results):
            grads, buffers = result[wrapper]
            for mine, *own in zip(grads, *(model.parameters() for model in models), strict=True):
                torch.testing.assert_close(mine, (own[0].grad + own[1].grad) / 2, rtol=1e-4, atol=1e-3)
            for name, buffer in models[rank][1].named_buffers():
                torch.testing.assert_close(buffers[name], buffer)
        for buffer, of_rank_0 in zip(models[1].buffers(), models[0].buffers(), strict=True):
            buffer.copy_(of_rank_0)


def test_one_value_in_all_processes_has_no_variance_to_fold(results):
    for rank, (y, state) in enumerate(result["lonely"] for result in results):
        assert torch.equal(y, torch.zeros(1 - rank, 3))
        torch.testing.assert_close(
            state, nn.BatchNorm1d(3).state_dict() | {"num_batches_tracked": torch.tensor(1)}
        )


def test_a_non_finite_batch_on_one_rank_is_skipped_on_all(results):
    for result in results:
        skipped, tracked, mean = result["skipped"]
        assert (skipped, tracked) == (1, 0)
        assert torch.equal(mean, torch.zeros(3))


def test_alone():
    bn, one = mp.nn.SyncBatchNorm(3), nn.BatchNorm1d(3)
    x = torch.randn(6, 3)
    torch.testing.assert_close(bn(x), one(x))
    torch.testing.assert_close(bn.eval()(x), one.eval()(x))
    with pytest.raises(ValueError, match="at least 2D"):
        bn(x[0])


def test_conversion():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), mp.nn.BatchNorm2d(4, activation="relu"), nn.BatchNorm2d(4, affine=False)
    )
    weight, mean = model[1].weight, model[1].running_mean
    converted = mp.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted is model
    assert [type(m) for m in model[1:]] == [mp.nn.SyncBatchNorm] * 2
    assert model[1].weight is weight
    assert model[1].running_mean is mean
    assert model[1].activation == "relu"
    assert model[2].weight is None
    lazy = nn.Sequential(nn.BatchNorm2d(4), nn.LazyBatchNorm2d())
    parametrized = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    nn.utils.parametrize.register_parametrization(parametrized[1], "weight", nn.Identity())
    for unfit, why in ((lazy, "1 is lazy"), (parametrized, "1 is parametrized")):
        with pytest.raises(ValueError, match=why):
            mp.nn.SyncBatchNorm.convert_sync_batchnorm(unfit)
        assert type(unfit[0]) is nn.BatchNorm2d
    by_torch = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(mp.nn.BatchNorm2d(4)))
    assert type(by_torch[0]) is nn.SyncBatchNorm


def test_conversion_keeps_what_was_fused():
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.GELU(), nn.Dropout(1.0))
    apart = copy.deepcopy(model)
    mp.swap(model, fuse=True)
    mp.set_statistics(model, "cumulative")
    mp.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is mp.nn.SyncBatchNorm
    assert model[0].statistics == "cumulative"
    x = torch.randn(6, 4)
    assert not model(x).any()
    apart(x)
    torch.testing.assert_close(model.eval()(x), apart.eval()(x))
    assert mp.restore(model) == 3
    assert [type(module) for module in model] == [nn.SyncBatchNorm, nn.GELU, nn.Dropout]
    torch.testing.assert_close(model(x), apart(x))


def test_moments_count_exactly():
    ops = torch.ops.modeprobe
    moments = torch.tensor([[1.0, 0.0, 2**24 - 1, 3.0], [2.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    mean, variance, count = ops.batch_norm_merge(moments, None, None, None, None, 0.1)
    n, m = 4 * 2**24 - 1, 5
    assert count.item() == pytest.approx(n + m, rel=1e-7)
    assert mean.item() == pytest.approx((n + 2 * m) / (n + m))
    assert variance.item() == pytest.approx(n * m / (n + m) ** 2, rel=1e-6)
    x = torch.randn(7, 4, 3)
    assert ops.batch_norm_moments(x)[-2:].tolist() == [21.0, 0.0]

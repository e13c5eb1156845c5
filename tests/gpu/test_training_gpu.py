"""Layers in a training step on a GPU: without waiting, compiled, checkpointed, captured, under autocast."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import modeprobe as mp
from modeprobe import functional as F
from modeprobe import mask

DEVICE = "cuda"
BACKENDS = ("native", "triton")
on_all = pytest.mark.parametrize("backend", BACKENDS)


class Block(nn.Module):
    """Every layer and function of the package, on images and on attention scores."""

    def __init__(self, activation="relu"):
        super().__init__()
        self.convolution = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = mp.nn.BatchNorm2d(16, activation=activation, momentum=None)
        self.layers = nn.Sequential(
            mp.nn.Dropout2d(0.2), mp.nn.BatchNorm2d(16), nn.ReLU(), mp.nn.Dropout(0.1)
        )
        self.last = nn.Sequential(
            mp.nn.AlphaDropout(0.1), mp.nn.DropPath(0.1), mp.nn.FeatureAlphaDropout(0.1)
        )
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x):
        y = self.convolution(x)
        y = self.last(self.layers(self.norm(y, y)))
        return F.bias_dropout_add(F.softmax_dropout(y, 0.1, training=True), self.bias, y, 0.1, training=True)


def images(dtype=torch.float32, count=8):
    return torch.randn(count, 8, 12, 12, device=DEVICE, dtype=dtype)


def numbers(model):
    """All that a step leaves behind: gradients and buffers, by name."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return gradients | dict(model.named_buffers())


def agree(ours, theirs, tolerance=1e-4):
    """To a part of each tensor's largest value: gradients are sums that cancel."""
    found = numbers(ours)
    for name, value in numbers(theirs).items():
        close_to(found[name], value, tolerance, name)


def close_to(got, want, tolerance, what="y"):
    error = (got.double() - want.double()).abs().max().item()
    allowed = tolerance * max(want.double().abs().max().item(), 1e-3)
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


@pytest.fixture(autouse=True)
def convolutions_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@on_all
def test_a_step_does_not_wait_for_the_gpu(backend):
    model, x = Block().to(DEVICE), images()
    with mp.backend(backend):
        model(x).sum().backward()  # compiles, and fills caches
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_all
def test_both_backends_take_the_same_step_as_the_reference(backend):
    ours, x = Block("silu").to(DEVICE), images()
    theirs = copy.deepcopy(ours)
    results = []
    for model, name in ((ours, backend), (theirs, "reference")):
        torch.manual_seed(5)
        with mp.backend(name):
            y = model(x)
            y.square().sum().backward()
        results.append(y)
    close_to(*results, 1e-4)
    agree(ours, theirs)


def test_compiled_for_the_gpu():
    torch._dynamo.reset()
    ours, x = Block().to(DEVICE), images()
    theirs = copy.deepcopy(ours)
    run = torch.compile(ours, fullgraph=True)
    torch.manual_seed(3)
    first = run(x)
    first.square().sum().backward()
    torch.manual_seed(3)
    second = run(x)
    assert torch.equal(first, second)  # the same seed, whatever the counters hold
    assert not torch.equal(second, run(x))
    theirs(x), theirs(x), theirs(x)
    for name, value in theirs.named_buffers():
        if "num_batches" in name or name.startswith("norm"):  # what no dropout comes before
            torch.testing.assert_close(dict(ours.named_buffers())[name], value, rtol=1e-4, atol=1e-5)


def test_compiled_with_a_key_equals_eager():
    torch._dynamo.reset()
    key, x = mask.key(1, 2, device=DEVICE), torch.randn(1000, device=DEVICE, requires_grad=True)

    def function(x):
        return F.dropout(F.alpha_dropout(x.sin(), 0.2, True, key=key), 0.3, key=key).cos()

    run = torch.compile(function, fullgraph=True)
    got, want = run(x), function(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_compiled_into_cuda_graphs():
    torch._dynamo.reset()
    layer = mp.nn.Dropout(0.5)
    run = torch.compile(lambda x: layer(x * 2), mode="reduce-overhead", fullgraph=True)
    x = torch.ones(4096, device=DEVICE, requires_grad=True)
    seen = []
    for _ in range(6):  # warmed up, recorded, then replayed
        torch.compiler.cudagraph_mark_step_begin()
        y = run(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y == 0, gradient == 0)
        seen.append((y == 0).clone())
    assert all(not torch.equal(one, other) for one, other in pairwise(seen))
    assert all(0.4 < one.float().mean().item() < 0.6 for one in seen)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    ours = Block().to(DEVICE)
    theirs, x = copy.deepcopy(ours), images().requires_grad_()
    torch.manual_seed(7)
    checkpoint(ours, x, use_reentrant=reentrant).square().sum().backward()
    torch.manual_seed(7)
    theirs(x).square().sum().backward()
    agree(ours, theirs)


def test_a_whole_step_in_a_cuda_graph():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), mp.nn.BatchNorm2d(16), mp.nn.Dropout(0.5)).to(DEVICE)
    x = images()

    def step():
        model.zero_grad(set_to_none=False)
        y = model(x)
        y.square().mean().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    zeros, gradients = [], []
    for _ in range(3):
        graph.replay()
        zeros.append((y == 0).clone())
        gradients.append(model[0].weight.grad.clone())
    assert model[1].num_batches_tracked.item() == 6
    for kept in (zeros, gradients):
        assert not torch.equal(kept[0], kept[1])
        assert not torch.equal(kept[1], kept[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_precision(dtype):
    """Under autocast with a scaler; the layers of torch see the same convolution."""
    # No bias before the BatchNorm: its gradient is nothing but rounding.
    plain = nn.Sequential(
        nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.0), nn.Linear(1600, 4),
    ).to(DEVICE)  # fmt: skip
    ours = copy.deepcopy(plain)
    mp.swap(ours, fuse=True)
    x = images()
    for model in (ours, plain):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with torch.autocast(DEVICE, dtype):
            loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    agree(ours, plain, 16 * torch.finfo(dtype).eps)


def test_a_swapped_network_learns_like_torch():
    torch.manual_seed(0)
    theirs = nn.Sequential(
        nn.Conv2d(8, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, bias=False), nn.BatchNorm2d(32), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ).to(DEVICE)  # fmt: skip
    ours = copy.deepcopy(theirs)
    mp.swap(ours, fuse=True)
    x = images(count=64).contiguous(memory_format=torch.channels_last)
    target = torch.randint(4, (64,), device=DEVICE)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        own = []
        for _ in range(10):
            loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own.append(loss.detach())
        losses.append(torch.stack(own))
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    for model in (ours, theirs):
        model.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-2, atol=1e-2)

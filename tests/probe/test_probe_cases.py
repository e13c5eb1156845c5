"""Hand-made models, each with a twin that must not raise the same alarm."""
# ruff: noqa: E501, NPY002 - one case per line; the legacy numpy generator is what is tested

import dataclasses
import decimal
import functools
import random
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modeprobe as mp
from modeprobe.probe.observe import SEEDS

pytestmark = pytest.mark.rung("reference")


class Case(NamedTuple):
    name: str
    build: object
    effect: str
    causes: str = ""
    random: str = ""  # "t": in training, "te": in both modes
    inputs: object = lambda: (torch.randn(4, 6, 8),)
    options: tuple = ()


class Run(nn.Module):
    """A model whose forward is `function(self, x)`; modules as keyword arguments."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs, **named):
        return self.function(self, *inputs, **named)


def run(function, **modules):
    return lambda: Run(function, **modules)


@torch.jit.script
def scripted_dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    return torch.nn.functional.dropout(x, p, training)


class CapturedLambda(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.act = lambda x: F.dropout(x, p, self.training)

    def forward(self, x):
        return self.act(x)


class CopiedFlag(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.active = function, True

    def train(self, mode=True):
        self.active = mode
        return super().train(mode)

    def forward(self, x):
        return self.function(x, self.active)


class FrozenNorm(nn.Module):
    def __init__(self, frozen):
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm1d(6), frozen

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.norm.eval()
        return self

    def forward(self, x):
        return self.norm(x)


class TrainReturnsNone(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.drop, self.cache = nn.Dropout(p), {"a": 1}

    def train(self, mode=True):
        super().train(mode)
        self.cache.clear()

    def forward(self, x):
        return self.drop(x)


class DropPath(nn.Module):
    def __init__(self, p, batchwise=False):
        super().__init__()
        self.p, self.batchwise = p, batchwise

    def forward(self, x):
        if self.p == 0.0 or not self.training:
            return x
        keep = 1 - self.p
        rows = 1 if self.batchwise else x.shape[0]
        mask = keep + torch.rand((rows,) + (1,) * (x.ndim - 1))
        return x.div(keep) * mask.floor_()


def bernoulli_path(self, x):
    branch = self.lin(x)
    if self.training:
        branch = branch * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.7).div_(0.7)
    return F.layer_norm(x + branch, x.shape[-1:])


class LayerDrop(nn.Module):
    def __init__(self, p, coin=lambda: torch.rand([])):
        super().__init__()
        self.layers, self.p, self.coin = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), p, coin

    def forward(self, x):
        for layer in self.layers:
            if self.training and self.coin() < self.p:
                continue
            x = layer(x)
        return x


class EagerCoin(LayerDrop):
    """Draws its coin in both modes and heeds it in training only."""

    def forward(self, x):
        for layer in self.layers:
            coin = np.random.uniform(0, 1)
            if not (self.training and coin < self.p):
                x = layer(x)
        return x


class LayersDrawnAtOnce(LayerDrop):
    def __init__(self, p, coin, always):
        super().__init__(p, coin)
        self.always = always

    def forward(self, x):
        coins = self.coin() if self.training or self.always else [1.0] * len(self.layers)
        for coin, layer in zip(coins, self.layers, strict=True):
            if not self.training or coin > self.p:
                x = layer(x)
        return x


class CopiedBeside(CopiedFlag):
    """A flag copied to another attribute beside a dropout module that reads its own."""

    def __init__(self, factor):
        super().__init__(lambda x, on: x * factor if on else x)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(super().forward(x))


class Statistics(nn.Module):
    """A mean and a variance that training writes. uses: what it then normalises by."""

    def __init__(self, uses):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))
        self.uses = uses

    def forward(self, x):
        mean, var = self.mean, self.var
        if self.training:
            batch = x.mean((0, 1)), x.var((0, 1))
            self.mean = self.mean + 0.1 * (batch[0] - self.mean)
            self.var = self.var + 0.1 * (batch[1] - self.var)
            mean, var = {"batch": batch, "moving": (self.mean, self.var), "stored": (mean, var)}[self.uses]
        return (x - mean) / (var + 1e-5).sqrt()


class Merging(nn.Module):
    """Adds its low-rank part to the weight in eval mode."""

    def __init__(self, factor):
        super().__init__()
        self.lin, self.part, self.factor = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8)), factor
        self.merged = False

    def train(self, mode=True):
        if self.merged is mode:
            sign = -1 if mode else self.factor
            self.lin.weight.data += sign * self.part.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return self.lin(x) if self.merged else self.lin(x) + F.linear(x, self.part)


def path_by_where(p):
    return run(lambda s, x: x + torch.where(torch.rand(4, 1, 1) < p, 0.0, s.lin(x)) if s.training else x + s.lin(x),
               lin=nn.Linear(8, 8))  # fmt: skip


class SampleFirst(nn.Module):
    """A mask with one value per index of `axis`, in a model that mixes tokens but no samples."""

    def __init__(self, p, shape, seq_first):
        super().__init__()
        self.p, self.shape, self.seq_first = p, shape, seq_first
        self.attention, self.lin = nn.MultiheadAttention(8, 2, batch_first=not seq_first), nn.Linear(8, 8)

    def forward(self, x):
        x = x.transpose(0, 1) if self.seq_first else x
        branch = self.lin(x)
        if self.training and self.p:
            branch = branch * ((1 - self.p) + torch.rand(self.shape)).floor() / (1 - self.p)
        x = x + branch
        return x, x + self.attention(x, x, x)[0]


class BatchSubset(nn.Module):
    """A residual branch that only some of the samples (or `axis=1`: tokens) go through."""

    def __init__(self, keep, axis=0, write="index_add"):
        super().__init__()
        self.lin, self.keep, self.axis, self.write = nn.Linear(8, 8), keep, axis, write

    def forward(self, x):
        if not self.training:
            return x + self.lin(x)
        rows = torch.randperm(x.shape[self.axis])[: self.keep]
        if self.write == "index_add":
            return torch.index_add(x, self.axis, rows, self.lin(x.index_select(self.axis, rows)))
        x = x.clone()
        x[rows] += self.lin(x[rows])
        return x


class Experts(nn.Module):
    """Each token goes through one expert; noise at the router sends it to another."""

    def __init__(self, noise):
        super().__init__()
        self.router, self.noise = nn.Linear(8, 4), noise
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        tokens = x.reshape(-1, 8)
        scores = self.router(tokens)
        if self.training and self.noise:
            scores = scores + self.noise * torch.randn_like(scores)
        chosen, out = scores.argmax(-1), torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                out[rows] = expert(tokens[rows])
        return out.view_as(x)


class LayersPicked(nn.Module):
    def __init__(self, pick):
        super().__init__()
        self.layers, self.pick = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), pick

    def forward(self, x):
        for index in self.pick() if self.training else range(4):
            x = x + self.layers[index](x)
        return x


def edges_dropped(self, x):
    """A sum over edges between the samples of the batch, as in a graph."""
    source, target = torch.arange(24) % 4, torch.arange(24) // 6
    if self.training:
        keep = torch.rand(24) > 0.3
        source, target = source[keep], target[keep]
    return x + torch.zeros_like(x).index_add(0, target, self.lin(x[source]))


def zeroed_rows(value):
    def forward(self, x):
        y = self.lin(x)
        if self.training:
            y[torch.rand(4) < 0.4] = value
        return x + y

    return run(forward, lin=nn.Linear(8, 8))


def embedding_rows(self, x):
    weight = self.table.weight
    if self.training:
        weight = weight * torch.empty(5, 1).bernoulli_(0.6)
    return F.embedding(torch.arange(20).view(4, 5) % 5, weight)


def mask_on_noise(self, x):
    return x + torch.randn_like(x) * (torch.rand(4, 1, 1) < 0.5) if self.training else x


def noise_but_at_the_seeds():
    draw = random.getrandbits(32)
    return 0 if draw in {random.Random(seed).getrandbits(32) for seed in SEEDS} else draw % 1000


class OneStatistic(nn.Module):
    """Divides by a mean square: of the batch in training (`batch`), else the stored one."""

    def __init__(self, batch):
        super().__init__()
        self.register_buffer("square", torch.ones(8))
        self.batch = batch

    def forward(self, x):
        square = self.square
        if self.training:
            new = (x * x).mean((0, 1))
            self.square = 0.9 * self.square + 0.1 * new
            square = new if self.batch else square
        return x / square.sqrt()


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


captured_random = random.Random.random.__get__(random._inst)  # as after `from random import random`


class LayerDropBesideDropout(LayerDrop):
    """Its coin cannot be seen, only that a random stream moves; hidden states are returned, too."""

    def __init__(self, p):
        super().__init__(p, captured_random)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        states = []
        for layer in self.layers:
            if self.training and self.coin() < self.p:
                continue
            x = layer(x)
            states.append(x)
        return self.drop(x), states


def clock(self, x):
    return x + time.perf_counter_ns() % 100_000


def native_norm(frozen):
    return run(
        lambda s, x: torch.native_batch_norm(
            x, None, None, s.mean, s.var, s.training and not frozen, 0.1, 1e-5
        )[0],
        mean=nn.Buffer(torch.zeros(6)),
        var=nn.Buffer(torch.ones(6)),
    )


def accelerate_like(p):
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(p))
    for module in model:
        old = module.forward

        def forward(module, old, *args, **kwargs):
            return old(*(a.to("cpu") for a in args), **kwargs)

        module.forward = functools.update_wrapper(functools.partial(forward, module, old), old)
    model.register_forward_pre_hook(lambda module, args: tuple(a.clone() for a in args))
    return model


def quantised(p):
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(nn.Sequential(nn.Linear(8, 8), nn.Dropout(p)), {nn.Linear})


class Rescaling(nn.Module):
    """Rescales its weight in place on the first forward in eval mode."""

    def __init__(self, factor):
        super().__init__()
        self.lin, self.factor, self.scaled = nn.Linear(8, 8), factor, False

    def forward(self, x):
        if not self.training and not self.scaled:
            with torch.no_grad():
                self.lin.weight.mul_(self.factor)
            self.scaled = True
        return self.lin(x)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    extra: object = None


class OwnGenerator(nn.Module):
    def __init__(self, make, draw, always=False):
        super().__init__()
        self.generator, self.draw, self.always = make(), draw, always

    def forward(self, x):
        if self.training or self.always:
            x = x + self.draw(self.generator)
        return x


def encoder(p):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=p, batch_first=True)
    return nn.TransformerEncoder(layer, 1)


def padded():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, 4:] = True
    return {"src_key_padding_mask": mask}


def attention(p, weights):
    return run(
        lambda self, x: self.mha(x, x, x, need_weights=weights)[0],
        mha=nn.MultiheadAttention(8, 2, dropout=p, batch_first=True),
    )


def sdpa(self, x, p):
    return F.scaled_dot_product_attention(x, x, x, dropout_p=p)


def gradient_noise(self, x):
    """Same output, but noise in the gradient."""
    y = self.lin(x)
    if self.training:
        noise = y * torch.randn_like(y)
        y = y + (noise - noise.detach())
    return y


class MyDropout(nn.Dropout):
    def forward(self, x):
        return x * (torch.rand_like(x) > self.p) if self.training else x


M, FD, A, S, N, B, BR = (
    "module_dropout",
    "functional_dropout",
    "attention_dropout",
    "stochastic_depth",
    "random_noise",
    "batch_statistics",
    "branch",
)
IMAGE = lambda: (torch.randn(4, 3, 5, 5),)  # noqa: E731
ROWS = lambda: (torch.randn(8, 6),)  # noqa: E731

CASES = [
    Case("F.dropout with its default", run(lambda s, x: F.dropout(x, 0.5)), "none", "", "te"),
    Case("F.dropout gated", run(lambda s, x: F.dropout(x, 0.5, s.training)), "differs", FD, "t"),
    Case("F.dropout gated, p=0", run(lambda s, x: F.dropout(x, 0.0, s.training)), "none"),
    Case("SDPA ungated", run(lambda s, x: sdpa(s, x, 0.3)), "none", "", "te"),
    Case("SDPA gated", run(lambda s, x: sdpa(s, x, 0.3 * s.training)), "differs", A, "t"),
    Case("LSTM", lambda: nn.LSTM(8, 8, 2, dropout=0.5), "differs", FD, "t"),
    Case("LSTM, p=0", lambda: nn.LSTM(8, 8, 2), "none"),
    Case("GRU", lambda: nn.GRU(8, 8, 2, dropout=0.5), "differs", FD, "t"),
    Case("GRU, p=0", lambda: nn.GRU(8, 8, 2), "none"),
    Case("dropout in a lambda", lambda: CapturedLambda(0.5), "differs", FD, "t"),
    Case("dropout in a lambda, p=0", lambda: CapturedLambda(0.0), "none"),
    Case("scripted function", run(lambda s, x: scripted_dropout(x, 0.5, s.training)), "differs", FD, "t"),
    Case("scripted function, off", run(lambda s, x: scripted_dropout(x, 0.5, False)), "none"),
    Case("scripted function, ungated", run(lambda s, x: scripted_dropout(x, 0.5, True)), "none", "", "te"),
    Case("scripted model", lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))),
         "differs", "functional_dropout", "t"),
    Case("scripted model, p=0", lambda: torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0))), "none"),
    Case("built inside forward", run(lambda s, x: nn.Dropout(0.5)(x)), "none", "", "te"),
    Case("built inside forward, gated", run(lambda s, x: nn.Dropout(0.5).train(s.training)(x)), "differs", M, "t"),
    Case("plain list", run(lambda s, x: s.held[0](x), held=[nn.Dropout(0.5)]), "none", "", "te"),
    Case("module list", run(lambda s, x: s.held[0](x), held=nn.ModuleList([nn.Dropout(0.5)])), "differs", M, "t"),
    Case("flag copied", lambda: CopiedFlag(lambda x, on: F.dropout(x, 0.5, on)), "differs", FD, "t"),
    Case("flag copied, p=0", lambda: CopiedFlag(lambda x, on: F.dropout(x, 0.0, on)), "none"),
    Case("flag copied, branch", lambda: CopiedFlag(lambda x, on: x * 2 if on else x), "differs", BR),
    Case("flag copied, same branches", lambda: CopiedFlag(lambda x, on: x if on else x.clone()), "none"),
    Case("BatchNorm frozen", lambda: FrozenNorm(True), "none"),
    Case("BatchNorm", lambda: FrozenNorm(False), "differs", B),
    Case("BatchNorm without statistics", lambda: nn.BatchNorm1d(6, track_running_stats=False), "none"),
    Case("F.batch_norm in both modes", run(lambda s, x: F.batch_norm(x, None, None, training=True)), "none"),
    Case("InstanceNorm tracked", lambda: nn.InstanceNorm1d(6, track_running_stats=True), "differs", B),
    Case("InstanceNorm", lambda: nn.InstanceNorm1d(6), "none"),
    Case("shared", run(lambda s, x: s.a(x) + s.b(s.a(x)), **dict.fromkeys("ab", nn.Dropout(0.5))), "differs", M, "t"),
    Case("shared, p=0", run(lambda s, x: s.a(x) + s.b(x), **dict.fromkeys("ab", nn.Dropout(0.0))), "none"),
    Case("train() returns None", lambda: TrainReturnsNone(0.5), "differs", M, "t"),
    Case("train() returns None, p=0", lambda: TrainReturnsNone(0.0), "none"),
    Case("torch.seed() inside", run(lambda s, x: (torch.seed(), x + torch.randn(8))[1]), "none", "", "te"),
    Case("manual_seed inside", run(lambda s, x: (torch.manual_seed(3), x + torch.randn(8))[1]), "none"),
    Case("numpy noise", run(lambda s, x: x + float(np.random.rand()) * s.training), "differs", N, "t"),
    Case("numpy noise in both", run(lambda s, x: x + float(np.random.rand())), "none", "", "te"),
    Case("python noise", run(lambda s, x: x + random.gauss(0, 1) * s.training), "differs", N, "t"),
    Case("python draw unused", run(lambda s, x: (s.training and random.random(), x)[1]), "none"),
    Case("noise in both", run(lambda s, x: x + torch.randn_like(x)), "none", "", "te"),
    Case("Gaussian noise", run(lambda s, x: x + torch.randn_like(x) if s.training else x), "differs", N, "t"),
    Case("Gaussian noise unused", run(lambda s, x: (s.training and torch.randn_like(x), x)[1]), "none"),
    Case("hand-written mask", run(lambda s, x: x * (torch.rand_like(x) > 0.5) if s.training else x), "differs", N, "t"),
    Case("compiled", lambda: torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), backend="eager"),
         "differs", M, "t"),
    Case("compiled, p=0", lambda: torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0)), backend="eager"),
         "none"),
    Case("quantised", lambda: quantised(0.5), "differs", M, "t", inputs=lambda: (torch.randn(4, 8),)),
    Case("quantised, p=0", lambda: quantised(0.0), "none", inputs=lambda: (torch.randn(4, 8),)),
    Case("meta", lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).to("meta"), "differs", M, "t",
         inputs=lambda: (torch.randn(4, 8, device="meta"),)),
    Case("meta, p=0", lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0)).to("meta"), "none",
         inputs=lambda: (torch.randn(4, 8, device="meta"),)),
    Case("hooked", lambda: accelerate_like(0.5), "differs", M, "t"),
    Case("hooked, p=0", lambda: accelerate_like(0.0), "none"),
    Case("aliasing input", run(lambda s, x: (x, x[0])), "none"),
    Case("writing to its input", run(lambda s, x: x.mul_(2)), "none"),
    Case("aliasing input, gated", run(lambda s, x: x.mul_(2) if s.training else x), "differs", BR),
    Case("NaN in both", run(lambda s, x: x / 0 * 0), "none"),
    Case("NaN in training", run(lambda s, x: x / 0 * 0 if s.training else x), "differs", BR),
    Case("fast path with padding", lambda: encoder(0.0), "differs", BR,
         inputs=lambda: ((torch.randn(4, 6, 8),), padded())),
    Case("fast path without padding", lambda: encoder(0.0), "none"),
    Case("encoder with dropout", lambda: encoder(0.3), "differs", f"{M} {A}", "t"),
    Case("weights rescaled", lambda: Rescaling(0.5), "differs", BR),
    Case("weights rescaled by one", lambda: Rescaling(1.0), "none"),
    Case("spectral norm", lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), "differs", BR),
    Case("weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "none"),
    Case("DropPath", run(lambda s, x: x + s.path(s.lin(x)), lin=nn.Linear(8, 8), path=DropPath(0.3)), "differs", S, "t"),
    Case("DropPath, p=0", run(lambda s, x: x + s.path(x), path=DropPath(0.0)), "none"),
    Case("DropPath per batch", lambda: DropPath(0.3, True), "differs", S, "t"),
    Case("bernoulli path in a block", run(bernoulli_path, lin=nn.Linear(8, 8)), "differs", S, "t"),
    Case("noise per sample", run(lambda s, x: x + torch.randn(4, 1, 1) if s.training else x), "differs", N, "t"),
    Case("LayerDrop", lambda: LayerDrop(0.5), "differs", S, "t"),
    Case("LayerDrop, rare", lambda: LayerDrop(0.001), "differs", S, "t"),
    Case("LayerDrop, p=0", lambda: LayerDrop(0.0), "none"),
    Case("LayerDrop by python", lambda: LayerDrop(0.5, random.random), "differs", S, "t"),
    Case("LayerDrop by python, p=0", lambda: LayerDrop(0.0, random.random), "none"),
    Case("LayerDrop by numpy", lambda: LayerDrop(0.5, lambda: np.random.uniform(0, 1)), "differs", S, "t"),
    Case("LayerDrop, drawn in both modes", lambda: EagerCoin(0.1), "differs", S, "t"),
    Case("LayerDrop, drawn in both modes, p=0", lambda: EagerCoin(0.0), "none"),
    Case("DropPath, rare", lambda: DropPath(0.001), "differs", S, "t"),
    Case("DropPath by where", path_by_where(0.3), "differs", S, "t"),
    Case("DropPath by where, p=0", path_by_where(0.0), "none"),
    Case("LayerDrop, drawn at once", lambda: LayersDrawnAtOnce(0.5, lambda: torch.rand(2), False), "differs", S, "t"),
    Case("LayerDrop, drawn at once, p=0", lambda: LayersDrawnAtOnce(0.0, lambda: torch.rand(2), False), "none"),
    Case("LayerDrop, drawn at once in both modes", lambda: LayersDrawnAtOnce(0.01, lambda: torch.rand(2), True),
         "differs", S, "t"),
    Case("LayerDrop, drawn at once by numpy", lambda: LayersDrawnAtOnce(0.01, lambda: np.random.rand(2), True),
         "differs", S, "t"),
    Case("LayerDrop, drawn at once by numpy, p=0", lambda: LayersDrawnAtOnce(0.0, lambda: np.random.rand(2), True),
         "none"),
    Case("noise taken apart", run(lambda s, x: x + torch.stack([n * 2 for n in torch.randn(8)]) * s.training),
         "differs", N, "t"),
    Case("gated and ungated in one line", run(lambda s, x: F.dropout(F.dropout(x, 0.5), 0.5, s.training)), "differs", FD, "te"),
    Case("twice ungated in one line", run(lambda s, x: F.dropout(F.dropout(x, 0.5), 0.5)), "none", "", "te"),
    Case("flag copied beside a dropout", lambda: CopiedBeside(2.0), "differs", f"{M} {BR}", "t"),
    Case("flag copied beside a dropout, same branches", lambda: CopiedBeside(1.0), "differs", M, "t"),
    Case("BatchNorm by hand", lambda: Statistics("batch"), "differs", B),
    Case("moving statistics in both modes", lambda: Statistics("moving"), "differs", BR),
    Case("stored statistics in both modes", lambda: Statistics("stored"), "none"),
    Case("native batch norm", native_norm(False), "differs", B),
    Case("native batch norm, frozen", native_norm(True), "none"),
    Case("weights merged in eval", lambda: Merging(1), "none"),
    Case("weights merged wrongly", lambda: Merging(2), "differs", BR),
    Case("random flip", run(lambda s, x: x.flip(-1) if s.training and torch.rand(1) < 0.5 else x), "differs", N, "t"),
    Case("dropout that reaches no output", run(lambda s, x: (s.d(x), x)[1], d=nn.Dropout(0.5)), "none"),
    Case("functional dropout that reaches no output", run(lambda s, x: (F.dropout(x, 0.5, s.training), x)[1]), "none"),
    Case("ungated dropout that reaches no output", run(lambda s, x: (F.dropout(x, 0.5), x)[1]), "none"),
    Case("branch", run(lambda s, x: x * 2 if s.training else x), "differs", BR),
    Case("branch without effect", run(lambda s, x: x.clone() if s.training else x), "none"),
    Case("rounding only", run(lambda s, x: (x / 3 * 3) if s.training else x * 1.0), "none"),
    Case("structure", run(lambda s, x: (x, x.sum()) if s.training else x), "differs", BR),
    Case("structure in a dataclass", run(lambda s, x: Output(x, None if s.training else x)), "differs", BR),
    Case("dataclass", run(lambda s, x: Output(x, {"a": [x, None]})), "none"),
    Case("cache only in eval", run(lambda s, x: {"out": x, "cache": None if s.training else (x,)}), "differs", BR),
    Case("dropout and structure", run(lambda s, x: (F.dropout(x, 0.5, s.training), None if s.training else x)),
         "differs", f"{FD} {BR}", "t"),
    Case("parent reads child's mode", run(lambda s, x: x * 2 if s.lin.training else x, lin=nn.Linear(8, 8)),
         "differs", BR),
    Case("attention with weights", attention(0.3, True), "differs", FD, "t"),
    Case("attention without weights", attention(0.3, False), "differs", A, "t"),
    Case("attention, p=0", attention(0.0, True), "none"),
    Case("RReLU", nn.RReLU, "differs", N, "t"),
    Case("LeakyReLU", nn.LeakyReLU, "none"),
    Case("gumbel softmax", run(lambda s, x: F.gumbel_softmax(x) if s.training else F.softmax(x, -1)), "differs", N, "t"),
    Case("AlphaDropout", nn.AlphaDropout, "differs", M, "t"),
    Case("Dropout2d", nn.Dropout2d, "differs", M, "t", inputs=IMAGE),
    Case("Dropout p=1", lambda: nn.Dropout(1.0), "differs", M),
    Case("Dropout in place", lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5, inplace=True)), "differs", M, "t"),
    Case("subclass of Dropout", lambda: MyDropout(0.5), "differs", M, "t"),
    Case("label dropping", run(lambda s, x: torch.where(torch.rand(4) < 0.5, 0, torch.arange(4)) if s.training
                               else torch.arange(4)), "differs", N, "t"),
    Case("own torch generator", lambda: OwnGenerator(torch.Generator, lambda g: torch.randn(8, generator=g)),
         "differs", N, "t"),
    Case("own numpy generator", lambda: OwnGenerator(np.random.default_rng, lambda g: float(g.normal())),
         "differs", N, "t"),
    Case("own numpy generator in both",
         lambda: OwnGenerator(np.random.default_rng, lambda g: float(g.normal()), always=True), "none", "", "te"),
    Case("norm and dropout", lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5)), "differs", f"{B} {M}", "t"),
    Case("checkpointed", run(lambda s, x: torch.utils.checkpoint.checkpoint(s.net, x, use_reentrant=False),
                             net=nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))), "differs", M, "t"),
    Case("gradients differ", run(gradient_noise, lin=nn.Linear(8, 8)), "differs", N, "t", options=(("gradients", True),)),
    Case("gradients not asked for", run(gradient_noise, lin=nn.Linear(8, 8)), "none"),
    Case("differentiates inside", run(lambda s, x: torch.autograd.grad(s.lin(x).sum(), s.lin.weight)[0],
                                      lin=nn.Linear(8, 8)), "none"),
    Case("DropPath on axis 1", lambda: SampleFirst(0.4, (1, 4, 1), True), "differs", S, "t"),
    Case("DropPath on axis 1, rare", lambda: SampleFirst(0.001, (1, 4, 1), True), "differs", S, "t"),
    Case("DropPath on axis 1, p=0", lambda: SampleFirst(0.0, (1, 4, 1), True), "none"),
    Case("tokens masked on axis 1", lambda: SampleFirst(0.4, (1, 6, 1), False), "differs", N, "t"),
    Case("channels masked", lambda: SampleFirst(0.4, (1, 1, 8), False), "differs", N, "t"),
    Case("channels masked, one axis", lambda: SampleFirst(0.4, (8,), False), "differs", N, "t"),
    Case("channels masked at the end", run(lambda s, x: x * (torch.rand(8) < 0.6) if s.training else x), "differs", N, "t"),
    Case("samples scaled", run(lambda s, x: x * torch.rand(4, 1, 1) if s.training else x), "differs", N, "t"),
    Case("mask expanded", run(lambda s, x: x + (s.lin(x) * (torch.rand(4, 1, 1) < 0.6).expand_as(x) if s.training else s.lin(x)),
                              lin=nn.Linear(8, 8)), "differs", S, "t"),
    Case("samples set to zero", zeroed_rows(0), "differs", S, "t"),
    Case("samples set to another value", zeroed_rows(3.0), "differs", N, "t"),
    Case("batch subset", lambda: BatchSubset(2), "differs", S, "t"),
    Case("batch subset, written by index", lambda: BatchSubset(2, write="index"), "differs", S, "t"),
    Case("whole batch shuffled", lambda: BatchSubset(4), "none"),
    Case("samples picked", run(lambda s, x: s.lin(x[torch.randperm(4)[:2]]) if s.training else s.lin(x), lin=nn.Linear(8, 8)),
         "differs", N, "t"),
    Case("token subset", lambda: BatchSubset(3, axis=1), "differs", N, "t"),
    Case("noisy router", lambda: Experts(1.0), "differs", N, "t"),
    Case("router without noise", lambda: Experts(0.0), "none"),
    Case("edges dropped", run(edges_dropped, lin=nn.Linear(8, 8)), "differs", N, "t"),
    Case("layers sampled", lambda: LayersPicked(lambda: sorted(random.sample(range(4), 2))), "differs", S, "t"),
    Case("layers in random order", lambda: LayersPicked(lambda: random.sample(range(4), 4)), "differs", N, "t"),
    Case("one of the layers for another", lambda: LayersPicked(lambda: [random.randrange(4)] * 4), "differs", N, "t"),
    Case("noise in both modes, at two calls", run(lambda s, x: x + torch.randn(8) if s.training else torch.randn(8) + x),
         "none", "", "te"),
    Case("noise within rounding, but none at the seeds", run(lambda s, x: x + 1e-10 * noise_but_at_the_seeds() if s.training else x),
         "none", "", "t"),
    Case("noise, but none at the seeds", run(lambda s, x: x + noise_but_at_the_seeds() if s.training else x), "differs", N, "t"),
    Case("branch times a coin", run(lambda s, x: s.lin(x) * (random.random() < 0.6) if s.training else s.lin(x),
                                    lin=nn.Linear(8, 8)), "differs", S, "t"),
    Case("rows of an embedding dropped", run(embedding_rows, table=nn.Embedding(5, 8)), "differs", N, "t"),
    Case("noise in some samples", run(mask_on_noise), "differs", N, "t"),
    Case("LayerDrop by a captured function", lambda: LayerDropBesideDropout(0.4), "differs", f"{S} {M}", "t"),
    Case("LayerDrop by a captured function, p=0", lambda: LayerDropBesideDropout(0.0), "differs", M, "t"),
    Case("one statistic by hand", lambda: OneStatistic(True), "differs", B),
    Case("one statistic, stored in both modes", lambda: OneStatistic(False), "none"),
    Case("scripted norm and dropout", lambda: torch.jit.script(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5))),
         "differs", f"{B} {FD}", "t"),
    Case("scripted norm, dropout off", lambda: torch.jit.script(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.0))),
         "differs", B),
    Case("generator", run(lambda s, x: (s.drop(row) for row in x), drop=nn.Dropout(0.5)), "differs", M, "t"),
    Case("generator, p=0", run(lambda s, x: (s.drop(row) for row in x), drop=nn.Dropout(0.0)), "none"),
    Case("object with slots", run(lambda s, x: Slots(s.drop(x)), drop=nn.Dropout(0.5)), "differs", M, "t"),
    Case("object with slots, p=0", run(lambda s, x: Slots(s.drop(x)), drop=nn.Dropout(0.0)), "none"),
    Case("nested tensors", run(lambda s, x: torch.nested.nested_tensor([x[0], x[1, :2]]) * (1 + s.training)), "differs", BR),
    Case("nested tensors, same", run(lambda s, x: torch.nested.nested_tensor([x[0], x[1, :2]])), "none"),
    Case("dropout of nested tensors", run(lambda s, x: F.dropout(torch.nested.nested_tensor([x[0], x[1, :2]]), 0.5, s.training)),
         "differs", FD, "t"),
    Case("float8", run(lambda s, x: (x * (1 + s.training)).to(torch.float8_e4m3fn)), "differs", BR),
    Case("small in bfloat16", run(lambda s, x: (x * (1.05 if s.training else 1)).bfloat16()), "differs", BR),
    Case("rounded in bfloat16", run(lambda s, x: (x.bfloat16() / 3 * 3) if s.training else x.bfloat16()), "none"),
    Case("decimal number", run(lambda s, x: decimal.Decimal(1 + s.training)), "differs", BR),
    Case("decimal number, same", run(lambda s, x: decimal.Decimal(1)), "none"),
    Case("checkpointed, with gradients", run(lambda s, x: s.norm(torch.utils.checkpoint.checkpoint(s.net, x, use_reentrant=False)),
         net=nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), norm=nn.BatchNorm1d(6)), "differs", f"{M} {B}", "t",
         options=(("gradients", True),)),
    Case("clock", run(clock), "none", "", "te"),
    Case("clock and dropout", run(lambda s, x: clock(s, F.dropout(x, 0.5, s.training))), "differs", FD, "te"),
    Case("BatchNorm in 2-D", lambda: nn.BatchNorm1d(6), "differs", B, inputs=ROWS),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case):
    model = case.build()
    inputs = case.inputs()
    args, kwargs = inputs if isinstance(inputs[-1], dict) else (inputs, {})
    report = mp.probe(model, *args, **kwargs, **dict(case.options))
    answer = (report.effect, report.train_is_random, report.eval_is_random)
    assert answer == (case.effect, "t" in case.random, "e" in case.random), str(report)
    assert report.causes == set(case.causes.split()), str(report)
    assert not report.failures
    assert not any("replay" in note for note in report.notes)

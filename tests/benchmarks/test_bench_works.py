"""The works themselves, at small sizes: torch passes their judges, planted faults do not."""

from __future__ import annotations

import dataclasses
import importlib
import re

import pytest
import torch
from modeprobe.benchmarks import judge, memory, problems, registry, rivals
from modeprobe.benchmarks import works_batch_norm as norms
from modeprobe.benchmarks import works_dropout as dropouts
from modeprobe.benchmarks.compiled import CompiledPeer
from modeprobe.benchmarks.registry import Unavailable, Work
from torch.nn import functional as F

from modeprobe import _extension

pytestmark = pytest.mark.rung("reference")

SMALL = [
    ("dropout", (4099,), dropouts.dropout),
    ("dropout_inplace", (4099,), dropouts.dropout_inplace),
    ("alpha_dropout", (4099,), dropouts.alpha_dropout),
    ("dropout2d", (16, 32, 5, 7), dropouts.dropout2d),
    ("bias_dropout_add", (64, 32), dropouts.bias_dropout_add),
    ("softmax_dropout", (2, 3, 16, 32), dropouts.softmax_dropout),
    ("batch_norm", (8, 6, 5, 7), norms.batch_norm),
    ("batch_norm", (33, 6), norms.batch_norm),
    ("batch_norm_add_relu", (8, 6, 5, 7), norms.batch_norm_add_relu),
]
MODES = ["forward", "backward", "forward_backward"]


def small_works():
    for family, shape, setup in SMALL:
        for mode in ["forward"] if family == "dropout_inplace" else MODES:
            for dtype in ("float32", "bfloat16"):
                yield Work(family, mode, shape, dtype, 2, setup)
    yield Work("batch_norm", "evaluation", (8, 6, 5, 7), "float32", 2, norms.batch_norm)
    yield Work(
        "batch_norm", "forward_backward", (8, 6, 5, 7), "float32", 2, norms.batch_norm, "channels_last"
    )


def outcome(candidate):
    with candidate.context():
        return candidate.run()


@pytest.mark.parametrize("work", list(small_works()), ids=lambda work: work.name)
def test_torch_passes_and_faults_do_not(work):
    problem = work.setup(work, "cpu")
    results = outcome(problem.candidates["torch"]())
    assert problem.verify(results) is None
    for index, result in enumerate(results):
        for fault in (result * 1.5, result + result.abs().max(), torch.full_like(result, float("nan"))):
            assert problem.verify([*results[:index], fault, *results[index + 1 :]]), (index, fault)
    assert problem.verify([results[0][:-1], *results[1:]])
    assert problem.verify([results[0].double(), *results[1:]])
    for floor in problem.floors.values():
        outcome(floor())


@pytest.mark.parametrize("work", list(small_works()), ids=lambda work: work.name)
def test_modeprobe_passes(work):
    reason = _extension.why_not("cpu")
    if reason:
        pytest.skip(reason)
    problem = work.setup(work, "cpu")
    assert problem.verify(outcome(problem.candidates["modeprobe"]())) is None


def planted(work, function):
    """What the work's judge says to ``function`` in torch's place."""
    x = dropouts.differentiable(work, problems.random_tensor(work, "cpu"))
    problem = work.setup(work, "cpu")
    gradient = problems.output_gradient(x)
    candidate = problems.mode_candidate(work.mode, function, [x], [x], gradient)
    return problem.verify(outcome(candidate))


def test_dropout_judge_finds_another_share_another_scale_and_another_mask():
    work = Work("dropout", "forward_backward", (1 << 14,), "float32", 4, dropouts.dropout)
    assert planted(work, lambda x: F.dropout(x, dropouts.P)) is None
    assert "draws" in planted(work, lambda x: F.dropout(x, 0.13) * (0.87 / 0.9))
    assert "neither" in planted(work, lambda x: F.dropout(x, dropouts.P) * 0.99)

    class OtherMask(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return F.dropout(x, dropouts.P)

        @staticmethod
        def backward(ctx, gradient):
            return F.dropout(gradient, dropouts.P)

    assert "gradient" in planted(work, OtherMask.apply)


def test_draws_that_rounding_hides_are_not_counted():
    """Half of the residuals are so large that in bfloat16 a sum does not show whether a term was dropped."""
    generator = torch.Generator().manual_seed(0)
    base, term = torch.randn(2, 1 << 16, dtype=torch.float64, generator=generator).bfloat16().double()
    base[::2] *= 1000.0
    values = base + term, base
    among = judge.told_apart(torch.bfloat16, *values, 32.0)
    assert 0.2 < among.double().mean() < 0.5
    for p, fault in ((0.1, None), (0.12, "kept .* draws"), (0.08, "kept .* draws"), (0.0, "kept .* draws")):
        drawn = torch.rand(base.shape, generator=generator) >= p
        y = torch.where(drawn, *values).bfloat16()
        wrong, keep = judge.choice(y, *values, 32.0)
        assert wrong is None
        assert judge.share(keep, 0.1) is not None  # what is hidden counts as dropped
        found = judge.share(keep, 0.1, among)
        assert found is None if fault is None else re.match(fault, found), (p, found)
    assert "no element" in judge.share(keep, 0.1, torch.zeros_like(keep))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_judge_of_bias_dropout_add_finds_another_share(dtype):
    work = Work("bias_dropout_add", "forward", (1 << 6, 1 << 9), dtype, 3, dropouts.bias_dropout_add)
    problem = work.setup(work, "cpu")
    x, residual = (problems.random_tensor(work, "cpu", seed) for seed in (0, 2))
    bias = problems.random_tensor(work, "cpu", 3)[0]
    for p, fault in ((dropouts.P, None), (0.13, "draws")):
        kept = torch.rand(x.shape) >= p
        y = residual + torch.where(kept, (x + bias) * dropouts.SCALE, 0.0)
        found = problem.verify((y,))
        assert found is None if fault is None else fault in found, (p, found)


def test_channel_judge_finds_broken_channels():
    work = Work("dropout2d", "forward", (16, 32, 5, 7), "float32", 2, dropouts.dropout2d)
    assert "in part" in planted(work, lambda x: F.dropout(x, dropouts.P))


def test_batch_norm_judge_finds_an_unbiased_variance():
    work = Work("batch_norm", "forward", (8, 6, 5, 7), "float32", 3, norms.batch_norm)

    def unbiased(x):
        layer = norms.prepared(torch.nn.BatchNorm2d(6), work, "cpu")
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True)
        shape = (1, -1, 1, 1)
        return (x - mean) * (var + layer.eps).rsqrt() * layer.weight.view(shape) + layer.bias.view(shape)

    assert "off" in planted(work, unbiased)


def test_compiled_peers_are_compiled():
    work = Work("dropout", "forward_backward", (4099,), "float32", 4, dropouts.dropout, compiled=True)
    problem = work.setup(work, "cpu")
    candidate = problem.candidates["torch.compile"]()
    assert problem.verify(outcome(candidate)) is None
    # A compiled graph runs with the stance that forbids compiling; an eager function would not notice it.
    with torch.compiler.set_stance("fail_on_recompile"):
        candidate.run()
    rows = registry.Work("dropout", "forward", (16,), "float32", 2, dropouts.dropout)
    with pytest.raises(Unavailable, match="not compiled for this row"):
        rows.setup(rows, "cpu").candidates["torch.compile"]()


def test_a_disabled_compiler_is_noticed():
    peer = CompiledPeer(lambda x: x * 2)
    # Newer torch raises by itself, older torch runs eagerly without a word.
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises((Unavailable, RuntimeError), match="compiled"),
    ):
        peer.warm_up(lambda: peer(torch.ones(3)))


def test_an_eager_function_in_the_compilers_place_is_noticed():
    peer = CompiledPeer(lambda x: x * 2)
    peer.call = lambda x: x * 2
    with pytest.raises(Unavailable, match="compiled nothing"):
        peer.warm_up(lambda: peer(torch.ones(3)))


def test_a_peer_that_compiles_at_each_call_is_noticed():
    from itertools import count

    sizes = count(3)
    peer = CompiledPeer(lambda x: x * 2)
    with pytest.raises(Unavailable, match="again"):
        peer.warm_up(lambda: peer(torch.ones(next(sizes))))


def test_triton_does_not_run_interpreted():
    work = Work("dropout", "forward", (16,), "float32", 2, dropouts.dropout)
    with pytest.raises(Unavailable, match="CUDA tensors"):
        work.setup(work, "cpu").candidates["modeprobe triton"]()


def test_every_work_of_both_devices_has_a_name_of_its_own_and_bytes():
    for device in ("cpu", "cuda"):
        works = [way for work in registry.distinct(registry.all_works(device)) for way in work.ways]
        assert len({work.name for work in works}) == len(works)
        assert all(work.mode in registry.MODES for work in works)
        assert all(work.bytes > 0 for work in works if not work.family.startswith("model "))
        layers = [work for work in works if any("ResNet-50" in group for group in work.groups)]
        for group in {group for work in layers for group in work.groups if "ResNet-50" in group}:
            assert sum(work.count for work in layers if group in work.groups) == 53


def test_rivals_that_are_absent_are_named_and_offer_nothing():
    work = Work("dropout", "forward", (16,), "float32", 2, dropouts.dropout)
    states = rivals.states()
    assert set(states) == {"FlagGems", "inplace_abn", "apex", "xformers", "Liger-Kernel", "flash-attn"}
    absent = [name for name in states if not rivals.installed(rivals.RIVALS[name])]
    assert all("not installed" in states[name] for name in absent)
    assert not set(rivals.candidates(work, "cuda", {}, lambda setup: None)) & set(absent)


def test_a_rival_that_is_installed_is_a_candidate(monkeypatch):
    """FlagGems patches ATen inside a context: the torch function is to run within it."""
    import sys
    import types
    from contextlib import contextmanager
    from importlib.machinery import ModuleSpec

    entered = []

    @contextmanager
    def use_gems():
        entered.append(True)
        yield
        entered.pop()

    module = types.ModuleType("flag_gems")
    module.__spec__ = ModuleSpec("flag_gems", None)
    module.use_gems = use_gems
    monkeypatch.setitem(sys.modules, "flag_gems", module)
    monkeypatch.setitem(rivals.RIVALS, "FlagGems", dataclasses.replace(rivals.RIVALS["FlagGems"], remark=""))
    seen = []

    def torch_setup():
        return lambda x: seen.append(len(entered)) or x, ()

    work = Work("dropout", "forward", (16,), "float32", 2, dropouts.dropout)
    x = torch.ones(16)
    found = rivals.candidates(
        work,
        "cpu",
        {"torch": torch_setup},
        lambda setup: problems.mode_candidate("forward", setup()[0], [x], [x], None),
    )
    outcome(found["FlagGems"]())
    assert seen == [1]
    assert entered == []


@pytest.mark.parametrize("module", ["broken_rival", "broken_rival.kernels"])
def test_a_rival_that_does_not_import_fails_alone(module, tmp_path, monkeypatch):
    from modeprobe.benchmarks import measure
    from modeprobe.benchmarks.timing import Limits

    (tmp_path / "broken_rival").mkdir()
    (tmp_path / "broken_rival" / "__init__.py").write_text("raise OSError('libcudart.so.11.0: not found')")
    monkeypatch.syspath_prepend(str(tmp_path))

    def load(work, functions, build):
        importlib.import_module(module)

    rival = rivals.Rival(module, "broken-rival", ("dropout",), load)
    monkeypatch.setitem(rivals.RIVALS, "broken", rival)
    assert rivals.states()["broken"] == "version unknown"
    work = Work("dropout", "forward", (64,), "float32", 2, dropouts.dropout)
    rows = {row.provider: row for row in measure.measure(work, "cpu", Limits(seconds=0.0, least_rounds=2))}
    assert (rows["broken"].status, rows["broken"].reason) == (
        "failed",
        "OSError: libcudart.so.11.0: not found",
    )
    assert rows["torch"].status == "ok"


def test_a_part_that_a_rival_no_longer_has_is_absent():
    assert rivals.present("json.decoder")
    assert not rivals.present("json.triton.dropout")
    assert not rivals.present("no_such_package.part")


def test_models_train_and_are_judged():
    from modeprobe.benchmarks import models, works_models

    work = Work(
        "model mlp", "step", (32, 16), "float32", 0, works_models.model_problem(lambda: models.mlp(16), False)
    )
    problem = work.setup(work, "cpu")
    candidate = problem.candidates["torch"]()
    first, second = candidate.run(), candidate.run()
    assert problem.verify(first) is None
    assert not torch.equal(first[1], second[1])
    assert problem.verify((first[0] + 1, first[1]))
    assert problem.verify((first[0], first[1] * float("nan")))
    assert memory.saved_bytes(candidate.forward) > 0


def test_the_resnet_is_resnet_50():
    from modeprobe.benchmarks import models

    with torch.device("meta"):
        model = models.ResNet()
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    assert sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules()) == 53

"""The modules among torch's: state, modes, dtypes, compilation and checkpointing."""

import copy
import io
import pickle

import pytest
import torch
from support.batch_norm import assert_same_state, sample
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import modeprobe as mp
from modeprobe import functional as MF

pytestmark = pytest.mark.rung("reference")

DIMENSIONS = {1: (8, 5, 7), 2: (8, 5, 6, 7), 3: (4, 5, 3, 4, 5)}


def pair(dimension=2, **options):
    ours = getattr(mp.nn, f"BatchNorm{dimension}d")(5, **options)
    theirs = getattr(nn, f"BatchNorm{dimension}d")(5, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 1.0},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"eps": 1e-3, "momentum": 0.3},
    ],
    ids=str,
)
def test_training_and_evaluation(dimension, options):
    ours, theirs = pair(dimension, **options)
    shape = DIMENSIONS[dimension]
    for step in range(4):
        training = step != 2
        x = sample(shape, seed=step)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = ours.train(training)(a), theirs.train(training)(b)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
        assert_same_state(ours, theirs)
    for mine, own in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, own.grad)
    assert repr(ours) == repr(theirs)


def test_flipped_tracking():
    ours, theirs = pair()
    x = sample(DIMENSIONS[2])
    for module in (ours, theirs):
        module.track_running_stats = False
        module(x)
    assert_same_state(ours, theirs)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_without_a_counter_or_tracking():
    ours, theirs = pair(momentum=None)
    x = sample(DIMENSIONS[2])
    for module in (ours, theirs):
        module.num_batches_tracked = None
        module(x)
    assert_same_state(ours, theirs)
    MF.batch_norm(x, None, None, training=True, momentum=None)
    skipping = mp.nn.BatchNorm2d(5, nonfinite="skip")
    skipping.track_running_stats = False
    skipping(x * torch.nan)
    assert skipping.skipped_batches == 0


def test_missing_bias():
    bn = mp.nn.BatchNorm2d(5, bias=False)
    assert bn.bias is None
    assert bn.weight is not None
    x = sample(DIMENSIONS[2])
    torch.testing.assert_close(bn(x), nn.BatchNorm2d(5)(x))


def test_no_grad_still_updates():
    ours, theirs = pair()
    with torch.no_grad():
        for module in (ours, theirs):
            module(sample(DIMENSIONS[2]))
    assert_same_state(ours, theirs)
    assert ours.num_batches_tracked == 1


def test_twice_before_backward_and_buffers_and_bias_changed_between():
    ours, _ = pair()
    a, b = sample(DIMENSIONS[2], seed=1).requires_grad_(), sample(DIMENSIONS[2], seed=2).requires_grad_()
    first, second = ours(a), ours(b)
    ours.running_mean.copy_(torch.ones(5))
    ours.running_var.zero_()
    with torch.no_grad():
        before = ours.bias.clone()
        ours.bias.add_(1)
    (first.square().sum() + second.pow(3).sum()).backward()
    for x, power in ((a, 2), (b, 3)):
        y = x.detach().clone().requires_grad_()
        F.batch_norm(y, None, None, ours.weight, before, True).pow(power).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu_tanh"])
def test_second_derivatives(training, activation):
    torch.manual_seed(1)
    x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)

    def function(x, weight, bias, residual):
        return MF.batch_norm(
            x,
            mean.clone(),
            var.clone(),
            weight,
            bias,
            training,
            activation=activation,
            residual=residual,
            dropout_p=0.3,
            key=mp.mask.key(5),
        )

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, residual))
    alone = lambda x, residual: function(x, weight.detach(), bias.detach(), residual)  # noqa: E731
    for some, inputs in ((function, (x, weight, bias, residual)), (alone, (x, residual))):
        grad = torch.randn_like(x)
        once, twice = (
            torch.autograd.grad(some(*inputs), inputs, grad, create_graph=again) for again in (False, True)
        )
        torch.testing.assert_close(twice, once)
    if not training:
        assert torch.autograd.gradgradcheck(alone, (x, residual))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointing_counts_a_batch_once(reentrant, momentum):
    ours, theirs = pair(momentum=momentum)
    for step in range(3):
        x = sample(DIMENSIONS[2], seed=step)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = checkpoint(ours, a, use_reentrant=reentrant), theirs(b)
        y.pow(3).sum().backward()
        expected.pow(3).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    assert_same_state(ours, theirs)


def test_nested_checkpoints():
    ours, theirs = pair()

    def inner(x):
        return checkpoint(ours, x, use_reentrant=False) * 2

    x = sample(DIMENSIONS[2]).requires_grad_()
    checkpoint(inner, x, use_reentrant=False).pow(2).sum().backward()
    theirs(x)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing_compiled_counts_a_batch_once(reentrant, inside, backend):
    """Whether a forward is a recomputation is asked when the graph runs, not when it is made."""
    torch._dynamo.reset()
    ours, theirs = pair()
    if inside:
        run = torch.compile(lambda x: checkpoint(ours, x, use_reentrant=reentrant), backend="aot_eager")
    else:
        compiled = torch.compile(ours, backend="aot_eager")
        run = lambda x: checkpoint(compiled, x, use_reentrant=reentrant)  # noqa: E731
    for step in range(2):
        x = sample(DIMENSIONS[2], seed=step)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        with mp.backend(backend):
            run(a).pow(3).sum().backward()
        theirs(b).pow(3).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_compiled_gradients(backend):
    torch._dynamo.reset()
    activations = {None: nn.Identity(), "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(), "silu": nn.SiLU(),
                   "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh")}  # fmt: skip
    ours = nn.Sequential(*(mp.nn.BatchNorm2d(5, activation=name) for name in activations)).double()
    theirs = nn.Sequential(
        *(nn.Sequential(nn.BatchNorm2d(5), layer) for layer in activations.values())
    ).double()
    with mp.backend(backend):
        x = sample(DIMENSIONS[2], torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        torch.compile(ours, backend="aot_eager", fullgraph=True)(a).pow(3).sum().backward()
    theirs(b).pow(3).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 3e21])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_non_finite_batches_can_be_skipped(fill, momentum):
    ours = mp.nn.BatchNorm2d(5, momentum=momentum, nonfinite="skip")
    theirs = nn.BatchNorm2d(5, momentum=momentum)
    bad = sample(DIMENSIONS[2], seed=9)
    bad[0, 2, 1, 1] = fill
    for step in range(3):
        x = sample(DIMENSIONS[2], seed=step)
        ours(x)
        theirs(x)
        y = ours(bad)
        assert y.isnan().any() == (fill != 3e21)
    assert_same_state(ours, theirs)
    assert ours.skipped_batches == 3
    assert not ours.skipped_batches.is_floating_point()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_buffers_stay_float32(dtype):
    ours, _ = pair(momentum=0.01)
    ours.to(dtype)
    assert ours.weight.dtype == dtype
    assert ours.running_mean.dtype == ours.running_var.dtype == torch.float32
    truth = nn.BatchNorm2d(5, momentum=0.01).double()
    truth.load_state_dict(ours.state_dict())
    for step in range(50):
        x = sample(DIMENSIONS[2], dtype, mean=3.0, seed=step)
        ours(x)
        truth(x.double())
    torch.testing.assert_close(ours.running_mean.double(), truth.running_mean, rtol=1e-5, atol=1e-5)
    assert mp.nn.BatchNorm2d(5, dtype=dtype).running_var.dtype == torch.float32
    out = mp.nn.BatchNorm2d(5, float32_buffers=False).to(dtype)
    assert out.running_mean.dtype == dtype
    torch_half = nn.BatchNorm2d(5).to(dtype)
    torch_half.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(torch_half.state_dict(), strict=True)
    assert ours.running_mean.dtype == torch.float32
    assert ours.float().double().running_mean.dtype == torch.float64
    assert ours.to("meta").half().running_mean.is_meta
    assert ours.to_empty(device="cpu").running_mean.dtype == torch.float32
    ours.load_state_dict(torch_half.state_dict(), assign=True)
    assert ours.weight.dtype == dtype
    assert ours.running_mean.dtype == ours.running_var.dtype == torch.float32


def test_made_on_meta_and_reset():
    with torch.device("meta"):
        ours = mp.nn.BatchNorm2d(5, nonfinite="skip", statistics="pending")
    ours.load_state_dict(nn.BatchNorm2d(5).state_dict(), assign=True)
    x = sample(DIMENSIONS[2])
    ours(x)
    ours(x * torch.nan)
    ours.commit()
    assert (ours.num_batches_tracked, ours.skipped_batches) == (1, 1)
    theirs = nn.BatchNorm2d(5)
    theirs(x)
    assert_same_state(ours, theirs)
    ours(x)
    ours.reset_running_stats()
    ours.commit()
    assert ours.skipped_batches == 0
    assert_same_state(ours, nn.BatchNorm2d(5))
    skipping = nn.utils.skip_init(mp.nn.BatchNorm2d, 5, dtype=torch.bfloat16)
    assert skipping.running_var.dtype == torch.float32


def test_a_state_dict_from_before_batches_were_counted():
    ours, theirs = pair()
    old = copy.deepcopy(theirs.state_dict())
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    for module in (ours, theirs):
        module.num_batches_tracked += 3
        module.running_mean += 1
        assert not any(module.load_state_dict(old.copy(), strict=True))
    assert_same_state(ours, theirs)
    assert not ours.running_mean.any()


def test_torchs_tools():
    """Averaging of weights, and folding into a convolution, which find their layers by torch's classes."""
    ours = nn.Sequential(nn.Conv2d(3, 5, 1), mp.nn.BatchNorm2d(5))
    theirs = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
    theirs.load_state_dict(ours.state_dict())
    data = [sample((n, 3, 4, 4), seed=n) for n in (4, 4, 2)]
    averages = []
    for model in (ours, theirs):
        update_bn(data, model)
        averages.append(AveragedModel(model, use_buffers=True))
        averages[-1].update_parameters(model)
        model(data[0] + 3)
        averages[-1].update_parameters(model)
    assert_same_state(ours, theirs)
    assert_same_state(*averages)
    folded = nn.utils.fusion.fuse_conv_bn_eval(*ours.eval())
    torch.testing.assert_close(folded(data[0]), theirs.eval()(data[0]), rtol=1e-4, atol=1e-5)


def test_copies_and_pickles():
    bn = mp.nn.BatchNorm2d(5, activation="relu", nonfinite="skip")
    x = sample(DIMENSIONS[2])
    bn(x)
    buffer = io.BytesIO()
    torch.save(bn, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn)), loaded):
        assert_same_state(other, bn)
        other.skipped_batches += 1
        assert bn.skipped_batches == 0
        assert torch.equal(other.eval()(x), copy.deepcopy(bn).eval()(x))


def test_lazy_modules_after_materialisation():
    lazy = nn.Sequential(nn.LazyBatchNorm2d(momentum=None))
    x = sample(DIMENSIONS[2])
    lazy(x)
    mp.swap(lazy)
    assert type(lazy[0]) is mp.nn.BatchNorm2d
    theirs = nn.BatchNorm2d(5, momentum=None)
    for _ in range(2):
        theirs(x)
    lazy(x)
    assert_same_state(lazy[0], theirs)


def test_functional_call():
    """Plain, under grad, and for an ensemble under vmap; buffers that vmap does not share are refused."""
    ours, theirs = pair()
    x = sample(DIMENSIONS[2])
    results, refused = [], []
    for module in (ours, theirs):

        def call(parameters, buffers, module=module):
            return torch.func.functional_call(module, (parameters, buffers), (x,)).pow(3).sum()

        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        before = copy.deepcopy(module.state_dict())
        own = [{k: v.clone() for k, v in buffers.items()} for _ in range(2)]
        stacked = torch.func.stack_module_state([copy.deepcopy(module) for _ in range(3)])
        results.append(
            (
                call(parameters, own[0]),
                torch.func.grad(call)(parameters, own[1]),
                torch.func.vmap(call)(*stacked),
                own,
                stacked[1],
            )
        )
        assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
        with pytest.raises(RuntimeError, match="track_running_stats` to be False") as error:
            torch.func.vmap(module)(torch.stack([x, x]))
        refused.append(str(error.value))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)
    assert refused[1].startswith(refused[0])


def test_autocast():
    ours, theirs = pair()
    for module in (ours, theirs):
        module.model = nn.Conv2d(3, 5, 3)
    ours.model.load_state_dict(theirs.model.state_dict())
    x = sample((4, 3, 8, 8))
    outputs = []
    for module in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(module.model(x))
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        outputs.append((y, module.weight.grad, module.running_var))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0.02, atol=0.05)


def test_gradient_scaler_with_autocast():
    """A step whose gradients overflow is skipped as with torch: parameters stay, statistics go on."""
    ours, theirs = pair()
    models, scalers, optimizers = [], [], []
    for module in (ours, theirs):
        models.append(nn.Sequential(nn.Conv2d(3, 5, 3), module, nn.Flatten(), nn.Linear(180, 1)))
        scalers.append(torch.amp.GradScaler("cpu", init_scale=2.0**8))
        optimizers.append(torch.optim.SGD(models[-1].parameters(), lr=0.01))
    models[1].load_state_dict(models[0].state_dict())
    for step, factor in enumerate((1.0, torch.inf, 1.0)):
        x = sample((4, 3, 8, 8), seed=step)
        before = copy.deepcopy(list(models[0].parameters()))
        for model, scaler, optimizer in zip(models, scalers, optimizers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                y = model(x)
            scaler.scale(y.float().square().mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        skipped = all(torch.equal(a, b) for a, b in zip(before, models[0].parameters(), strict=True))
        assert skipped == (factor == torch.inf)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    mine, own = models[0].state_dict(), models[1].state_dict()
    torch.testing.assert_close(mine, own, rtol=0.02, atol=0.02)
    assert ours.num_batches_tracked == 3


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_compiled_in_one_graph(momentum, activation):
    torch._dynamo.reset()
    eager = mp.nn.BatchNorm2d(5, momentum=momentum, activation=activation, nonfinite="skip")
    compiled = copy.deepcopy(eager)
    run = torch.compile(lambda m, x, r: m(x * 2, r).sin(), fullgraph=True, backend="aot_eager")
    for step in range(3):
        x, r = sample(DIMENSIONS[2], seed=step), sample(DIMENSIONS[2], seed=step + 7)
        grads = []
        for module, function in ((eager, lambda m, x, r: m(x * 2, r).sin()), (compiled, run)):
            a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
            y = function(module, a, b)
            y.square().sum().backward()
            grads.append((y, a.grad, b.grad, module.weight.grad))
        torch.testing.assert_close(grads[0], grads[1])
    assert compiled.num_batches_tracked == 3
    assert_same_state(compiled, eager)
    with torch.no_grad():
        torch.testing.assert_close(run(compiled.eval(), x, r), eager.eval()(x * 2, r).sin())


def test_compiled_with_the_input_as_its_own_residual():
    torch._dynamo.reset()
    module, x = mp.nn.BatchNorm2d(5, activation="relu"), sample(DIMENSIONS[2])
    gradients = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        y = x.clone().requires_grad_() * 2
        gradients.append(torch.autograd.grad(run(y, y).square().sum(), y)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("inside", [True, False])
def test_compiled_by_inductor(inside):
    """Checkpointed, with the checkpoint inside the graph or around it: each step counts once."""
    torch._dynamo.reset()
    eager = nn.Sequential(nn.Conv2d(3, 5, 3), mp.nn.BatchNorm2d(5, momentum=None), nn.ReLU())
    model = copy.deepcopy(eager)
    if inside:
        run = torch.compile(lambda x, reentrant: checkpoint(model, x, use_reentrant=False), fullgraph=True)
    else:
        compiled = torch.compile(model, fullgraph=True)
        run = lambda x, reentrant: checkpoint(compiled, x, use_reentrant=reentrant)  # noqa: E731
    for step in range(2):
        x = sample((4, 3, 8, 8), seed=step).requires_grad_()
        eager(x).square().sum().backward()
        run(x, step == 1).square().sum().backward()
    assert model[1].num_batches_tracked == 2
    assert_same_state(model, eager)
    for mine, own in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, own.grad, rtol=1e-4, atol=1e-4)


def test_export():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), mp.nn.BatchNorm2d(5)).eval()
    x = sample((4, 3, 8, 8))
    program = torch.export.export(model, (x,)).run_decompositions()
    torch.testing.assert_close(program.module()(x), model(x))
    training = torch.export.export(mp.nn.BatchNorm2d(5, momentum=None), (sample(DIMENSIONS[2]),))
    theirs = nn.BatchNorm2d(5, momentum=None)
    module = training.module()
    for step in range(2):
        batch = sample(DIMENSIONS[2], seed=step)
        torch.testing.assert_close(module(batch), theirs(batch))
    torch.testing.assert_close(dict(module.named_buffers())["running_var"], theirs.running_var)


def test_function_transforms_with_frozen_statistics():
    mean, var = torch.zeros(5), torch.ones(5)
    x = sample((3, 5))
    jacobian = torch.func.jacrev(lambda x: F.batch_norm(x, mean, var).square())(x)
    torch.testing.assert_close(torch.func.jacrev(lambda x: MF.batch_norm(x, mean, var).square())(x), jacobian)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: MF.batch_norm(x[None], mean, var).square().sum()))
    expected = torch.func.vmap(torch.func.grad(lambda x: F.batch_norm(x[None], mean, var).square().sum()))(x)
    torch.testing.assert_close(per_sample(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(per_sample, backend="eager", fullgraph=True)(x), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_forward_mode_derivatives(training, affine):
    ours, theirs = pair(affine=affine)
    x, tangent = sample(DIMENSIONS[2]), sample(DIMENSIONS[2], seed=1)
    found = []
    for module in (ours, theirs):
        with forward_ad.dual_level():
            y = module.train(training)(forward_ad.make_dual(x, tangent))
            found.append(forward_ad.unpack_dual(y))
    for mine, own in zip(*found, strict=True):
        torch.testing.assert_close(mine, own)
    assert_same_state(ours, theirs)

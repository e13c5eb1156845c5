"""The dropout family under torch's own tools: opcheck, compile, checkpointing, export, autocast, hooks."""

import io

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import modeprobe as mp
from modeprobe import _extension, mask
from modeprobe import functional as F

pytestmark = pytest.mark.rung("reference")
NOT_BUILT = "the compiled library is not built: pip install -e ."
compiled = pytest.mark.skipif(not _extension.loaded(), reason=NOT_BUILT)

KEY = mask.key(31, 32)
P = torch.tensor(0.3, dtype=torch.float64)


def opchecks():
    x, residual = torch.randn(6, 5), torch.randn(6, 5)
    images = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    probabilities = torch.rand(6, 5)
    yield "dropout", (x.half(), KEY, 0.0, 0, True, P)
    for tensor in (x, x.t(), torch.randn(6, 10)[:, ::2], torch.randn(5).expand(6, 5), images):
        yield "dropout", (tensor, KEY, 0.3, 3)
        yield "structured_dropout", (tensor, KEY, 0.3, [1], 3)
        yield "alpha_dropout", (tensor, KEY, 0.3, [], False, 3)
    yield "alpha_dropout", (x, KEY, 0.3, [0], True, 3)
    for tensor in (x.clone(), images.clone()):
        yield "dropout_", (tensor, KEY, 0.3, 3)
    yield "dropout_mask", (KEY, 100, 0.3, 3)
    yield "fold_in", (KEY, 3)
    yield "bias_dropout_add", (x, torch.randn(5), residual, KEY, 0.3, 3)
    yield "bias_dropout_add", (x.t(), None, residual.t(), KEY, 0.3)
    yield "bias_dropout_add_backward", (x, KEY, 0.3, 3)
    yield "bias_dropout_add_backward", (torch.ones(()).expand(6, 5), KEY, 0.3, 3)
    for attended in (None, x > 0, torch.randn(1, 5)):
        yield "softmax_dropout", (x, attended, KEY, 0.3, True, 3)
    yield "softmax_dropout", (x.t(), None, KEY, 0.3, False)
    yield "softmax_dropout_backward", (x, probabilities, KEY, 0.3, 3)


@compiled
@pytest.mark.parametrize(("name", "arguments"), list(opchecks()) if _extension.loaded() else [])
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(torch.ops.modeprobe, name).default, arguments)


FUNCTIONS = {
    "dropout": lambda x, p: F.dropout(x, p, key=KEY),
    "transposed": lambda x, p: F.dropout(x.t(), p, key=KEY),
    "sliced": lambda x, p: F.dropout(x[:, ::2], p, key=KEY),
    "in place": lambda x, p: F.dropout(x * 1, p, key=KEY, inplace=True),
    "rows": lambda x, p: F.dropout(x, p, key=KEY, mask_shape=(x.shape[0], 1)),
    "alpha_dropout": lambda x, p: F.alpha_dropout(x, p, True, key=KEY),
    "bias_dropout_add": lambda x, p: F.bias_dropout_add(x, x[0], x, p, key=KEY),
    "softmax_dropout": lambda x, p: F.softmax_dropout(x, p, key=KEY),
    "mask": lambda x, p: x * F.dropout_mask(x.shape, p, KEY),
    "folded key": lambda x, p: F.dropout(x, p, key=mask.fold_in(KEY, 3)),
}


INDUCTOR = {("transposed", "native"), ("in place", "native"), ("transposed", "reference")}
TRACED = {"transposed", "rows", "in place", "folded key"}  # seconds each: the whole of Philox is in the graph


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compile_equals_eager(name, backend, engine):
    if backend == "native" and not _extension.loaded():
        pytest.skip(NOT_BUILT)
    if engine == "inductor" and (name, backend) not in INDUCTOR:
        pytest.skip("one engine suffices here: Inductor sees the same opaque operators")
    if backend == "reference" and name not in TRACED:
        pytest.skip("the other functions trace the same plain torch")
    torch._dynamo.reset()
    function = FUNCTIONS[name]
    with mp.backend(backend):
        fast = torch.compile(lambda x, p: function(x, p) * 2, fullgraph=True, backend=engine)
        for p in (0.3, torch.tensor(0.3)) if engine == "aot_eager" else (0.3,):
            x = torch.randn(12, 10, requires_grad=True)
            ours, expected = fast(x, p), function(x, p) * 2
            torch.testing.assert_close(ours, expected)
            assert ours.stride() == expected.stride()
            grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, expected)]
            torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_new_p_tensor_does_not_recompile(name):
    torch._dynamo.reset()
    counter = CompileCounter()
    fast = torch.compile(lambda x, p: FUNCTIONS[name](x, p), backend=counter, fullgraph=True)
    x = torch.randn(12, 10)
    for p in (0.1, 0.2, 0.0, 1.0):
        torch.testing.assert_close(fast(x, torch.tensor(p)), FUNCTIONS[name](x, p))
    assert counter.frame_count == 1


def test_a_traced_p_tensor_stays_an_input():
    x = torch.randn(100)
    traced = make_fx(lambda x, p: F.dropout(x, p, key=KEY))(x, torch.tensor(0.3))
    assert torch.equal(traced(x, torch.tensor(0.75)), F.dropout(x, 0.75, key=KEY))


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ours = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "modeprobe":
            self.ours.append(function)
        return function(*args, **(kwargs or {}))


@compiled
def test_the_backend_asked_for_is_the_one_that_runs():
    x, layer = torch.randn(8, requires_grad=True), mp.nn.Dropout()
    for function in (F.dropout, F.drop_path, layer):
        for name in ("native", "reference"):
            with mp.backend(name), Operators() as operators:
                function(x).sum().backward()
            assert len(operators.ours) == (2 if name == "native" else 0)
    layer.backend = "reference"
    with Operators() as operators:
        layer(x).sum().backward()
    assert not operators.ours


def test_another_backend_recompiles():
    torch._dynamo.reset()
    counter = CompileCounter()
    fast = torch.compile(lambda x: F.dropout(x, 0.5, key=KEY), backend=counter, fullgraph=True)
    x = torch.randn(64)
    expected = F.dropout(x, 0.5, key=KEY)
    for _ in range(2):
        for name in ("auto", "reference"):
            with mp.backend(name):
                assert torch.equal(fast(x), expected)
    assert counter.frame_count == (2 if _extension.loaded() else 1)


def test_compiled_calls_draw_fresh_keys_from_the_seed():
    torch._dynamo.reset()
    fast = torch.compile(lambda x: F.dropout(x, 0.5), fullgraph=True)
    x = torch.ones(1000)
    torch.manual_seed(1)
    first, second = fast(x), fast(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(fast(x), first)
    assert 400 < (first == 0).sum() < 600


def test_compiled_forward_and_backward_drop_the_same_elements():
    torch._dynamo.reset()
    fast = torch.compile(lambda x: F.dropout(x.sin(), 0.5), fullgraph=True)
    x = torch.rand(1000, requires_grad=True)
    y = fast(x + 0.1)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y == 0, grad == 0)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("given", [True, False])
def test_checkpointing_recomputes_the_same_mask(reentrant, given):
    key = KEY if given else None
    calls = []

    def block(x):
        calls.append(1)
        return F.dropout(F.alpha_dropout(x.exp(), 0.3, True, key=key), 0.4, key=key).square()

    x = torch.randn(200, requires_grad=True)
    torch.manual_seed(1)
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert len(calls) == 2
    torch.manual_seed(1)
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing_and_compiling(reentrant, inside):
    """Either inside the other, through the partitioner that chooses what the backward pass computes again."""
    torch._dynamo.reset()
    engine, x = "aot_eager_decomp_partition", torch.rand(1000, requires_grad=True)

    def block(x):
        return F.dropout(x.exp(), 0.5)

    if inside:
        compiled = torch.compile(block, backend=engine)
        y = checkpoint(compiled, x, use_reentrant=reentrant)
    else:
        y = torch.compile(lambda x: checkpoint(block, x, use_reentrant=reentrant), backend=engine)(x)
    y.sum().backward()
    assert torch.equal(y == 0, x.grad == 0)
    torch.testing.assert_close(x.grad, y.detach())


def test_the_generator_decides_like_any_random_operation():
    x = torch.ones(100)
    torch.manual_seed(4)
    first = F.dropout(x, 0.5)
    with torch.random.fork_rng():
        F.dropout(x, 0.5)
    second = F.dropout(x, 0.5)
    torch.manual_seed(4)
    assert torch.equal(F.dropout(x, 0.5), first)
    assert torch.equal(F.dropout(x, 0.5), second)


SAVED = {
    "dropout": (lambda x: F.dropout(x, 0.3), [16]),
    "in place": (lambda x: F.dropout(x + 1, 0.3, inplace=True), [16]),
    "channels": (lambda x: F.dropout1d(x, 0.3), [16]),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, 0.3, True), [16]),
    "p as a tensor": (lambda x: F.dropout(x, torch.tensor(0.3)), [16, 8]),
    "bias_dropout_add": (lambda x: F.bias_dropout_add(x, torch.ones(50), x, 0.3), [16]),
    "softmax_dropout": (lambda x: F.softmax_dropout(x, 0.3), [40 * 50 * 4, 16]),
    "softmax_dropout, mask": (lambda x: F.softmax_dropout(x, 0.3, x > 0), [40 * 50 * 4, 16]),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_for_backward(name):
    function, expected = SAVED[name]
    sizes = []
    x = torch.randn(40, 50, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        y = function(x)
    assert sizes == expected
    y.sum().backward()


def test_saved_keys_can_be_offloaded():
    x = torch.randn(100, requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        y = F.dropout(x, 0.5)
    y.sum().backward()
    assert torch.equal(y == 0, x.grad == 0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
        self.drop = mp.nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.linear(x))


@pytest.mark.parametrize("training", [True, False])
def test_export(training):
    model, x = Model().train(training), torch.randn(4, 8)
    program = torch.export.export(model, (x,))
    lowered, file = program.run_decompositions(), io.BytesIO()
    torch.export.save(lowered, file)
    file.seek(0)
    for stage in (program, lowered, torch.export.load(file)):
        names = [str(node.target) for node in stage.graph.nodes]
        assert any("dropout" in name for name in names) == (training and _extension.loaded())
        torch.manual_seed(7)
        expected = model(x)
        torch.manual_seed(7)
        assert torch.equal(stage.module()(x), expected)


def test_export_of_the_batch_size():
    model, x = Model().train(), torch.randn(4, 8)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=2)}})
    assert program.module()(torch.randn(9, 8)).shape == (9, 8)


def test_dynamic_shapes_do_not_recompile():
    torch._dynamo.reset()
    counter = CompileCounter()

    def function(x):
        return F.dropout2d(F.dropout(x, 0.5, key=KEY), 0.5, key=KEY)

    fast = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for n in (7, 8, 9):
        x = torch.randn(n, 3, 4, 5)
        assert torch.equal(fast(x), function(x))
    assert counter.frame_count == 1


def test_autocast_leaves_the_dtype_alone():
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(4, 4) @ torch.randn(4, 4)
        assert x.dtype == torch.bfloat16
        assert F.dropout(x, 0.5).dtype == torch.bfloat16
        assert F.dropout(x.float(), 0.5).dtype == torch.float32
        assert F.softmax_dropout(x, 0.5).dtype == torch.bfloat16
        assert F.bias_dropout_add(x, x[0], x, 0.5).dtype == torch.bfloat16


def test_autocast_mixes_dtypes_as_torch_does():
    x, bias, residual = torch.randn(4, 6), torch.randn(6), torch.randn(4, 6)
    short, added = x.bfloat16(), torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"bias must be .*bfloat16 of"):
        F.bias_dropout_add(short, bias, residual)
    with pytest.raises(ValueError, match=r"mask must be .*bfloat16 on"):
        F.softmax_dropout(short, 0.5, added)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b, c in (
            (short, bias, residual),
            (short, None, residual),
            (x, bias, short),
            (short, bias, short),
        ):
            plain = c + (a if b is None else a + b)
            ours = F.bias_dropout_add(a, b, c, training=False)
            assert ours.dtype == plain.dtype == torch.float32
            torch.testing.assert_close(ours, plain)
        bias.requires_grad_()
        F.bias_dropout_add(short, bias, residual, 0.5, key=KEY).sum().backward()
        assert torch.equal(bias.grad, 2.0 * F.dropout_mask((4, 6), 0.5, KEY).sum(0))
        ours = F.softmax_dropout(short, 0.5, added, key=KEY)
    assert torch.equal(ours, F.softmax_dropout(short, 0.5, added.bfloat16(), key=KEY))


class Named(torch.Tensor):
    called = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.called = function
        return super().__torch_function__(function, types, args, kwargs or {})


class Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.called.append(function)
        return function(*args, **(kwargs or {}))


CALLS = {  # each with other arguments, and one by keyword
    "dropout": lambda x: F.dropout(x, 0.5, key=KEY),
    "dropout1d": lambda x: F.dropout1d(x, 0.5, key=KEY),
    "dropout2d": lambda x: F.dropout2d(x[None], 0.5, key=KEY),
    "dropout3d": lambda x: F.dropout3d(x[None], p=0.5, key=KEY),
    "drop_path": lambda x: F.drop_path(input=x, key=KEY),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, True, key=KEY),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.5, True, key=KEY),
    "bias_dropout_add": lambda x: F.bias_dropout_add(torch.ones(6, 5, 4), None, residual=x, key=KEY),
    "softmax_dropout": lambda x: F.softmax_dropout(torch.ones(6, 5, 4), 0.5, x, key=KEY),
}


@pytest.mark.parametrize("name", CALLS)
def test_subclasses_modes_and_tracers_are_asked(name):
    x = torch.randn(6, 5, 4)
    expected = CALLS[name](x)
    y = CALLS[name](x.as_subclass(Named))
    assert Named.called is getattr(F, name)
    assert torch.equal(y.as_subclass(torch.Tensor), expected)
    with Watch() as watch:
        CALLS[name](x)
    assert getattr(F, name) in watch.called
    traced = torch.fx.symbolic_trace(CALLS[name])
    assert getattr(F, name) in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(x), expected)


@pytest.mark.parametrize("engine", [None, "aot_eager"])
def test_nested_tensors(engine):
    """Dropout of the values; the result may be added to its input."""
    torch._dynamo.reset()
    x = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(4, 5)], layout=torch.jagged)
    x.requires_grad_()

    def function(x):
        return x + F.dropout(x, 0.5, key=KEY, offset=3, scaling="classic")

    y = (torch.compile(function, backend=engine, fullgraph=True) if engine else function)(x)
    slope = 1.0 + F.dropout_mask((6, 5), 0.5, KEY, 3)
    assert torch.equal(y.values(), x.values() * slope)
    y.values().sum().backward()
    assert torch.equal(x.grad.values(), slope)
    assert F.dropout(x, 0.5, training=False) is x
    assert torch.equal(mp.nn.Dropout(torch.tensor(1.0))(x).values(), torch.zeros(6, 5))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_distributed_tensors_are_refused():
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        x = distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)])
        for function in (F.dropout, F.dropout1d, F.softmax_dropout):
            with pytest.raises(
                TypeError, match=r"must be a local tensor, got a DTensor; call it on to_local"
            ):
                function(x, 0.5)
        assert F.dropout(x, 0.5, training=False) is x
    finally:
        distributed.destroy_process_group()


def test_meta_tensors():
    x = torch.empty(4, 6, device="meta")
    assert F.dropout(x, 0.5).device.type == "meta"
    assert F.dropout2d(torch.empty(2, 3, 4, 5, device="meta"), 0.5).shape == (2, 3, 4, 5)

"""The operators on the Triton backend, end to end: modules, autograd, torch.compile, opcheck."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from modeprobe.triton_kernels._launch import launch

import modeprobe as mp
from modeprobe import mask
from modeprobe.ops import batch_norm_triton, dropout_triton
from modeprobe.ops.triton_call import prepared

pytestmark = [pytest.mark.rung("triton"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

KEY = mask.key(7, 9)


def test_dropout_forward_and_backward_use_one_mask():
    x = torch.randn(5, 40, requires_grad=True)
    with mp.backend("triton"):
        y = mp.functional.dropout(x, 0.3, key=KEY)
    (grad,) = torch.autograd.grad(y.sum(), x)
    kept = mask.keep_mask(x.shape, 0.3, KEY)
    assert torch.equal(y != 0, kept)
    assert torch.equal(grad != 0, kept)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norm_module_trains_as_torchs_does(channels_last):
    theirs = torch.nn.BatchNorm2d(3, momentum=None).double()
    ours = mp.nn.BatchNorm2d(3, momentum=None)
    for _ in range(2):
        x = torch.randn(4, 3, 5, 4)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        with mp.backend("triton"):
            y = ours(a)
        truth = theirs(b)
        grad = torch.randn_like(x)
        y.backward(grad)
        truth.backward(grad.double())
        torch.testing.assert_close(y.double(), truth, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=2e-6)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name].double(), value.double(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.weight.grad.double(), theirs.weight.grad, rtol=1e-5, atol=1e-5)
    with mp.backend("triton"):
        torch.testing.assert_close(ours.eval()(x).double(), theirs.eval()(x.double()), rtol=2e-6, atol=2e-6)


def test_compiled_graphs_equal_eager_ones():
    """Checkpointed: the second forward, inside the backward pass, leaves the buffers alone."""
    module = mp.nn.BatchNorm2d(3)
    other = copy.deepcopy(module)
    x = torch.randn(2, 3, 4, 4)

    def step(module, x):
        return mp.functional.dropout(module(x), 0.4, key=KEY)

    with mp.backend("triton"):
        run = torch.compile(step, backend="aot_eager", fullgraph=True)
        compiled = checkpoint(run, other, x, use_reentrant=False)
        compiled.sum().backward()
        assert torch.equal(compiled, step(module, x))
    assert torch.equal(other.running_mean, module.running_mean)
    assert int(other.num_batches_tracked) == 1


def test_opcheck():
    x = torch.randn(3, 4, 2, 3)
    weight, bias = torch.rand(4), torch.randn(4)
    statistics = torch.stack((torch.zeros(4), torch.ones(4)))
    buffers = [torch.zeros(4), torch.ones(4), torch.tensor(0), torch.tensor(0)]
    last = x.to(memory_format=torch.channels_last)
    samples = [
        (dropout_triton.dropout, (x, KEY, 0.3)),
        (dropout_triton.dropout_, (x.clone(), KEY, 0.3)),
        (dropout_triton.dropout_mask, (KEY, 17, 0.3)),
        (batch_norm_triton.batch_norm_train, (last, weight, bias, *buffers, 0.1, 1e-5)),
        (batch_norm_triton.batch_norm_eval, (x, weight, weight, weight, bias, 1e-5)),
        (
            batch_norm_triton.batch_norm_backward,
            (last, x, statistics, weight, bias, True, True, True, True),
        ),
        (batch_norm_triton.batch_norm_moments, (x,)),
        (batch_norm_triton.batch_norm_merge, (torch.rand(2, 10), *buffers, None)),
        (batch_norm_triton.batch_norm_backward_reduce, (x, x, statistics, weight, bias)),
        (batch_norm_triton.batch_norm_backward_input, (x, x, statistics, statistics, weight, bias, True)),
    ]
    for operator, arguments in samples:
        torch.library.opcheck(operator, arguments)


def test_vectors_with_strides():
    """A key from a table, parameters and buffers from a column: neighbours are not taken for elements."""
    x, key = torch.randn(4, 3, 5), torch.stack((KEY, mask.key(1, 2)), 1)[:, 0]
    values = torch.rand(3, 4).add(0.5)

    def run(columns):
        weight, bias, mean, var = columns
        y = mp.functional.batch_norm(x, mean, var, weight, bias, True, 0.1, 1e-5)
        return y, mean, var, mp.functional.dropout(x, 0.3, key=key)

    with mp.backend("triton"):
        got = run(values.clone().unbind(1))
        expected = run([column.contiguous() for column in values.unbind(1)])
    for mine, dense in zip(got, expected, strict=True):
        assert torch.equal(mine, dense)
    assert torch.equal(got[3] != 0, mask.keep_mask(x.shape, 0.3, KEY))


@pytest.mark.parametrize("current", [0, 1])
def test_launches_on_the_device_of_the_data(monkeypatch, current):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda index: entered.append(index) or nullcontext())
    x = SimpleNamespace(get_device=lambda: 1)
    assert prepared(lambda input: input)(x) is x
    assert entered == ([] if current == 1 else [1])


def test_a_kernel_is_found_again_for_what_it_was_compiled_for_and_nothing_else():
    compiled, ran = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *args: ran.append((grid[:3], args))

    class Kernel:
        arg_names = ("x", "y", "n")

        def __getitem__(self, grid):
            def first(*args, num_warps):
                compiled.append((args, num_warps))
                return Compiled()

            return first

    kernel, x = Kernel(), torch.zeros(8)
    calls = [
        (x, None, 1),
        (x.half(), None, 1),
        (x[1:], None, 1),
        (x, x, 1),
        (x, None, 2),
    ]
    for args in calls:
        launch(kernel, (7,), 4, *args)
    launch(kernel, (7,), 8, *calls[0])
    assert compiled == [(args, 4) for args in calls] + [(calls[0], 8)]
    assert not ran
    other = torch.ones(5)
    launch(kernel, (3, 2), 4, other, None, 1)
    assert len(compiled) == len(calls) + 1
    assert ran == [((3, 2, 1), (other, None, 1))]

"""PyTorch's own samples of BatchNorm, and its check of operators, on ours."""

import copy

import pytest
import torch
from support.batch_norm import assert_same_state, sample
from torch import nn
from torch.nn import functional as F

import modeprobe as mp
from modeprobe import functional as MF

pytestmark = pytest.mark.rung("reference")


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_pytorchs_module_samples(name):
    pytest.importorskip("expecttest", reason="pip install expecttest")
    from torch.testing._internal.common_modules import module_db

    info = next(i for i in module_db if i.module_cls is getattr(nn, name))
    cls = getattr(mp.nn, name)
    count = 0
    for dtype in (torch.float32, torch.float64):
        for training in (True, False):
            samples = info.module_inputs_func(
                info, device="cpu", dtype=dtype, requires_grad=True, training=training
            )
            for item in samples:
                init = item.constructor_input
                ours, theirs = (
                    kind(*init.args, **init.kwargs).to(dtype).train(training)
                    for kind in (cls, info.module_cls)
                )
                ours.load_state_dict(theirs.state_dict(), strict=True)
                results = []
                for module in (ours, theirs):
                    args = [copy.deepcopy(a) for a in item.forward_input.args]
                    try:
                        y = module(*args, **item.forward_input.kwargs)
                    except (ValueError, RuntimeError) as error:
                        results.append((type(error), str(error)))
                        continue
                    y.square().sum().backward()
                    results.append((y, args[0].grad, *[p.grad for p in module.parameters()]))
                if isinstance(results[1][0], type):
                    assert results[0] == results[1]
                else:
                    torch.testing.assert_close(results[0], results[1])
                    assert_same_state(ours, theirs)
                count += 1
    assert count == 4 * len(samples)


def test_pytorchs_function_samples():
    pytest.importorskip("expecttest", reason="pip install expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    info = next(i for i in op_db if i.name == "nn.functional.batch_norm")
    count = 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for item in info.sample_inputs("cpu", dtype, requires_grad=True):
            results = []
            for function in (MF.batch_norm, F.batch_norm):
                tensors = [
                    a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a
                    for a in (item.input, *item.args)
                ]
                kwargs = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in item.kwargs.items()}
                y = function(*tensors, **kwargs)
                (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)).sum().backward()
                results.append((y, tensors[0].grad, tensors[1], tensors[2]))
            tolerance = {torch.bfloat16: 0.05, torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
            torch.testing.assert_close(results[0], results[1], rtol=tolerance, atol=tolerance)
            count += 1
    assert count > 10


def test_operator_registration():
    ops = torch.ops.modeprobe
    x = sample((4, 5, 6, 6))
    for layout in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
        weight, bias = torch.rand(5), torch.rand(5)
        buffers = torch.zeros(5), torch.ones(5), torch.tensor(0), torch.tensor(0)
        torch.library.opcheck(
            ops.batch_norm_train.default,
            (layout, weight, bias, *buffers, None, 1e-5, torch.rand_like(layout), 1),
            {"save_sign_bits": True},
        )
        torch.library.opcheck(
            ops.batch_norm_eval.default, (layout, *buffers[:2], weight, bias, 1e-5), {"save": True}
        )
        statistics = torch.rand(2, 5)
        grad = torch.rand(1, 5, 1, 1).expand_as(x)
        torch.library.opcheck(
            ops.batch_norm_backward.default,
            (grad, layout, statistics, weight, bias, True, True, True, True, None, 3),
        )
        torch.library.opcheck(ops.batch_norm_moments.default, (layout,))
        torch.library.opcheck(
            ops.batch_norm_backward_reduce.default, (grad, layout, statistics, weight, bias)
        )
        torch.library.opcheck(
            ops.batch_norm_backward_input.default, (grad, layout, statistics, statistics, weight, bias, False)
        )
    moments = torch.stack([ops.batch_norm_moments(x), ops.batch_norm_moments(x + 1)])
    torch.library.opcheck(ops.batch_norm_merge.default, (moments, *buffers, 0.1))

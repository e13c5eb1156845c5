"""Comparing batch normalisation with torch in float64: the error allowed is twice torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

np = pytest.importorskip("numpy", reason="numpy is not installed: its longest float is the truth")


def ulp(reference: torch.Tensor, dtype: torch.dtype) -> float:
    """One unit in the last place of the largest value."""
    largest = reference.abs().max().item() if reference.numel() else 0.0
    return max(largest, 1e-30) * torch.finfo(dtype).eps


def assert_as_good(name, ours, torchs, truth, slack=0.0):
    """``ours`` is as near to ``truth`` (float64 tensor or longer array) as twice ``torchs``, plus one ulp.

    slack: further error that the input's own rounding would cause.
    """
    assert ours.dtype == torchs.dtype, name
    assert ours.shape == truth.shape, name

    def error_of(value):
        if isinstance(truth, np.ndarray):
            return torch.from_numpy(np.abs(value.detach().numpy() - truth).astype(np.float64))
        return (value.double() - truth).abs()

    error, own = error_of(ours), error_of(torchs)
    if isinstance(truth, np.ndarray):
        truth = torch.from_numpy(truth.astype(np.float64))
    finite = truth.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: other places are finite"
    error, own = error[finite], own[finite]
    if error.numel() == 0:
        return
    allowed = 2 * own.max().item() + ulp(truth[finite], ours.dtype) + slack
    assert error.max().item() <= allowed, (
        f"{name}: error {error.max().item():.3e}, torch's {own.max().item():.3e}, allowed {allowed:.3e}"
    )


def sample(shape, dtype=torch.float32, mean=0.5, std=1.5, layout=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).to(dtype)
    return to_layout(x, layout)


def to_layout(x, layout):
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        big = torch.empty([n + 2 for n in x.shape], dtype=x.dtype)
        view = big[tuple(slice(1, n + 1) for n in x.shape)]
        view.copy_(x)
        return view
    if layout == "misaligned":
        flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
        return flat.view(x.shape).copy_(x)
    return x


class Case:
    """One call with its buffers and gradients, in a given precision."""

    def __init__(self, x, weight, bias, buffers, grad, *, training=True, momentum=0.1, eps=1e-5):
        self.x = x.detach().requires_grad_()
        self.weight = None if weight is None else weight.detach().clone().requires_grad_()
        self.bias = None if bias is None else bias.detach().clone().requires_grad_()
        self.mean, self.var = (None, None) if buffers is None else (b.clone() for b in buffers)
        self.grad, self.training, self.momentum, self.eps = grad, training, momentum, eps

    def run(self, function, **options):
        self.y = function(
            self.x,
            self.mean,
            self.var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            **options,
        )
        self.y.backward(self.grad)
        return self

    def results(self):
        named = {"output": self.y, "grad_input": self.x.grad}
        for name in ("weight", "bias"):
            parameter = getattr(self, name)
            if parameter is not None:
                named[f"grad_{name}"] = parameter.grad
        if self.mean is not None:
            named |= {"running_mean": self.mean, "running_var": self.var}
        return named


def compare(x, weight, bias, buffers, grad, ours, *, slack=0.0, **options):
    """Run ours, torch's in the same precision and torch's in float64, and compare every result."""

    def double(t):
        return None if t is None else t.double()

    if x.dtype == torch.float64:
        truths = in_long_double(x, weight, bias, buffers, grad, **options)
    else:
        wide = None if buffers is None else tuple(map(double, buffers))
        case = Case(x.double(), double(weight), double(bias), wide, grad.double(), **options)
        truths = case.run(F.batch_norm).results()
    mine = Case(x, weight, bias, buffers, grad, **options).run(ours)
    try:
        own = Case(x, weight, bias, buffers, grad, **options).run(F.batch_norm).results()
    except RuntimeError as error:
        if "dtype" not in str(error) and "scalar type" not in str(error):
            raise
        # A mix of dtypes that torch refuses: rounding the truth is the best it could do.
        own = {k: v.to(mine.results()[k].dtype) for k, v in truths.items()}
    for name, value in mine.results().items():
        assert_as_good(name, value, own[name], truths[name], slack)
    assert mine.y.dtype == x.dtype
    return mine


def in_long_double(x, weight, bias, buffers, grad, *, training=True, momentum=0.1, eps=1e-5):
    """The formulas once more, in numpy's longest float: the truth for float64."""

    def wide(t):
        return t.detach().numpy().astype(np.longdouble)

    axes = tuple(d for d in range(x.dim()) if d != 1)
    shape = [1, -1] + [1] * (x.dim() - 2)
    values, dy, n = wide(x), wide(grad), x.numel() // x.shape[1]
    if training or buffers is None:
        mean = values.mean(axes)
        var = ((values - mean.reshape(shape)) ** 2).mean(axes)
    else:
        mean, var = map(wide, buffers)
    invstd = 1 / np.sqrt(var + np.longdouble(eps))
    xhat = (values - mean.reshape(shape)) * invstd.reshape(shape)
    scale = np.ones_like(mean) if weight is None else wide(weight)
    shift = np.zeros_like(mean) if bias is None else wide(bias)
    sums, dots = dy.sum(axes), (dy * xhat).sum(axes)
    dx = dy
    if training or buffers is None:
        dx = dy - (sums / n).reshape(shape) - xhat * (dots / n).reshape(shape)
    results = {
        "output": xhat * scale.reshape(shape) + shift.reshape(shape),
        "grad_input": dx * (scale * invstd).reshape(shape),
        "grad_weight": dots,
        "grad_bias": sums,
    }
    if buffers is not None:
        old_mean, old_var = map(wide, buffers)
        f = np.longdouble(momentum) if training else 0
        results["running_mean"] = (1 - f) * old_mean + f * mean
        results["running_var"] = (1 - f) * old_var + f * var * n / (n - 1)
    return results


def assert_same_state(ours, theirs):
    mine, own = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(own)
    for name, value in own.items():
        torch.testing.assert_close(mine[name], value, msg=lambda m, name=name: f"{name}: {m}")

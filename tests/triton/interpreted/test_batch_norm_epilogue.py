"""BatchNorm's epilogues on Triton in the interpreter, against the plain torch operators in float64."""

import pytest
import torch

pytest.importorskip("triton")

from modeprobe.triton_kernels import batch_norm

from modeprobe import mask, reference

pytestmark = [pytest.mark.rung("triton"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

KEY = mask.key(1234, 5)
EPS = 1e-5


def assert_near(ours, truth, what):
    ours, truth = ours.double(), truth.double()
    torch.testing.assert_close(ours, truth, rtol=5e-6, atol=5e-6, msg=lambda m: f"{what}: {m}")


@pytest.fixture(params=["one launch", "several launches"], autouse=True)
def launches(request, monkeypatch):
    if request.param != "one launch":
        monkeypatch.setattr(batch_norm, "on_chip_tile", lambda x, layout: None)


def double(*tensors):
    return [None if one is None else one.double() for one in tensors]


# (activation, residual, dropout, sign bits)
CASES = [
    (1, True, True, True),
    (2, True, False, True),
    (1, False, False, False),
    (3, True, False, False),
    (4, False, True, False),
    (5, True, False, False),
    (0, True, True, False),
]


@pytest.mark.parametrize(
    ("shape", "channels_last"), [((2, 2, 3, 3), False), ((3, 2, 2, 4), False), ((2, 8, 2, 2), True)]
)
@pytest.mark.parametrize(("activation", "with_residual", "drop", "bits"), CASES)
def test_forward_and_backward(shape, channels_last, activation, with_residual, drop, bits):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, grad, residual = (torch.randn(shape).to(memory_format=memory_format) for _ in range(3))
    residual = residual if with_residual else None
    weight, bias = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    key, p = (KEY, 0.4) if drop else (None, 0.0)
    epilogue = (activation, 0.1, key, p)

    buffers = [None] * 4
    ours = batch_norm.launch_batch_norm_train(x, weight, bias, *buffers, 0.1, EPS, residual, *epilogue, bits)
    x64, weight64, bias64, residual64 = double(x, weight, bias, residual)
    truth = reference.batch_norm_train(x64, weight64, bias64, *buffers, 0.1, EPS, residual64, *epilogue, bits)
    assert_near(ours[0], truth[0], "output")
    assert torch.equal(ours[2], truth[2]), "sign bits"
    signs = ours[2] if bits else None
    found = batch_norm.launch_batch_norm_backward(
        grad, x, ours[1], weight, bias, True, True, True, with_residual, residual, *epilogue, signs
    )
    expected = reference.batch_norm_backward(
        grad.double(), x64, truth[1], weight64, bias64, True, True, True, with_residual, residual64,
        *epilogue, signs,
    )  # fmt: skip
    for a, b, what in zip(found, expected, ("x", "weight", "bias", "residual"), strict=True):
        assert_near(a, b, f"gradient of {what}")


def test_evaluation():
    x, residual = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    mean, variance = torch.randn(3), torch.rand(3) + 0.1
    arguments = (1, 0.01, KEY, 0.4, True, True)
    ours = batch_norm.launch_batch_norm_eval(x, mean, variance, None, None, EPS, residual, *arguments)
    truth = reference.batch_norm_eval(
        *double(x, mean, variance), None, None, EPS, residual.double(), *arguments
    )
    for a, b, what in zip(ours, truth, ("output", "statistics", "sign bits"), strict=True):
        assert_near(a, b, what)


def test_nan_passes_through_relu():
    x = torch.full((2, 1, 2, 2), float("nan"))
    y, _, _ = batch_norm.launch_batch_norm_eval(x, torch.zeros(1), torch.ones(1), None, None, EPS, None, 1)
    assert y.isnan().all()

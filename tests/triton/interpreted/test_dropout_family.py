"""Structured, alpha and fused dropout on Triton in the interpreter, against the plain torch operators."""

import pytest
import torch

pytest.importorskip("triton")

from modeprobe.triton_kernels import softmax_dropout as softmax_kernels

from modeprobe import mask
from modeprobe.ops import dropout_reference as reference
from modeprobe.ops import dropout_triton as triton_ops

pytestmark = [pytest.mark.rung("triton"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

KEY = mask.key(1234, 5)
# One unit in the last place, of the largest value; two for bfloat16, whose stores the interpreter truncates.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-7, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-6}
DTYPES = list(TOLERANCE)


def both(name, *arguments):
    return getattr(triton_ops, name)(*arguments), getattr(reference, name)(*arguments)


def assert_same(ours, theirs, dtype=torch.float32):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert ours.stride() == theirs.stride()
    assert torch.equal(ours == 0, theirs == 0), "another mask"
    scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE[dtype] * scale)


def on_device(p):
    return torch.tensor([p], dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "layout", "shared"),
    [
        ((3, 5, 7, 3), "contiguous", [2, 3]),
        ((3, 8, 4, 4), "contiguous", [2, 3]),
        ((3, 8, 4, 4), "channels_last", [2, 3]),
        ((3, 5, 2, 3), "channels_last", [2, 3]),
        ((6, 5, 3), "contiguous", [1, 2]),
        ((6, 5, 3), "contiguous", [0]),
        ((6, 5, 3), "transposed", [0]),
        ((6, 5, 3), "sliced", [1]),
        ((4, 3, 2, 5), "contiguous", [1, 3]),
        ((4, 3, 2, 5), "contiguous", [0, 2]),
        ((9,), "contiguous", []),
        ((4, 3), "contiguous", [0, 1]),
        ((2, 0, 3), "contiguous", [1]),
    ],
)
def test_structured_masks(shape, layout, shared):
    x = torch.randn(shape)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = torch.randn(shape[::-1]).permute(*range(len(shape) - 1, -1, -1))
    elif layout == "sliced":
        x = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    for arguments in (
        (x, KEY, 0.4, shared),
        (x, KEY, 0.0, shared, 5, False, on_device(0.4)),
        (x, KEY, 0.4, shared, 2**33 + 8, False),
    ):
        assert_same(*both("structured_dropout", *arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_structured_dtypes_and_values_that_are_not_finite(dtype):
    x = torch.randn(4, 3, 9).to(dtype)
    assert_same(*both("structured_dropout", x, KEY, 0.5, [2]), dtype)
    x[mask.keep_mask((4, 3, 1), 0.5, KEY).logical_not().expand_as(x)] = float("nan")
    assert triton_ops.structured_dropout(x, KEY, 0.5, [2]).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [[], [2, 3]])
def test_alpha_dropout(dtype, shared):
    x = torch.randn(3, 4, 2, 5).to(dtype)
    for p in (0.3, 1.0):
        for linear in (False, True):
            for arguments in ((p, shared, linear), (0.0, shared, linear, 0, on_device(p))):
                assert_same(*both("alpha_dropout", x, KEY, *arguments), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 16), (130, 9), (0, 8), (7,)])
def test_bias_dropout_add(shape, dtype):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    bias = torch.randn(shape[-1]).to(dtype)
    for arguments in ((0.4,), (0.0, 3, on_device(0.4))):
        for given in (bias, None):
            ours, theirs = both("bias_dropout_add", x, given, residual, KEY, *arguments)
            assert_same(ours, theirs, dtype)
        ours, theirs = both("bias_dropout_add_backward", x, KEY, *arguments)
        assert_same(ours[0], theirs[0], dtype)
        scale = max(1.0, float(theirs[1].abs().max())) if x.numel() else 1.0
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=4 * TOLERANCE[dtype] * scale)


# most: elements of a row handled at once; 16 takes rows in parts.
@pytest.mark.parametrize(("dtype", "most"), [*((dtype, None) for dtype in DTYPES), (torch.float32, 16)])
def test_softmax_dropout(dtype, most, monkeypatch):
    if most:
        monkeypatch.setattr(softmax_kernels, "_block", lambda length: (most, 1))
    for shape, given in (((2, 1, 2, 24), "bool"), ((1, 2, 2, 41), "added"), ((2, 7), None)):
        scores = (torch.randn(shape) * 3).to(dtype)
        given_mask = None
        if given == "bool":
            given_mask = torch.rand(2, 1, 1, 24) > 0.3
            given_mask[1] = False  # rows in which nothing takes part
        elif given == "added":
            given_mask = torch.randn(1, 1, 41, 2).to(dtype).transpose(2, 3)
        for arguments in ((0.3, True), (0.0, True, 1, on_device(0.3))):
            ours, theirs = both("softmax_dropout", scores, given_mask, KEY, *arguments)
            assert_same(ours[0], theirs[0], dtype)
            torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=2 * TOLERANCE[dtype])
        grad = torch.randn(shape).to(dtype)
        ours, theirs = both("softmax_dropout_backward", grad, theirs[1], KEY, 0.3)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=8 * TOLERANCE[dtype])
    assert triton_ops.softmax_dropout(scores, None, KEY, 0.3, False)[1].numel() == 0


def test_opcheck():
    x = torch.randn(3, 4, 8, requires_grad=False)
    samples = [
        (triton_ops.fold_in, (KEY, 3)),
        (triton_ops.structured_dropout, (x, KEY, 0.3, [1])),
        (triton_ops.alpha_dropout, (x, KEY, 0.3, [])),
        (triton_ops.alpha_dropout, (x, KEY, 0.3, [2])),
        (triton_ops.bias_dropout_add, (x, x[0, 0].clone(), x.clone(), KEY, 0.3)),
        (triton_ops.bias_dropout_add_backward, (x, KEY, 0.3)),
        (triton_ops.softmax_dropout, (x, None, KEY, 0.3, True)),
        (triton_ops.softmax_dropout_backward, (x, x.softmax(-1), KEY, 0.3)),
    ]
    for operator, arguments in samples:
        torch.library.opcheck(operator, arguments)

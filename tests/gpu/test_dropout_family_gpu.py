"""Structured, alpha and fused dropout on a GPU, on both backends, against plain torch in float64."""

import pytest
import torch
from support.gpu import close

from modeprobe import mask
from modeprobe.ops.dropout import operators

OPERATORS = {
    "channels": lambda ops, x, other, bias, key: (ops.structured_dropout(x, key, 0.3, [2, 3], 5),),
    "samples": lambda ops, x, other, bias, key: (ops.structured_dropout(x, key, 0.3, [1, 2, 3]),),
    "middle": lambda ops, x, other, bias, key: (ops.structured_dropout(x, key, 0.3, [1, 2]),),
    "alpha": lambda ops, x, other, bias, key: (ops.alpha_dropout(x, key, 0.2, [], False, 3),),
    "feature alpha": lambda ops, x, other, bias, key: (ops.alpha_dropout(x, key, 0.2, [2, 3]),),
    "bias, dropout, add": lambda ops, x, other, bias, key: (
        ops.bias_dropout_add(x, bias, other, key, 0.3),
        *ops.bias_dropout_add_backward(x, key, 0.3),
    ),
    "softmax": lambda ops, x, other, bias, key: (
        *ops.softmax_dropout(x, None, key, 0.1, True),
        *ops.softmax_dropout(x, other[:1, :, :1] > -1, key, 0.1, True),
        ops.softmax_dropout_backward(other, x.softmax(-1), key, 0.1),
    ),
}


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4, 16, 24, 64), (2, 3, 5, 37), (72, 32, 40, 64)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_values(operator, shape, dtype, backend):
    """The last shape is long enough for warps that take several tiles, on any GPU of today."""
    x, other = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    bias = torch.randn(shape[-1], device="cuda").to(dtype)
    key = mask.key(1234, 5, device="cuda")
    run = OPERATORS[operator]
    got = run(operators(backend), x, other, bias, key)
    same = run(operators("reference"), x, other, bias, key)
    truth = run(operators("reference"), x.double(), other.double(), bias.double(), key)
    for number, (mine, theirs, right) in enumerate(zip(got, same, truth, strict=True)):
        assert mine.stride() == theirs.stride()
        close(mine, theirs, right, f"result {number}", backend=backend, exp=operator == "softmax")


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [300, 600, 1500, 2200, 40000])
def test_rows_in_registers_and_longer_ones(length, dtype, backend):
    x, dy = (torch.randn(7, length, device="cuda").to(dtype) for _ in range(2))
    key = mask.key(1, device="cuda")

    def run(name, kind):
        ops = operators(name)
        y, saved = ops.softmax_dropout(x.to(kind), None, key, 0.1, True)
        return y, saved, ops.softmax_dropout_backward(dy.to(kind), x.to(kind).softmax(-1), key, 0.1)

    results = run(backend, dtype), run("reference", dtype), run("reference", torch.float64)
    for number, three in enumerate(zip(*results, strict=True)):
        close(*three, f"result {number}", backend=backend, exp=True)

"""Triton dropout in the interpreter: the contract's masks bit for bit, values, layouts, offsets, p as a
tensor."""

import pytest
import torch

pytest.importorskip("triton")

from modeprobe.triton_kernels import _mask, dropout

from modeprobe import mask

pytestmark = pytest.mark.rung("triton")

SIZES = (0, 1, 7, 8, 9, 111, 1023, 4097)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
KEY = mask.key(1234, 5)


def bits(text):
    return torch.tensor([c == "1" for c in text])


def on_device(p):
    return torch.tensor(p, dtype=torch.float64)


def expected(x, p, key=KEY, offset=0, scaled=True):
    """Of a contiguous x. The interpreter truncates where it stores bfloat16, so there the product is too."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(acc) * (mask.keep_scale(p, x.dtype) if scaled else 1.0)
    if x.dtype == torch.bfloat16:
        y = (y.view(torch.int32) & -65536).view(torch.float32)
    kept = mask.keep_mask(x.shape, p, key, offset)
    return torch.where(kept, y.to(x.dtype), torch.zeros((), dtype=x.dtype))


@pytest.mark.parametrize(
    ("key", "p", "offset", "answer"),
    [
        ((0, 0), 0.1, 0, "0111111111101111111111111011011110111111110111111111111011111111"),
        ((1234, 5), 0.1, 0, "1101111111111111111111101111111111101111111111010110111111111111"),
        ((1234, 5), 0.5, 2**35 + 3, "01101101101100110111000011111101"),
    ],
)
def test_the_contracts_vectors(key, p, offset, answer):
    answer = bits(answer)
    for given in (p, on_device(p)):
        assert torch.equal(dropout.launch_dropout_mask(mask.key(*key), len(answer), given, offset), answer)


@pytest.mark.parametrize(("p", "count"), [(0.1, 3_774_657), (1 / 3, 2_795_527)])
def test_the_contracts_counts_over_four_million_draws(p, count):
    # One large block per program: the interpreter pays for operations, not for elements.
    out = torch.zeros(1 << 22, dtype=torch.uint8)
    values = dropout.parameters(p, out.device, torch.float32)
    dropout._dropout_mask_kernel[(4,)](out, KEY, None, values.hi, values.lo, out.numel(), 0, 1 << 20, 8)
    assert int(out.sum()) == count


def test_a_swapped_lane_is_caught_by_the_vectors(monkeypatch):
    chunk_words = _mask._chunk_words

    def swapped(key, chunk, TIE):
        w0, w1, w2, w3 = chunk_words(key, chunk, TIE)
        return w0, w2, w1, w3

    monkeypatch.setattr(_mask, "_chunk_words", swapped)
    answer = bits("1101111111111111111111101111111111101111111111010110111111111111")
    assert not torch.equal(dropout.launch_dropout_mask(KEY, 64, 0.1), answer)


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0**-33, 1e-7, 0.1, 1 / 3, 0.5, 1 - 1e-7])
def test_every_p_as_a_number_and_on_the_device(p):
    answer = mask.keep_mask((600,), p, KEY)
    assert torch.equal(dropout.launch_dropout_mask(KEY, 600, p), answer)
    assert torch.equal(dropout.launch_dropout_mask(KEY, 600, on_device(p)), answer)


@pytest.mark.parametrize("p", [2.0**-33, 1e-7, 0.1, 1 / 3, 0.37, 1 - 1e-7, 1.0, 0.0])
@pytest.mark.parametrize("acc", [torch.float32, torch.float64])
def test_parameters_computed_on_the_device_are_those_of_the_host(p, acc):
    for options in ({}, {"scaled": False}, {"alpha": True}, {"alpha": True, "linear": True}):
        host = dropout.parameters(p, torch.device("cpu"), acc, **options)
        device = dropout.parameters(on_device(p), torch.device("cpu"), acc, **options)
        assert device.pointer is not None
        hi, lo, *factors = device.pointer.tolist()
        assert (hi, lo) == (host.hi, host.lo)
        for ours, theirs in zip(factors, host[3:], strict=True):
            assert abs(ours - theirs) <= 1, "more than one unit in the last place"


def test_ties_are_broken_where_they_are():
    # A threshold that equals a draw: exactly those elements depend on the second words.
    draw = int(mask.draws(KEY, 40)[17])
    p = 1 - (draw * 65536 + 30000) / 2**32
    answer = mask.keep_mask((40,), p, KEY)
    assert torch.equal(dropout.launch_dropout_mask(KEY, 40, p), answer)
    for low in (1, 65535):  # the tied lane is dropped for one of these and kept for the other
        p = 1 - (draw * 65536 + low) / 2**32
        assert torch.equal(dropout.launch_dropout_mask(KEY, 40, p), mask.keep_mask((40,), p, KEY))
        assert bool(dropout.launch_dropout_mask(KEY, 40, p)[17]) == (low == 65535)


@pytest.mark.parametrize("offset", [0, 1, 4, 2**31 - 5, 2**32 - 3, 2**35 + 3, 2**62, 2**64 - 16])
def test_a_shard_gets_its_slice_of_the_mask(offset):
    x = torch.randn(40)
    assert torch.equal(dropout.launch_dropout_forward(x, KEY, 0.3, offset), expected(x, 0.3, offset=offset))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_values(dtype, size):
    x = torch.randn(size).to(dtype)
    assert torch.equal(dropout.launch_dropout_forward(x, KEY, 0.1), expected(x, 0.1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_options(dtype):
    x = torch.randn(111).to(dtype)
    assert torch.equal(dropout.launch_dropout_forward(x, KEY, on_device(0.1)), expected(x, 0.1))
    assert torch.equal(
        dropout.launch_dropout_forward(x, KEY, 0.1, scaled=False), expected(x, 0.1, scaled=False)
    )
    answer = expected(x, 0.4)
    assert dropout.launch_dropout_forward(x, KEY, 0.4, out=x) is x
    assert torch.equal(x, answer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_misaligned_storage_and_no_write_outside(dtype):
    storage = torch.randn(131).to(dtype)
    before = storage.clone()
    x = storage[3:120]
    answer = expected(x.clone(), 0.25)
    dropout.launch_dropout_forward(x, KEY, 0.25, out=x)
    assert torch.equal(x, answer)
    assert torch.equal(storage[:3], before[:3])
    assert torch.equal(storage[120:], before[120:])


def test_indices_count_in_memory_order_of_a_dense_tensor():
    x = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)
    y = dropout.launch_dropout_forward(x, KEY, 0.4)
    assert y.stride() == x.stride()
    flat = x.permute(0, 2, 3, 1)
    assert torch.equal(y.permute(0, 2, 3, 1), expected(flat, 0.4))


def test_other_tensors_count_as_contiguous_ones():
    x = torch.randn(6, 10)[:, ::2]
    assert torch.equal(dropout.launch_dropout_forward(x, KEY, 0.4), expected(x.contiguous(), 0.4))
    x = torch.randn(7).expand(5, 7)
    assert torch.equal(dropout.launch_dropout_forward(x, KEY, 0.4), expected(x.contiguous(), 0.4))
    x = torch.randn(6, 10)
    answer = expected(x[:, ::2].contiguous(), 0.4)
    dropout.launch_dropout_forward(x[:, ::2], KEY, 0.4, out=x[:, ::2])
    assert torch.equal(x[:, ::2], answer)


def test_dropped_nan_and_inf_are_gone():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0] * 16)
    for y in (dropout.launch_dropout_forward(x, KEY, 0.5), dropout.launch_dropout_forward(x, KEY, 1.0)):
        dropped = y == 0
        assert dropped.any()
        assert not torch.signbit(y[dropped]).any()
    assert not y.any()


@pytest.mark.parametrize("n", [0, 1, 2**32 + 5, 2**62 - 1])
def test_fold_in(n):
    for key in (KEY, mask.key(2**64 - 1, 2**63)):
        answer = mask.fold_in(key, n)
        assert torch.equal(dropout.launch_fold_in(key, n), answer)
        assert torch.equal(dropout.launch_fold_in(key, torch.tensor(n)), answer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_alpha_dropout(dtype, p):
    x = torch.randn(111).to(dtype)
    kept = mask.keep_mask(x.shape, p, KEY)
    prime = -1.7580993408473766
    a = ((1 - p) * (1 + p * prime**2)) ** -0.5 if p < 1 else 0.0
    for linear in (False, True):
        b, fill = (0.0, 0.0) if linear else (-a * prime * p, a * prime * (1 - p))
        answer = torch.where(kept, a * x.double() + b, fill).to(dtype)
        tolerance = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 1e-6}.get(dtype, 1e-14)
        for given in (p, on_device(p)):
            y = dropout.launch_alpha_dropout(x, KEY, given, linear=linear)
            torch.testing.assert_close(y, answer, rtol=tolerance, atol=tolerance)


def test_bad_arguments_are_named():
    x = torch.randn(4)
    with pytest.raises(ValueError, match="p must be in"):
        dropout.launch_dropout_forward(x, KEY, 1.5)
    with pytest.raises(ValueError, match="p must have one element"):
        dropout.launch_dropout_forward(x, KEY, torch.zeros(2))
    with pytest.raises(ValueError, match="key must be"):
        dropout.launch_dropout_forward(x, KEY.int(), 0.5)

"""CUDA dropout, executed on the CPU, against the mask contract in plain torch."""

import itertools

import pytest
import torch
from support import emulator

from modeprobe import mask

pytestmark = [
    pytest.mark.rung("emulator"),
    pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not())),
]

SIZES = (0, 1, 7, 8, 9, 111, 1023, 4097, 20000)
PROBABILITIES = (0.0, 2**-33, 1e-7, 0.1, 1 / 3, 0.5, 1 - 1e-7, 1.0)


def expected(x, key, p, offset=0):
    keep = mask.keep_mask((x.numel(),), p, key, offset)
    scale = torch.tensor(1 / (1 - p) if p < 1 else 0, dtype=emulator.acc_dtype(x.dtype))
    return torch.where(keep, (x.to(scale.dtype) * scale).to(x.dtype), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", emulator.DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_forward_matches_the_contract(dtype, n):
    key = mask.key(1234, 5)
    x = torch.randn(n, dtype=dtype)
    for seed, (x_shift, y_shift, offset) in enumerate(
        itertools.product((0, 1, 3), (0, 1), (0, 3, 8, 2**35 + 3, -5))
    ):
        emulator.configure(seed=seed, multiprocessors=1)  # so few that warps take several tiles at 20000
        y = emulator.dropout(emulator.placed(x, x_shift), key, 0.1, offset=offset,
                             out=emulator.placed(emulator.poisoned((n,), dtype), y_shift))  # fmt: skip
        assert torch.equal(y, expected(x, key, 0.1, offset)), (x_shift, y_shift, offset)


@pytest.mark.parametrize("dtype", emulator.DTYPES, ids=str)
def test_aligned_offset_uses_the_vector_path_of_shifted_data(dtype):
    # A shard that begins inside a chunk, in memory that begins there too: only the first chunk is ragged.
    key, x = mask.key(3), torch.randn(4097, dtype=dtype)
    for head in range(8):
        room = emulator.placed(torch.randn(4105, dtype=dtype), 0)
        shard = room[head : head + 4097].copy_(x)
        emulator.dropout(shard, key, 0.3, offset=head, out=shard)
        assert torch.equal(shard, expected(x, key, 0.3, head))


@pytest.mark.parametrize("p", PROBABILITIES)
def test_probabilities_from_host_and_from_the_device(p):
    key = mask.key(7, 2**63 + 1)
    for dtype in emulator.DTYPES:
        x = torch.randn(4097, dtype=dtype)
        from_host = emulator.dropout(x, key, p)
        assert torch.equal(from_host, expected(x, key, p))
        p_tensor = torch.tensor(p, dtype=torch.float64)
        assert torch.equal(emulator.dropout(x, key, 0.77, p_tensor=p_tensor), from_host)
    assert torch.equal(emulator.dropout_mask(4097, key, p), mask.keep_mask((4097,), p, key))
    assert torch.equal(
        emulator.dropout_mask(4097, key, 0.2, p_tensor=p_tensor), mask.keep_mask((4097,), p, key)
    )


def test_probabilities_on_the_device_at_random():
    # (1 - p) * 2^32 is rounded twice in float64; the kernel's integers must round the same way.
    key, x = mask.key(1), torch.randn(64)
    for p in (torch.rand(300, dtype=torch.float64) ** torch.randint(1, 12, (300,))).tolist():
        p_tensor = torch.tensor(p, dtype=torch.float64)
        assert torch.equal(emulator.dropout(x, key, 0.5, p_tensor=p_tensor), expected(x, key, p)), p


def test_p_on_the_device_is_clamped():
    key, x = mask.key(1), torch.randn(64)
    for given, p in ((-0.5, 0.0), (1.5, 1.0), (5e-324, 0.0)):
        p_tensor = torch.tensor(given, dtype=torch.float64)
        assert torch.equal(emulator.dropout(x, key, 0.5, p_tensor=p_tensor), expected(x, key, p))


def test_ties_take_the_second_draw():
    # Long enough that hundreds of 16-bit draws equal the threshold's upper half.
    n, key, p = 2**18, mask.key(1234, 5), 1 / 3
    emulator.configure(multiprocessors=1)
    assert torch.equal(emulator.dropout_mask(n, key, p), mask.keep_mask((n,), p, key))
    for dtype in (torch.bfloat16, torch.float32):  # a chunk for each thread, and for each pair of threads
        kept = emulator.dropout(torch.ones(n, dtype=dtype), key, p) != 0
        assert torch.equal(kept, mask.keep_mask((n,), p, key))


@pytest.mark.parametrize("dtype", emulator.DTYPES, ids=str)
def test_in_place_unscaled_and_dropped_infinities(dtype):
    key, x = mask.key(11), torch.full((1000,), float("inf"), dtype=dtype)
    x[::2] = float("nan")
    keep = mask.keep_mask((1000,), 0.5, key)
    y = emulator.dropout(x, key, 0.5)
    assert torch.equal(y[~keep], torch.zeros_like(y[~keep]))
    assert not torch.isfinite(y[keep]).any()
    x = torch.randn(1000, dtype=dtype)
    want = torch.where(keep, x, torch.zeros_like(x))
    assert torch.equal(emulator.dropout(x, key, 0.5, scaled=False, out=x), want)


def test_fold_in():
    key, out = mask.key(5, 6), torch.zeros(2, dtype=torch.int64)
    for n in (0, 1, 2**40 + 3):
        emulator.module().fold_in(out.data_ptr(), key.data_ptr(), n)
        assert torch.equal(out, mask.fold_in(key, n))

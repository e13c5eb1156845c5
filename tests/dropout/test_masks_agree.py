"""Every backend decides the same elements: against the contract in plain torch, bit for bit."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import modeprobe as mp
from modeprobe import _extension, mask
from modeprobe import functional as F

pytestmark = [
    pytest.mark.rung("reference"),
    pytest.mark.skipif(not _extension.loaded(), reason="the compiled library is not built: pip install -e ."),
]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
PROBABILITIES = [0.0, 1.0, 2**-33, 1e-7, 0.1, 1 / 3, 0.5, 1 - 1e-7]

uint64 = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**31, 2**32, 2**35 - 3, 2**63, 2**64 - 5]))
probability = st.one_of(st.floats(0, 1), st.sampled_from(PROBABILITIES))


@settings(max_examples=150, deadline=None)
@given(seed=uint64, stream=uint64, offset=uint64, p=probability, numel=st.integers(0, 700))
def test_any_key_offset_and_probability(seed, stream, offset, p, numel):
    key = mask.key(seed, stream)
    assert torch.equal(F.dropout_mask(numel, p, key, offset), mask.keep_mask((numel,), p, key, offset))


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 63, 64, 65, 4095, 4096, 4097, 2**20 + 3])
def test_sizes(numel, p):
    key = mask.key(2**40, 3)
    assert torch.equal(F.dropout_mask(numel, p, key, 5), mask.keep_mask((numel,), p, key, 5))


@pytest.mark.parametrize(
    "offset", [2**31 - 9, 2**31 + 1, 2**32 - 9, 2**35 - 1001, 2**35 - 9, 2**35 + 3, 2**64 - 1001]
)
def test_offsets_past_32_bits(offset):
    key = mask.key(1, 2)
    assert torch.equal(F.dropout_mask(5000, 0.1, key, offset), mask.keep_mask((5000,), 0.1, key, offset))


def test_keys_of_any_strides():
    key = mask.key(7, 9)
    strided = torch.stack([key, key + 1], 1)[:, 0]
    assert strided.stride() == (2,)
    assert torch.equal(F.dropout_mask(1000, 0.3, strided), mask.keep_mask((1000,), 0.3, key))
    assert torch.equal(mask.fold_in(strided, 5), mask.fold_in(key, 5))


def test_ties_follow_the_second_draw():
    """With p = 0.1, one element in 65,536 is a tie: some 64 of them here, decided both ways."""
    key = mask.key(9)
    high = mask.threshold(0.1) >> 16
    ties = mask.draws(key, 1 << 22) == high
    kept = F.dropout_mask(1 << 22, 0.1, key)
    assert 20 < ties.sum() < 120
    assert set(kept[ties].tolist()) == {True, False}
    assert torch.equal(kept, mask.keep_mask((1 << 22,), 0.1, key))


def layouts(x):
    """The same numbers in every layout that a caller may bring; the flag says whether it is dense."""
    n, c, h, w = x.shape
    wide = torch.zeros(n, c, h, 2 * w, dtype=x.dtype)
    wide[..., ::2] = x
    yield "contiguous", x, True
    yield "channels_last", x.contiguous(memory_format=torch.channels_last), True
    yield "transposed", x.transpose(1, 3), True
    yield "permuted", x.permute(2, 0, 3, 1), True
    yield "odd strides of one", x[0].transpose(0, 2).as_strided((w, 1, h, c), (1, 1000, w, w * h)), True
    yield "sliced", wide[..., ::2], False
    yield "cut", torch.cat([x, x], 1)[:, :c], False
    yield "expanded", x[:1].expand(3, c, h, w), False
    yield "overlapping", x.as_strided((n, c, h, w), (w, w, w, 1)), False
    yield "scalar", x[0, 0, 0, 0], True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_layouts(dtype, backend):
    key = mask.key(4, 4)
    for name, x, dense in layouts(torch.randn(2, 5, 7, 9).to(dtype)):
        with mp.backend(backend):
            y = F.dropout(x, 0.3, key=key, offset=3)
        kept = mask.keep_mask((x.numel(),), 0.3, key, 3)
        kept = kept.as_strided(x.shape, x.stride()) if dense else kept.view(x.shape)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        expected = torch.where(kept, x.to(acc) * mask.keep_scale(0.3, dtype), 0).to(dtype)
        assert torch.equal(y, expected), name
        assert y.stride() == (x.stride() if dense else x.contiguous().stride()), name
        if name not in ("expanded", "overlapping"):
            clone = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
            with mp.backend(backend):
                assert F.dropout(clone, 0.3, key=key, offset=3, inplace=True) is clone
            assert torch.equal(clone, expected), name
            assert clone.stride() == x.stride()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.data_too_large])
@given(data=st.data())
def test_structured_masks(data):
    """Any shape, order of dimensions and mask shape, against the mask broadcast by torch."""
    shape = data.draw(st.lists(st.integers(1, 6), min_size=0, max_size=5))
    order = data.draw(st.permutations(range(len(shape))))
    mask_shape = [data.draw(st.sampled_from([1, size])) for size in shape]
    offset = data.draw(uint64)
    inverse = [order.index(d) for d in range(len(shape))]
    x = torch.randn(shape).permute(order).contiguous().permute(inverse)
    key = mask.key(7, data.draw(uint64))
    y = F.dropout(x, 0.4, key=key, offset=offset, mask_shape=mask_shape)
    kept = mask.keep_mask(mask_shape, 0.4, key, offset)
    assert torch.equal(y, torch.where(kept, x * mask.keep_scale(0.4, x.dtype), 0))
    assert y.stride() == x.stride()


@pytest.mark.parametrize("shape", [(3, 4, 5000), (2, 70, 9, 9), (1, 9000), (4500, 2)])
def test_structured_masks_of_long_rows(shape):
    key = mask.key(8)
    for x in (torch.randn(shape), torch.randn(shape[::-1]).permute(*range(len(shape))[::-1])):
        for shared in range(1 << len(shape)):
            mask_shape = [1 if shared >> d & 1 else size for d, size in enumerate(shape)]
            y = F.dropout(x, 0.4, key=key, offset=5, mask_shape=mask_shape)
            kept = mask.keep_mask(mask_shape, 0.4, key, 5)
            assert torch.equal(y, torch.where(kept, x * mask.keep_scale(0.4, x.dtype), 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_structured_masks_of_tensors_larger_than_caches(dtype):
    """From 16 MB on, rows are written past the caches: rows that begin and end anywhere in a line."""
    rows, length = 129, (1 << 24) // torch.finfo(dtype).bits * 8 // 128 + 3
    x, key = torch.ones(rows, length, dtype=dtype), mask.key(6)
    x += torch.arange(length) % 7
    x[:, 5] = torch.nan
    assert x.nbytes >= 1 << 24
    kept = mask.keep_mask((rows, 1), 0.4, key, 5)
    y = F.dropout(x, 0.4, key=key, offset=5, mask_shape=(rows, 1))
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.where(kept, (x.to(acc) * mask.keep_scale(0.4, dtype)).to(dtype), 0)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


UNREADABLE = """
import ctypes, mmap
import torch
import modeprobe as mp
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
for length in (page, 64 * page):  # of float32; the second tensor is larger than caches
    memory = mmap.mmap(-1, 64 * length * 4)
    x, key = torch.frombuffer(memory, dtype=torch.float32).view(1, 64, length).fill_(1), mp.mask.key(1)
    kept = mp.functional.dropout_mask((64,), 0.5, key)
    assert 0 < kept.sum() < 64
    for channel in (~kept).nonzero().flatten().tolist():
        begin = ctypes.c_void_p(x[0, channel].data_ptr())
        assert libc.mprotect(begin, ctypes.c_size_t(length * 4), 0) == 0  # PROT_NONE
    y = mp.functional.dropout1d(x, 0.5, key=key)
    assert torch.equal(y, (2.0 * kept)[None, :, None].expand_as(y))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="takes Linux's mprotect")
def test_a_dropped_channel_is_not_read():
    """Reading one ends the process: its memory is protected."""
    done = subprocess.run([sys.executable, "-c", UNREADABLE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or f"ended by signal {-done.returncode}"


def test_shards_get_their_slice():
    key, whole = mask.key(3, 1), torch.randn(1001)
    y = F.dropout(whole, 0.25, key=key)
    parts = torch.split(whole, [1, 7, 8, 300, 685])
    begins = [0, 1, 8, 16, 316]
    shards = [F.dropout(part, 0.25, key=key, offset=begin) for part, begin in zip(parts, begins, strict=True)]
    assert torch.equal(torch.cat(shards), y)


BATCHES = {  # the function, the shape of an example, how many places of the mask an example takes
    "dropout1d": (F.dropout1d, (4, 5), 4),
    "dropout2d": (F.dropout2d, (4, 3, 5), 4),
    "dropout3d": (F.dropout3d, (4, 3, 2, 2), 4),
    "drop_path": (F.drop_path, (4, 5), 1),
    "alpha_dropout": (lambda x, p, **place: F.alpha_dropout(x, p, True, **place), (4, 5), 20),
    "feature_alpha_dropout": (lambda x, p, **place: F.feature_alpha_dropout(x, p, True, **place), (4, 5), 4),
    "bias_dropout_add": (lambda x, p, **place: F.bias_dropout_add(x, None, x, p, **place), (4, 5), 20),
    "softmax_dropout": (F.softmax_dropout, (4, 5), 20),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_shards_of_a_batch(name, backend):
    function, shape, places = BATCHES[name]
    key, whole = mask.key(3, 1), torch.randn(40, *shape)
    with mp.backend(backend):
        y = function(whole, 0.5, key=key)
        parts = [function(whole[b:e], 0.5, key=key, offset=b * places) for b, e in ((0, 7), (7, 8), (8, 40))]
        assert torch.equal(torch.cat(parts), y)
        assert not torch.equal(function(whole[8:], 0.5, key=key), y[8:])


def test_masks_are_nested():
    key, previous = mask.key(11), torch.ones(1 << 16, dtype=torch.bool)
    for p in (0.0, 1e-3, 0.1, 0.1 + 2**-20, 0.5, 0.9, 1.0):
        kept = F.dropout_mask(1 << 16, p, key)
        assert not (kept & ~previous).any()
        previous = kept


@pytest.mark.parametrize("p", PROBABILITIES)
def test_p_as_a_tensor(p):
    x, key, tensor = torch.randn(4099), mask.key(5), torch.tensor(p, dtype=torch.float64)
    assert torch.equal(F.dropout(x, tensor, key=key), F.dropout(x, p, key=key))
    assert torch.equal(F.dropout_mask(x.shape, tensor, key), F.dropout_mask(x.shape, p, key))
    with mp.backend("reference"):
        assert torch.equal(F.dropout(x, tensor, key=key), F.dropout(x, p, key=key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_p_as_a_tensor_of_any_dtype(dtype):
    """Read in float64, and never differentiated."""
    x, key = torch.randn(4099), mask.key(5)
    p = torch.tensor([0.3]).to(dtype).requires_grad_(dtype.is_floating_point)
    assert torch.equal(F.dropout(x, p, key=key), F.dropout(x, p.item(), key=key))
    assert not F.dropout(x, p, key=key).requires_grad
    assert not F.dropout(x, torch.ones((), dtype=dtype), key=key).any()


DIGESTS = """
import hashlib, json, sys
import torch
torch.set_num_threads(int(sys.argv[1]))
import modeprobe as mp
F, digests = mp.functional, {"capability": torch.ops.modeprobe.cpu_capability()}
if digests["capability"] != sys.argv[2]:
    print(json.dumps(digests))
    sys.exit()
key = mp.mask.key(1234, 5)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    x = (torch.arange(100_003) % 257 + 1).to(dtype)
    for p in (0.1, 0.5):
        for offset in (0, 3, 2**35 - 5):
            y = F.dropout(x, p, key=key, offset=offset)
            assert torch.equal(y != 0, F.dropout_mask(x.shape, p, key, offset))
            digests[f"{dtype} {p} {offset}"] = hashlib.sha256(y.double().numpy().tobytes()).hexdigest()
            digests[f"mask {p} {offset}"] = hashlib.sha256((y != 0).numpy().tobytes()).hexdigest()
print(json.dumps(digests))
"""


def digests(capability, threads):
    environment = {**os.environ, "MODEPROBE_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", DIGESTS, str(threads), capability]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def portable():
    return digests("portable", 1)


def test_the_portable_code_is_right(portable):
    kept = mask.keep_mask((100_003,), 0.1, mask.key(1234, 5), 3)
    assert portable["capability"] == "portable"
    assert portable["mask 0.1 3"] == hashlib.sha256(kept.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("capability", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("threads", [1, 2])
def test_instruction_sets_and_threads(portable, capability, threads):
    found = digests(capability, threads)
    if found.pop("capability") != capability:
        pytest.skip(f"this processor has no {capability}")
    assert found == {name: value for name, value in portable.items() if name != "capability"}

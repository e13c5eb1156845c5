"""The mask contract in plain torch, against published answers and independently computed vectors."""

import pytest
import torch

from modeprobe import mask

pytestmark = pytest.mark.rung("reference")

U64 = 1 << 64


def words(*values):
    return tuple(torch.tensor([value]) for value in values)


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        (0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_gives_the_published_answers(fill, expected):
    """Random123's known answers."""
    assert [word.item() for word in mask.philox(words(fill, fill), words(*[fill] * 4))] == expected


def test_philox_of_pi_digits():
    """Random123's third known answer: counter and key from the digits of pi."""
    counter = words(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    result = mask.philox(words(0xA4093822, 0x299F31D0), counter)
    assert [word.item() for word in result] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


VECTORS = [
    (
        (0, 0),
        [59605, 26151, 50573, 57705, 44108, 48215, 56280, 39680],
        "0111111111101111111111111011011110111111110111111111111011111111",
    ),
    (
        (1234, 5),
        [8649, 51753, 63083, 13122, 53158, 45554, 7992, 38405],
        "1101111111111111111111101111111111101111111111010110111111111111",
    ),
]


@pytest.mark.parametrize(("key", "draws", "kept"), VECTORS)
def test_vectors(key, draws, kept):
    key = mask.key(*key)
    assert mask.draws(key, 8).tolist() == draws
    assert "".join(map(str, mask.keep_mask((64,), 0.1, key).int().tolist())) == kept


@pytest.mark.parametrize(("p", "count"), [(0.1, 3_774_657), (1 / 3, 2_795_527)])
def test_counts(p, count):
    assert mask.keep_mask((1 << 22,), p, mask.key(1234, 5)).sum().item() == count


def test_far_offset():
    kept = mask.keep_mask((32,), 0.5, mask.key(1234, 5), offset=2**35 + 3)
    assert "".join(map(str, kept.int().tolist())) == "01101101101100110111000011111101"


def naive_philox(key, counter):
    k0, k1 = key
    c = list(counter)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def naive_keep(seed, stream, i, p):
    """The contract in Python integers, one element at a time."""
    i %= U64
    limit = round((1 - p) * 2**32)
    high, low = limit >> 16, limit & 0xFFFF

    def draw(tie):
        chunk = i >> 3
        counter = (stream & 0xFFFFFFFF, stream >> 32, chunk & 0xFFFFFFFF, chunk >> 32 | tie << 31)
        word = naive_philox((seed & 0xFFFFFFFF, seed >> 32), counter)[(i & 7) >> 1]
        return word >> 16 * (i & 1) & 0xFFFF

    return draw(0) < high or (draw(0) == high and draw(1) < low)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**63, U64 - 1])
@pytest.mark.parametrize("stream", [0, 2**32, U64 - 1])
def test_keys_of_64_bits(seed, stream):
    kept = mask.keep_mask((24,), 0.3, mask.key(seed, stream), offset=5)
    assert kept.tolist() == [naive_keep(seed, stream, 5 + i, 0.3) for i in range(24)]


@pytest.mark.parametrize("offset", [1, 7, 2**31 - 3, 2**32 - 3, 2**35 - 3, 2**63 - 3, 2**64 - 3])
def test_offsets_of_64_bits(offset):
    kept = mask.keep_mask((20,), 0.3, mask.key(7, 8), offset)
    assert kept.tolist() == [naive_keep(7, 8, offset + i, 0.3) for i in range(20)]


def test_ties_are_broken_by_the_second_draw():
    """At p = 1 - 2^-16 - 2^-17 an element is kept if u == 0, or u == 1 and v < 2^15."""
    key, count, p = mask.key(3), 1 << 18, 1 - 1.5 * 2**-16
    u, v = mask.draws(key, count), mask.draws(key, count, tie=True)
    assert (u == 1).any()
    assert torch.equal(mask.keep_mask((count,), p, key), (u == 0) | (u == 1) & (v < 2**15))


@pytest.mark.parametrize("p", [0.0, 1.0, 2**-33, 1e-7, 0.1, 1 / 3, 0.5, 1 - 1e-7])
def test_threshold_of_a_tensor_is_that_of_its_value(p):
    tensor = torch.tensor(p, dtype=torch.float64)
    assert mask.threshold(tensor).item() == mask.threshold(p)
    for dtype in (torch.float32, torch.float64):
        assert mask.keep_scale(tensor, dtype).item() == mask.keep_scale(p, dtype)
        assert torch.tensor(mask.keep_scale(p, dtype), dtype=dtype).item() == mask.keep_scale(p, dtype)
    key = mask.key(5)
    assert torch.equal(mask.keep_mask((4096,), tensor, key), mask.keep_mask((4096,), p, key))


def test_masks_are_nested():
    key, previous = mask.key(11), torch.ones(1 << 16, dtype=torch.bool)
    for p in (0.0, 1e-3, 0.1, 0.1 + 2**-20, 0.5, 0.9, 1.0):
        kept = mask.keep_mask((1 << 16,), p, key)
        assert not (kept & ~previous).any()
        previous = kept


def test_new_keys_follow_torchs_generator():
    torch.manual_seed(3)
    first, second = mask.new_key(), mask.new_key()
    torch.manual_seed(3)
    assert torch.equal(mask.new_key(), first)
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64
    assert first.shape == (2,)


def test_fold_in_is_philox_of_its_own_counters():
    seed, stream, n = 2**40 + 9, 2**33 + 1, 2**34 + 5
    counter = (stream & 0xFFFFFFFF, stream >> 32, n & 0xFFFFFFFF, n >> 32 | 1 << 30)
    w = naive_philox((seed & 0xFFFFFFFF, seed >> 32), counter)
    expected = mask.key(w[0] | w[1] << 32, w[2] | w[3] << 32)
    key = mask.key(seed, stream)
    assert torch.equal(mask.fold_in(key, n), expected)
    assert torch.equal(mask.fold_in(key, torch.tensor([n])), expected)
    assert torch.equal(mask._fold_in(key, torch.tensor(n)), expected)
    assert not torch.equal(mask.fold_in(key, n + 1), expected)
    last, minus_one = mask.fold_in(key, 2**62 - 1), torch.tensor(-1)  # a tensor counts modulo 2^62
    assert torch.equal(mask.fold_in(key, minus_one), last)
    assert torch.equal(mask._fold_in(key, minus_one), last)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: mask.key(-1), ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
        (lambda: mask.key(0, U64), ValueError, "stream must be in"),
        (lambda: mask.key(1.0), TypeError, "seed must be an int, got float"),
        (lambda: mask.fold_in(mask.key(0), -1), ValueError, r"n must be in \[0, 2\*\*62\), got -1"),
        (lambda: mask.fold_in(mask.key(0), 1.5), TypeError, "n must be an int or an int64 tensor"),
        (
            lambda: mask.fold_in(mask.key(0), torch.zeros(2)),
            ValueError,
            "n must be an int or an int64 tensor",
        ),
        (lambda: mask.fold_in(torch.zeros(2), 1), ValueError, r"shape \(2,\), got torch.float32"),
        (
            lambda: mask.fold_in(torch.zeros(3, dtype=torch.int64), 1),
            ValueError,
            r"of shape \(3,",
        ),
        (lambda: mask.fold_in(3, 1), TypeError, "key must be a tensor"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()

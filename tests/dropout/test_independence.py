"""Masks as random numbers: their mean, and that no mask tells anything of another.

Statistics are counts of agreement, five standard deviations wide. The same tests must find the faults that
shipped elsewhere: numbers that a second call uses again, rows that share a mask, lanes that repeat.
"""

import math

import pytest
import torch

from modeprobe import functional as F
from modeprobe import mask

pytestmark = pytest.mark.rung("reference")

COUNT = 1 << 22
SIGMAS = 5.0


def deviation(agreeing, trials, probability):
    """How many standard deviations a binomial count is from its mean."""
    return abs(agreeing - trials * probability) / math.sqrt(trials * probability * (1 - probability))


def agreement(a, b, p):
    """Deviation of the number of equal decisions from that of independent masks."""
    chance = p * p + (1 - p) * (1 - p)
    return deviation((a == b).sum().item(), a.numel(), chance) if a.numel() else 0.0


def between_calls(first, second, p):
    """Worst over lags of 0 to 8 lanes both ways, and half a vector of four or eight moved by half."""
    worst = 0.0
    for lag in range(9):
        n = first.numel() - lag
        worst = max(worst, agreement(first[lag:], second[:n], p), agreement(second[lag:], first[:n], p))
    for width in (4, 8):
        a, b = first.view(-1, width), second.view(-1, width)
        half = width // 2
        worst = max(worst, agreement(a[:, half:], b[:, :half], p), agreement(a[:, :half], b[:, half:], p))
    return worst


def between_rows(kept, columns, p):
    rows = kept[: kept.numel() // columns * columns].view(-1, columns)
    return max(agreement(rows[lag:], rows[:-lag], p) for lag in range(1, 129))


def between_neighbours(kept, p):
    worst = max(agreement(kept[lag:], kept[:-lag], p) for lag in range(1, 17))
    for width in (2, 4, 8):
        groups = kept.view(-1, width)
        worst = max(worst, *(agreement(groups[:, :1], groups[:, k : k + 1], p) for k in range(1, width)))
    return worst


def chi_square(kept):
    """Of the 65,536 patterns of 16 decisions at p = 0.5, as a deviation from a normal distribution."""
    weights = 2 ** torch.arange(16)
    counts = torch.bincount((kept.view(-1, 16) * weights).sum(1), minlength=1 << 16).double()
    expected = counts.sum() / (1 << 16)
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return abs(statistic - 65535) / math.sqrt(2 * 65535)


def call(p=0.5, count=COUNT):
    return F.dropout(torch.ones(count), p) != 0


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_consecutive_calls(p):
    masks = [call(p) for _ in range(3)]
    assert between_calls(masks[0], masks[1], p) < SIGMAS
    assert between_calls(masks[1], masks[2], p) < SIGMAS


@pytest.mark.parametrize("columns", [64, 768, 1000])
def test_rows(columns):
    assert between_rows(call(), columns, 0.5) < SIGMAS


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_neighbours(p):
    assert between_neighbours(call(p), p) < SIGMAS


def test_patterns():
    assert chi_square(call(count=1 << 24)) < SIGMAS


def related_keys():
    base = mask.key(7, 0)
    yield "streams", [mask.key(7, n) for n in range(4)]
    yield "seeds", [mask.key(n, 0) for n in range(4)]
    yield "children", [base, *(mask.fold_in(base, n) for n in range(4))]
    yield "high bits", [mask.key(7, 1 << n) for n in (0, 31, 32, 63)]
    yield "descendants", [mask.fold_in(mask.fold_in(base, 1), 2), mask.fold_in(mask.fold_in(base, 2), 1)]
    yield "far", [mask.fold_in(base, n) for n in (0, 2**32, 2**61)]


@pytest.mark.parametrize(("kind", "keys"), list(related_keys()))
def test_related_keys(kind, keys):
    masks = [F.dropout_mask(COUNT, 0.5, key) for key in keys]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert between_calls(first, second, 0.5) < SIGMAS


def test_children_are_all_different():
    base = mask.key(3)
    children = {tuple(mask.fold_in(base, n).tolist()) for n in range(2000)}
    assert len(children) == 2000


def test_layers_called_in_sequence():
    x = torch.ones(1 << 20)
    for _ in range(2):
        masks = [F.dropout(x, 0.5) != 0 for _ in range(3)]
        assert between_calls(masks[0], masks[2], 0.5) < SIGMAS
        assert between_calls(masks[0], masks[1], 0.5) < SIGMAS


def test_the_tie_break_is_independent_of_the_draw():
    key = mask.key(13)
    u, v = mask.draws(key, 1 << 20), mask.draws(key, 1 << 20, tie=True)
    for bit in (1 << 15, 1 << 14, 1):
        assert agreement(u & bit != 0, v & bit != 0, 0.5) < SIGMAS


def test_planted_reuse_of_numbers_between_calls_is_found():
    """A generator advanced by half of what vectors of eight consume: calls start as the last ended."""
    first, second = call().view(-1, 8), call().view(-1, 8).clone()
    second[:, :4] = first[:, 4:]
    assert between_calls(first.flatten(), second.flatten(), 0.5) > 100
    one_block = call().view(-1, 8).clone()
    one_block[: 1 << 14, :4] = first[: 1 << 14, 4:]
    assert between_calls(first.flatten(), one_block.flatten(), 0.5) > SIGMAS


def test_planted_repetition_of_rows_is_found():
    """A counter without the row: every 32 rows share a mask, neighbouring rows do not."""
    rows = call().view(-1, 1024)
    repeated = rows[:32].repeat(rows.shape[0] // 32, 1).flatten()
    assert between_rows(repeated, 1024, 0.5) > 100
    assert between_neighbours(call(), 0.5) < SIGMAS


def test_planted_copies_of_lanes_are_found():
    """Four lanes that all take one word."""
    words = call().view(-1, 4)[:, :1].expand(-1, 4).flatten()
    assert between_neighbours(words, 0.5) > 100
    assert chi_square(words) > 100


def test_planted_bias_is_found():
    """Eight bits per decision: at p = 0.1 the keep probability is 230 / 256."""
    biased = torch.randint(256, (COUNT,)) < 230
    assert deviation(biased.sum().item(), COUNT, 0.9) > SIGMAS


@pytest.mark.parametrize("p", [2**-33, 1e-7, 0.1, 1 / 3, 0.5, 1 - 1e-7])
def test_keep_counts_of_2_to_the_28_draws(p):
    key, chunk = mask.key(99, 7), 1 << 24
    kept = sum(F.dropout_mask(chunk, p, key, n * chunk).count_nonzero().item() for n in range(16))
    keep = mask.threshold(p) / 2**32
    assert abs(keep - (1 - p)) <= 2**-33
    if keep == 1:
        assert kept == 1 << 28
    else:
        assert deviation(kept, 1 << 28, keep) < SIGMAS


@pytest.mark.parametrize("p", [0.05, 0.1, 1 / 3, 0.9])
def test_no_bias(p):
    """The mean of y is that of x, within five of its standard errors."""
    x = torch.rand(COUNT, dtype=torch.float64) + 0.5
    y = F.dropout(x, p, key=mask.key(2, 4))
    error = math.sqrt(x.square().mean().item() * p / (1 - p) / COUNT)
    assert abs((y.mean() - x.mean()).item()) < SIGMAS * error

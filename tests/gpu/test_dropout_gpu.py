"""Dropout on a GPU: the contract's masks, CUDA graphs, streams, and both backends."""

import functools

import pytest
import torch

import modeprobe as mp
from modeprobe import mask
from modeprobe.ops.dropout import operators

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("native", "triton")
SMALL = 4097
SIZES = (0, 1, 7, 8, 9, 111, 1023, SMALL, (1 << 20) + 3, (1 << 22) + 3)  # the last: several tiles per warp
KEY = (1234, 5)


@functools.cache
def kept(n, p, offset):
    """The mask in plain torch: on the CPU, which takes seconds for the largest, there only its end."""
    small = min(n, SMALL)
    end = mask.keep_mask((small,), p, mask.key(*KEY), offset + n - small).cuda()
    if n <= SMALL:
        return end
    whole = mask.keep_mask((n,), p, mask.key(*KEY, device="cuda"), offset)
    assert torch.equal(whole[-small:], end)
    return whole


def expected(x, p, offset):
    """Kept elements times a float32 factor, rounded once; dropped ones selected away."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scaled = (x.to(wide) * mask.keep_scale(p, x.dtype)).to(x.dtype)
    return torch.where(kept(x.numel(), p, offset), scaled, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_forward_and_backward_are_the_contract(backend, dtype, n):
    key = mask.key(*KEY, device="cuda")
    for shift in (0, 1):
        x = torch.randn(n + shift, device="cuda").to(dtype)[shift:].requires_grad_()
        for p, offset in ((0.1, 0), (1 / 3, 3), (0.5, 2**35 + 3)):
            with mp.backend(backend):
                y = mp.functional.dropout(x, p, key=key, offset=offset)
                (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert torch.equal(y, expected(x.detach(), p, offset))
            assert torch.equal(gradient, expected(torch.ones_like(x), p, offset))


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_keep_count(backend):
    key = mask.key(1234, 5, device="cuda")
    with mp.backend(backend):
        assert mp.functional.dropout_mask((1 << 22,), 0.1, key).sum().item() == 3_774_657
        assert mp.functional.dropout_mask((1 << 22,), 1 / 3, key).sum().item() == 2_795_527


@pytest.mark.parametrize("backend", BACKENDS)
def test_p_on_the_device(backend):
    key, x = mask.key(3, device="cuda"), torch.randn(10007, device="cuda")
    dropout = operators(backend).dropout
    for p in (0.0, 0.1, 1 / 3, 1 - 1e-7, 1.0):
        p_tensor = torch.tensor(p, dtype=torch.float64, device="cuda")
        assert torch.equal(dropout(x, key, 0.7, 0, True, p_tensor), dropout(x, key, p))


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_from_keys(backend):
    key, n = mask.key(1234, 5), 2**40 + 7
    expected = mask.fold_in(key, n)
    number = torch.tensor(n, device="cuda")
    for got in (
        operators(backend).fold_in(key.cuda(), n),
        operators(backend).fold_in(key.cuda(), 0, number),
    ):
        assert torch.equal(got.cpu(), expected)


def test_graph_replay_draws_fresh_masks():
    x = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        mp.functional.dropout(x, 0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mp.functional.dropout(x, 0.5)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(y.clone())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert all(0.4 < (one != 0).float().mean().item() < 0.6 for one in seen)


def test_runs_on_the_current_stream():
    key, x = mask.key(1, device="cuda"), torch.zeros(1 << 24, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1.0)
        y = torch.ops.modeprobe.dropout(x, key, 0.5)
    torch.cuda.current_stream().wait_stream(stream)
    assert 0.49 < (y != 0).float().mean().item() < 0.51


def test_more_than_two_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    n = 2**31 + 4099
    if free < 3 * n:
        pytest.skip("not enough GPU memory")
    key = mask.key(1234, 5, device="cuda")
    x = torch.ones(n, dtype=torch.float16, device="cuda")
    torch.ops.modeprobe.dropout_(x, key, 0.5)
    tail = mask.keep_mask((4099,), 0.5, key.cpu(), 2**31)
    assert torch.equal((x[2**31 :] != 0).cpu(), tail)


def test_wrong_device_is_refused():
    with pytest.raises(RuntimeError, match="key must be on the device of the data"):
        torch.ops.modeprobe.dropout(torch.ones(3, device="cuda"), mask.key(1), 0.5)

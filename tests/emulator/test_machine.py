"""The emulator itself: what it computes, and every misuse that it must report."""

import pytest
import torch
from support import emulator

pytestmark = [
    pytest.mark.rung("emulator"),
    pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not())),
]


def run(name, *, seed=0, blocks=3, threads=64, cooperative=False):
    m = emulator.configure(seed=seed)
    x = torch.arange(blocks * threads, dtype=torch.float32)
    out = emulator.poisoned((max(blocks * 2, threads),), torch.float32)
    m.run_machine_kernel(name, x.data_ptr(), out.data_ptr(), blocks, threads, cooperative)
    return x, out


@pytest.mark.parametrize("seed", range(5))
def test_shuffles_and_shared_memory(seed):
    x, out = run("block_sum", seed=seed)
    assert torch.equal(out[:3], x.view(3, 64).sum(1))


def test_a_removed_barrier_shows_under_some_schedule():
    wrong = [not torch.equal(out[:3], x.view(3, 64).sum(1)) for x, out in
             (run("block_sum_without_barrier", seed=seed) for seed in range(8))]  # fmt: skip
    assert any(wrong)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "divergent_barrier",
            r"divergent barrier: thread .* waits at .*, thread \(7, 0, 0\) .*left the kernel",
        ),
        ("two_barriers", "divergent barrier"),
        ("inactive_lane", r"inactive lane: thread \((3|35), 0, 0\) of block .* has left the kernel"),
        ("outside_mask", "reads an inactive lane, 20"),
        ("not_in_mask", "mask leaves out the caller"),
        ("never_completes", "grid barrier in a launch that is not cooperative"),
        ("misaligned", "misaligned access of 16 bytes"),
        ("misaligned_shared", "misaligned access of 16 bytes"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_misuse_is_reported_with_kernel_block_and_thread(kernel, message, seed):
    with pytest.raises(emulator.module().Fault, match=message) as caught:
        run(kernel, seed=seed)
    assert f"{kernel}_kernel" in str(caught.value)
    assert "thread (" in str(caught.value)
    assert "block (" in str(caught.value)


def test_a_barrier_that_never_completes():
    with pytest.raises(emulator.module().Fault, match="a barrier that never completes"):
        run("never_completes", cooperative=True)


def test_after_a_fault_the_machine_works():
    with pytest.raises(emulator.module().Fault):
        run("inactive_lane")
    x, out = run("block_sum")
    assert torch.equal(out[:3], x.view(3, 64).sum(1))


@pytest.mark.parametrize("seed", [0, 3])
def test_cooperative_grid_barrier_and_dynamic_shared_memory(seed):
    x, out = run("grid_barrier", seed=seed, blocks=5, cooperative=True)
    assert torch.equal(out[5:10], x[:5].sum().expand(5))


@pytest.mark.parametrize("seed", [0, 2])
def test_votes_reductions_and_atomics(seed):
    _, out = run("votes", seed=seed, threads=96)
    assert out[:3].tolist() == [3.0] * 3

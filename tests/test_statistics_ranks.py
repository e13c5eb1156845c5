"""Recalibration and drift over gloo ranks with uneven data."""

import subprocess
import sys
import textwrap

import pytest
import torch

pytestmark = [
    pytest.mark.rung("reference"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

PROGRAM = textwrap.dedent("""
    import sys, tempfile, torch
    import torch.distributed as dist
    import torch.multiprocessing as mp
    from torch import nn
    from modeprobe.statistics import drift, recalibrate

    NAMES = "shift", "ratio", "divergence", "size", "values", "calls", "noise", "between_ratio"

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2), nn.BatchNorm1d(2))

    def shard(rank):
        generator = torch.Generator().manual_seed(rank)
        sizes = [(7, 1, 40), (3,), ()][rank]
        return [torch.randn(n, 5, generator=generator) + 3 * rank + 1e3 for n in sizes]

    def fails():
        yield torch.randn(4, 5)
        raise OSError("disk")

    def work(rank, store, world):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        everything = [batch for r in range(world) for batch in shard(r)]
        for layerwise in (False, True):
            model, alone = build(), build()
            report = recalibrate(nn.parallel.DistributedDataParallel(model), shard(rank), layerwise=layerwise)
            recalibrate(alone, everything, layerwise=layerwise, process_group=None)
            hidden = torch.cat([model[0](batch) for batch in everything]).detach().double()
            torch.testing.assert_close(model[1].running_var.double(), hidden.var(0), rtol=1e-5, atol=0)
            torch.testing.assert_close(model[1].running_mean.double(), hidden.mean(0), rtol=1e-5, atol=0)
            for a, b in zip(model.buffers(), alone.buffers(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            assert report.layers[0].values == len(hidden) and model[1].num_batches_tracked == len(everything)
            copies = [torch.empty_like(model[3].running_var) for _ in range(world)]
            dist.all_gather(copies, model[3].running_var)
            assert all(torch.equal(copy, copies[0]) for copy in copies)
        model = build()
        model[1].running_mean += rank  # each rank reports on its own buffers
        size = lambda output, batch: float(len(batch))
        for once in (False, True):
            wrap = iter if once else list
            report = drift(model, wrap(shard(rank)), metric=size)
            alone = drift(model, wrap(everything), metric=size, process_group=None)
            assert (report.batches, report.samples) == (alone.batches, alone.samples)
            for a, b in zip(report.layers, alone.layers, strict=True):
                for name in NAMES:
                    torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-5)
                assert (a.dead, a.nonfinite_batches, a.cause) == (b.dead, b.nonfinite_batches, b.cause)
            for name in ("running_vs_full", "running_vs_batch", "batch_vs_full"):
                a, b = vars(getattr(report.effect, name)), vars(getattr(alone.effect, name))
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # 1000 std from zero
            assert report.effect.metric == alone.effect.metric
            assert report.effect.batches == len(everything)
        try:
            drift(model, fails() if rank else shard(0))
        except (OSError, RuntimeError) as error:
            assert isinstance(error, OSError) if rank else "rank 1, 2 failed" in str(error)
        else:
            raise AssertionError("went on")
        for layerwise in (False, True):
            model = build()
            before = [buffer.clone() for buffer in model.buffers()]
            loader = type("Loader", (), {"__iter__": lambda self: fails() if rank else iter(shard(0))})()
            try:
                recalibrate(model, loader, layerwise=layerwise)
            except OSError as error:
                assert rank
            except RuntimeError as error:
                assert not rank and "rank 1, 2 failed" in str(error), error
            else:
                raise AssertionError("went on")
            assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
        dist.destroy_process_group()

    if __name__ == "__main__":
        world = int(sys.argv[1])
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (folder + "/store", world), nprocs=world)
""")


def test_uneven_ranks(tmp_path):
    """Three, one and no batch; one pass, layer by layer and drift; failing ranks."""
    program = tmp_path / "ranks.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, program, "3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

"""Judged before timed: wrong, slow, broken and absent providers each show as what they are."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from modeprobe.benchmarks import measure, memory, runner, tables
from modeprobe.benchmarks.registry import Candidate, Problem, Unavailable, Work, all_works, select
from modeprobe.benchmarks.timing import Limits
from torch.nn import functional as F

pytestmark = pytest.mark.rung("reference")

X = torch.arange(1.0, 9.0)


class CostClock:
    """Runs a callable and reports the cost of the provider whose name comes back with the result."""

    def __init__(self, costs):
        self.costs, self.time = costs, 0.0

    def now(self):
        self.time += 0.1
        return self.time

    def sample(self, run, calls):
        _, name = run()
        return self.costs[name]


def setup(work, device):
    def provider(name, function):
        return {name: lambda: Candidate(lambda: (function(), name))}

    def absent():
        raise Unavailable("this package has no such layer")

    def broken():
        raise RuntimeError("no kernel image\nsecond line")

    def verify(result):
        y, _ = result
        return None if torch.equal(y, X * 2) else f"worst error {(y - X * 2).abs().max():.1f}"

    return Problem(
        {
            **provider("modeprobe", lambda: X + X),
            **provider("torch", lambda: X * 2),
            **provider("slow rival", lambda: 2 * X),
            **provider("wrong rival", lambda: X * 2 + 3),
            "absent rival": absent,
            "broken rival": broken,
        },
        verify,
        provider("x.clone()", X.clone),
    )


WORK = Work("double", "forward", (8,), "float32", 2, setup)
COSTS = {"modeprobe": 1e-3, "torch": 4e-3, "slow rival": 10e-3, "x.clone()": 0.5e-3}


@pytest.fixture
def rows():
    found = measure.measure(WORK, "cpu", Limits(seconds=0.0), clock=CostClock(COSTS))
    return {row.provider: row for row in found}


def test_a_wrong_provider_is_shown_as_wrong_and_not_timed(rows):
    wrong = rows["wrong rival"]
    assert (wrong.status, wrong.reason, wrong.seconds) == ("wrong", "worst error 3.0", None)
    assert "wrong rival" not in rows["modeprobe"].ratios


def test_a_slow_provider_is_shown_as_slower(rows):
    assert rows["modeprobe"].ratios["slow rival"] == [10.0, 10.0, 10.0]
    assert rows["modeprobe"].ratios["torch"] == [4.0, 4.0, 4.0]
    assert rows["slow rival"].ratios["torch"] == [0.4, 0.4, 0.4]


def test_absent_and_broken_providers_say_why(rows):
    assert (rows["absent rival"].status, rows["absent rival"].reason) == (
        "unavailable",
        "this package has no such layer",
    )
    assert (rows["broken rival"].status, rows["broken rival"].reason) == (
        "failed",
        "RuntimeError: no kernel image",
    )


def test_a_floor_is_not_judged_and_gives_the_bandwidth(rows):
    assert rows["x.clone()"].floor
    assert rows["x.clone()"].status == "ok"
    assert rows["modeprobe"].of_copy == [0.5, 0.5, 0.5]  # two passes, as the clone, in twice its time


def replay(monkeypatch, capture, costs=COSTS):
    """Rows of a work that is also replayed, as (work, provider) -> row."""
    monkeypatch.setattr(memory, "peak_bytes", lambda run: 0)
    limits = Limits(seconds=0.0, sample_seconds=3e-3)
    work = Work("double", "forward", (8,), "float32", 2, setup, groups=("g, eager calls",), replays=True)
    found = measure.measure(work, "cuda", limits, clock=CostClock(costs), capture=capture)
    return {(row.work, row.provider): row for row in found}


def test_a_replay_has_rows_of_its_own(monkeypatch):
    """A replay of three calls takes what one call takes here: a third each, where a sample has room."""
    rows = replay(monkeypatch, lambda candidate, calls: Candidate(candidate.run, note=f"{calls} calls"))
    eager, again = "double/forward/8/float32", "double/forward/8/float32/graph"
    assert {work for work, _ in rows} == {eager, again}
    ours = rows[again, "modeprobe"]
    assert (ours.note, ours.groups, ours.status) == ("3 calls", ["g, CUDA graph"], "ok")
    assert ours.seconds[1] == pytest.approx(1e-3 / 3, rel=1e-4)
    assert rows[again, "torch"].seconds[1] == 4e-3  # one call fills a sample
    assert ours.ratios["torch"][1] == pytest.approx(12.0)
    assert rows[eager, "modeprobe"].ratios["torch"][1] == 4.0
    assert rows[eager, "modeprobe"].groups == ["g, eager calls"]
    # What the eager calls could not do, replays cannot.
    for provider, status in (("wrong rival", "wrong"), ("absent rival", "unavailable")):
        assert rows[again, provider].status == status
        assert rows[again, provider].seconds is None
        assert rows[again, provider].reason == rows[eager, provider].reason


def test_a_replay_that_fails_or_does_something_else_is_not_timed(monkeypatch):
    def capture(candidate, calls):
        _, name = candidate.run()
        if name == "modeprobe":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        if name == "slow rival":
            return Candidate(lambda: (X, name))
        return Candidate(candidate.run)

    rows = replay(monkeypatch, capture)
    ours, slow = (rows["double/forward/8/float32/graph", name] for name in ("modeprobe", "slow rival"))
    assert (ours.status, ours.seconds) == ("unavailable", None)
    assert ours.reason == "not captured: RuntimeError: operation not permitted when stream is capturing"
    assert (slow.status, slow.reason) == ("wrong", "worst error 8.0")
    assert rows["double/forward/8/float32", "modeprobe"].seconds is not None
    assert set(rows["double/forward/8/float32/graph", "torch"].ratios) == {"x.clone()"}


def test_a_replay_that_breaks_leaves_the_eager_calls_figures(monkeypatch):
    def capture(candidate, calls):
        runs = iter([candidate.run])  # one, which is judged
        return Candidate(lambda: next(runs)())

    rows = replay(monkeypatch, capture)
    assert rows["double/forward/8/float32/graph", "modeprobe"].status == "failed"
    assert rows["double/forward/8/float32", "modeprobe"].seconds is not None


def test_the_tables_show_it(rows, tmp_path):
    from modeprobe.benchmarks import results

    found = results.empty()
    found["runs"]["one"] = {"date": "2026-01-01", "commit": None}
    results.upsert(found, "results", [row.as_dict() for row in rows.values()], "one")
    table = tables.work_table(found, "dropout")
    text = table.markdown()
    assert "| wrong |" in text
    assert "wrong rival: wrong: worst error 3.0" in text
    assert "absent rival, 1 of 1 works: this package has no such layer" in text
    assert "4x" in text


def test_left_out_providers_are_not_set_up():
    rows = measure.measure(WORK, "cpu", Limits(seconds=0.0), clock=CostClock(COSTS), without=["broken rival"])
    row = next(row for row in rows if row.provider == "broken rival")
    assert (row.status, row.reason) == ("unavailable", "left out of this run")


def test_saved_bytes_are_counted_once_per_storage():
    x = torch.randn(1000, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(1000))
    assert memory.saved_bytes(lambda: x.exp()) == 4000  # its result
    assert memory.saved_bytes(lambda: x * x) == 4000  # both operands are one storage
    assert memory.saved_bytes(lambda: x * weight) == 4000  # parameters live anyway
    assert memory.saved_bytes(lambda: F.relu(x[:10])) == 40


def test_a_run_saves_as_it_goes_and_stops_with_its_budget(tmp_path):
    from modeprobe.benchmarks import results

    path = tmp_path / "machine" / "results.json"
    works = [Work("double", "forward", (size,), "float32", 2, setup) for size in (8, 9, 10, 11)]
    seen, ticks = [], iter(range(0, 1000, 10))

    def report(work, rows):
        seen.append(work.name)
        assert {row["work"] for row in results.load(path)["results"]} == set(seen)

    late = runner.run(
        works,
        "cpu",
        results.empty(),
        path,
        budget=25.0,
        report=report,
        clock=CostClock(COSTS),
        now=lambda: float(next(ticks)),
    )
    assert [work.name for work in late] == ["double/forward/10/float32", "double/forward/11/float32"]
    saved = results.load(path)
    (entry,) = saved["runs"].values()
    assert entry["left_out"] == [work.name for work in late]
    assert entry["versions"]["torch"] == torch.__version__


def test_a_work_that_cannot_be_set_up_does_not_stop_the_run(tmp_path):
    from modeprobe.benchmarks import results

    def broken(work, device):
        raise ValueError("no such shape")

    works = [
        Work("broken", "forward", (8,), "float32", 2, broken),
        Work("double", "forward", (8,), "float32", 2, setup),
    ]
    found = results.empty()
    runner.run(works, "cpu", found, tmp_path / "results.json", clock=CostClock(COSTS))
    assert results.find(found, "broken/forward/8/float32", "modeprobe", "cpu")["reason"] == (
        "ValueError: no such shape"
    )
    assert results.find(found, "double/forward/8/float32", "modeprobe", "cpu")["status"] == "ok"


def test_what_was_compiled_ahead_is_not_compiled_again(tmp_path, monkeypatch):
    from modeprobe.benchmarks import warm

    compiled, started = [], []

    def peers(work, device):
        def compiles():
            compiled.append(work.name)
            if work.shape == (9,):
                raise Unavailable("not compiled for this row")

        return Problem({"torch.compile": compiles}, lambda results: None)

    class Process:
        def __init__(self, command, **options):
            started.append(command[command.index("--device") :])
            if len(started) != 2:  # that one had no time
                warm.main(started[-1])

        def wait(self, seconds):
            return 0

    works = [Work("x", "forward", (size,), "float32", 2, peers) for size in (7, 8, 9, 10)]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(warm, "all_works", lambda device: works)
    monkeypatch.setattr(warm.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(warm.subprocess, "Popen", Process)
    assert warm.warm_up(works, "cpu", 60).startswith("3 of 4 works compiled in ")
    assert started[0][2:] == [works[0].name, works[3].name]  # the first ones first
    assert warm.warm_up(works, "cpu", 60).endswith(", 3 before")
    assert compiled == [works[index].name for index in (0, 3, 2, 1)]
    assert warm.warm_up(works, "cpu", 60) == "4 works were compiled before"
    assert len(started) == 4


def test_a_lost_gpu_is_left_to_a_new_process(tmp_path, monkeypatch):
    from modeprobe.benchmarks import plain

    works = [Work("double", "forward", (size,), "float32", 2, setup) for size in (8, 9, 10)]
    ran, started = [], []

    def run(works, device, found, path, **options):
        ran.append([work.shape[0] for work in works])
        found["runs"]["now"] = {"commit": plain.results.commit()}
        row = measure.row(works[0], "modeprobe", device, status="failed")
        found["results"] += [row.as_dict() | {"run": "now"}]
        plain.results.save(found, path)
        return works[1:]

    monkeypatch.setattr(plain, "all_works", lambda device: works)
    monkeypatch.setattr(plain.results, "empty", lambda device: {"schema": 1, "runs": {}, "results": []})
    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner, "lost", lambda: True)
    monkeypatch.setattr(plain.os, "execv", lambda program, arguments: started.append(arguments))
    options = ["--device", "cuda", "--budget", "60", "--output", str(tmp_path), "--machine", "m"]
    plain.main(options)
    *_, budget, rest, _, warm = started[0]
    assert float(budget) <= 60
    assert (rest, warm) == ("--rest", "0")
    plain.main([*options, rest])
    assert ran == [[8, 9, 10], [9, 10]]
    plain.main(options)  # a later run of the same commit goes on where this one ended
    assert ran[2] == [10, 8, 9]


def test_what_a_target_compares_with_is_not_left_out(tmp_path, monkeypatch):
    """On a GPU a share of the budget is less than a compilation, of which targets speak all the same."""
    from modeprobe.benchmarks import results

    seen = {}

    def pretend(work, device, limits, *, clock, without):
        seen[work.name] = "torch.compile" not in without
        return [measure.row(work, "modeprobe", device)]

    monkeypatch.setattr(runner, "measure", pretend)
    monkeypatch.setattr(runner, "lost", lambda: False)
    monkeypatch.setattr(results, "machine", lambda device: {"name": "x", "gpu": None})
    every = {work.name: work for work in select(all_works("cuda"))}
    layer = "batch_norm/forward_backward/256x64x112x112/float32"
    named, other = "dropout/forward/2^26/float32", "dropout/forward_backward/2^26/float32"
    chosen = [every[name] for name in (layer, named, other)]
    runner.run(chosen, "cuda", results.empty(), tmp_path / "results.json", budget=1.0, now=lambda: 0.0)
    assert seen == {layer: True, named: True, other: False}


@pytest.mark.parametrize(("speed", "least"), [(1.0, 6), (0.02, 1)])
def test_a_run_ends_with_its_budget_on_a_machine_of_any_speed(speed, least, tmp_path):
    """No more than the work under way is late, which costs its setup and the fewest rounds."""
    from modeprobe.benchmarks import results, timing

    class Slow(CostClock):
        def now(self):
            return self.time

        def sample(self, run, calls):
            self.time += 0.02 / speed
            return super().sample(run, calls)

    clock = Slow(COSTS)
    works = [Work("double", "forward", (size,), "float32", 2, setup) for size in range(1, 7)]
    budget = 20.0
    found = results.empty()
    late = runner.run(
        works, "cpu", found, tmp_path / "r.json", budget=budget, clock=clock, now=lambda: clock.time
    )
    assert len(works) - len(late) >= least
    one_work = len(COSTS) * (timing.FEWEST + 2) * 0.02 / speed  # two samples of each calibrate
    assert clock.time <= budget + one_work
    assert {row["rounds"] for row in found["results"] if row["seconds"]} != {0}


def test_a_compiler_that_costs_more_than_the_share_is_left_out(tmp_path, monkeypatch):
    from modeprobe.benchmarks import results

    seen = []

    def pretend(work, device, limits, *, clock, without):
        seen.append("torch.compile" not in without)
        own = measure.row(work, "torch.compile", device)
        own.setup_seconds = 40.0
        return [own]

    monkeypatch.setattr(runner, "measure", pretend)
    works = [Work("double", "forward", (size,), "float32", 2, setup) for size in (8, 9, 10)]
    found = results.empty()
    runner.run(works, "cpu", found, tmp_path / "results.json", budget=60.0, now=lambda: 0.0)
    assert seen == [True, False, True]  # shares of 20, 30 and 60 s


FAULTS = """
import resource, torch
from modeprobe.benchmarks import allocator
print(allocator.pin())
def faults(elements):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    first, second = torch.zeros(elements), torch.zeros(elements)
    del first, second
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(50):  # where the heap cannot grow in one piece, its pieces are joined call by call
    found = faults(6 << 20)  # twice 24 MiB, 12,288 pages
    if found < 100:
        break
print(found)
allocator.give_back()
print(faults(8 << 20))  # twice 32 MiB, though 48 MiB had been free
"""


def test_every_provider_gets_the_same_memory():
    """Once warm, outputs below the pinned threshold cost no page faults and larger ones always do.

    In a process of its own: what others have left free would serve, too.
    """
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("thresholds of glibc")
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    how, below, above = done.stdout.splitlines()
    assert how == "used again below 32 MiB, mapped anew above"
    assert int(below) < 100
    assert int(above) >= 16384

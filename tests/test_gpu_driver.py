"""The driver of `make gpu`, without a GPU: limits, failures, results, and a rehearsal on the CPU."""

import json
import re
import sys
import time

import pytest
from modeprobe.benchmarks import gpu

pytestmark = pytest.mark.rung("reference")


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    def run(steps=None, *arguments, gpu_name=None):
        if steps is not None:
            monkeypatch.setattr(gpu, "STEPS", steps)
        monkeypatch.setattr(gpu, "gpu_name", lambda: gpu_name)
        (tmp_path / "site" / "modeprobe").mkdir(parents=True, exist_ok=True)
        status = gpu.main(["--results", str(tmp_path), "--site", str(tmp_path / "site"), *arguments])
        return status, capsys.readouterr().out

    return run


def command(name, code, **changes):
    def step(session, limit):
        return gpu.run(session, name, [sys.executable, "-c", code], limit, **changes)

    return step


def outcomes(tmp_path, machine="rehearsal-without-gpu"):
    return json.loads((tmp_path / machine / "steps.json").read_text())


def test_failures_and_timeouts_never_stop_the_next_step(start, tmp_path):
    def broken(session, limit):
        raise ValueError("no such thing")

    begin = time.monotonic()
    status, out = start(
        {
            "fails": (30, command("fails", "import sys; print('seven'); sys.exit(7)")),
            "hangs": (1, command("hangs", "import time; time.sleep(60)")),
            "raises": (30, broken),
            "absent": (30, lambda session, limit: gpu.Outcome("absent", "absent")),
            "works": (30, command("works", "print('the last line')")),
        }
    )
    assert time.monotonic() - begin < 30
    assert status == 1
    found = {one["step"]: one for one in outcomes(tmp_path)}
    verdicts = [one["verdict"] for one in found.values()]
    assert verdicts == ["failed", "timeout", "failed", "absent", "ok"]
    assert found["fails"]["note"] == "seven"
    assert found["raises"]["note"] == "ValueError: no such thing"
    assert found["works"]["note"] == "the last line"
    assert "hangs      timeout" in out
    assert "| works | ok |" in (tmp_path / "rehearsal-without-gpu" / "summary.md").read_text()


def test_a_timeout_ends_what_the_step_started(start, tmp_path):
    marker = tmp_path / "late"
    child = f"import time; time.sleep(4); open({str(marker)!r}, 'w')"
    code = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    start({"hangs": (1, command("hangs", code))})
    time.sleep(4)
    assert not marker.exists()


def test_the_whole_has_a_limit_and_results_come_as_they_are(start, tmp_path):
    codes = {"one": "pass", "two": "import time; time.sleep(60)", "three": "pass"}
    _, _ = start({name: (30, command(name, code)) for name, code in codes.items()}, "--total", "5")
    assert [one["verdict"] for one in outcomes(tmp_path)] == ["ok", "timeout", "no time"]


def test_steps_are_picked(start, tmp_path):
    steps = {name: (30, command(name, "pass")) for name in ("one", "two", "three")}
    status, _ = start(steps, "--steps", "three,one", gpu_name="NVIDIA H200")
    assert status == 0
    assert [one["step"] for one in outcomes(tmp_path, "nvidia-h200")] == ["build", "three", "one"][1:]
    with pytest.raises(SystemExit, match="unknown step 'four'"):
        start(steps, "--steps", "four")


def test_the_ten_numbers_are_the_targets(tmp_path):
    rows = [
        {
            "device": "cuda",
            "text": f"work {i}",
            "bound": "at least 2x torch",
            "verdict": "met",
            "measured": [1, i, 9],
        }
        for i in range(20)
    ]
    rows[0]["measured"] = None
    (tmp_path / "results.json").write_text(json.dumps({"targets": rows}))
    lines = gpu.numbers(tmp_path, "cuda")
    assert len(lines) == 10
    assert lines[0].split() == ["1.00", "work", "1:", "at", "least", "2x", "torch:", "met"]
    assert gpu.numbers(tmp_path, "cpu") == ["no target was measured"]
    assert gpu.numbers(tmp_path / "nowhere", "cuda") == ["no benchmark results"]


def test_the_layout_imports_like_an_installation(start, tmp_path):
    session = gpu.Session("cpu", "x", tmp_path, tmp_path / "site")
    gpu.lay_out(session)
    # Tests spawn processes, which find a test's module below the root.
    code = "import modeprobe.benchmarks.resources as r, tests, modeprobe; print(modeprobe.__file__)"
    outcome = gpu.run(session, "import", session.python("-c", code), 60, cwd=tmp_path)
    assert outcome.verdict == "ok", (tmp_path / "import.log").read_text()
    assert outcome.note.startswith(str(tmp_path / "site"))


BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "rich typer jinja2 numpy matplotlib sklearn transformers".split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_torch_and_pytest_are_all_it_needs(start, tmp_path, monkeypatch):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BARE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "bare"))
    session = gpu.Session("cpu", "x", tmp_path, tmp_path / "site")
    gpu.lay_out(session)
    plain = session.python("-m", "modeprobe.benchmarks.plain", "--device", "cpu", "--output", str(tmp_path))
    gpu.run(session, "bench", [*plain, "--budget", "0", "--works", "batch_norm"], 60)
    assert "No time was left" in (tmp_path / "bench.log").read_text()
    outcome = gpu.pytest(session, "tests", 60, "tests/gpu", "tests/batch_norm/test_values.py")
    assert outcome.verdict == "ok", (tmp_path / "tests.log").read_text()
    assert re.fullmatch(r"\d+ skipped.*", outcome.note)


def test_every_file_of_gpu_tests_is_judged(start, tmp_path, monkeypatch):
    def one(session, name, limit, file, option, which):
        assert re.fullmatch(r"tests/gpu/test_\w+\.py", file)
        assert (option, which) == ("-k", "triton" if name.endswith("-triton") else "not triton")
        return gpu.Outcome(name, "failed" if name == "tests-dropout-triton" else "ok", 1.0, "3 passed")

    monkeypatch.setattr(gpu, "pytest", one)
    outcome = gpu.tests(gpu.Session("cpu", "x", tmp_path, tmp_path), 60)
    assert outcome.verdict == "failed"
    assert "batch_norm: 3 passed; " in outcome.note
    assert "dropout: 3 passed; dropout-triton: 3 passed" in outcome.note


@pytest.mark.parametrize(("signs", "verdict"), [("..s.", "ok"), ("..F.", "failed")])
def test_a_suite_without_time_is_judged_by_what_it_did(start, tmp_path, monkeypatch, signs, verdict):
    def until_the_limit(session, name, command, limit):
        (tmp_path / "suite.log").write_text(f"$ python -m pytest\n{signs} [  1%]\n..")
        return gpu.Outcome(name, "timeout", limit, "stopped after 60 s")

    monkeypatch.setattr(gpu, "run", until_the_limit)
    outcome = gpu.suite(gpu.Session("cpu", "x", tmp_path, tmp_path), 60)
    assert (outcome.verdict, outcome.note[-8:]) == (verdict, "5 passed")


def test_a_rehearsal_on_the_cpu(start, tmp_path):
    _, out = start(None, "--steps", "facts,sanitizer")
    found = {one["step"]: one["verdict"] for one in outcomes(tmp_path)}
    assert found["facts"] == "ok"
    assert "torch" in json.loads((tmp_path / "rehearsal-without-gpu" / "facts.json").read_text())
    assert "rehearsal" in out

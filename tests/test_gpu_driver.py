"""The driver of `make gpu`, without a GPU: limits, failures, results, and a rehearsal on the CPU."""

import json
import re
import sys
import tarfile
import time

import pytest
from modeprobe.benchmarks import gpu, ncu

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
            "fails": gpu.Step(command("fails", "import sys; print('seven'); sys.exit(7)"), 30),
            "hangs": gpu.Step(command("hangs", "import time; time.sleep(60)"), 1),
            "raises": gpu.Step(broken, 30),
            "absent": gpu.Step(lambda session, limit: gpu.Outcome("absent", "absent"), 30),
            "works": gpu.Step(command("works", "print('the last line')"), 30),
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
    start({"hangs": gpu.Step(command("hangs", code), 1)})
    time.sleep(4)
    assert not marker.exists()


def test_the_whole_has_a_limit_and_results_come_as_they_are(start, tmp_path):
    codes = {"one": "pass", "two": "import time; time.sleep(60)", "three": "pass"}
    _, _ = start({name: gpu.Step(command(name, code), 30) for name, code in codes.items()}, "--total", "5")
    assert [one["verdict"] for one in outcomes(tmp_path)] == ["ok", "timeout", "no time"]


def test_what_is_kept_for_later_steps(monkeypatch):
    steps = {"a": gpu.Step(None, 200), "b": gpu.Step(None, 400, kept=120), "c": gpu.Step(None, 90, kept=60)}
    monkeypatch.setattr(gpu, "STEPS", steps)
    groups = gpu.side_by_side(list(steps))
    assert gpu.limit_of(groups, 0, 525) == 200
    assert gpu.limit_of(groups, 0, 300) == 120  # b and c keep theirs
    assert gpu.limit_of(groups, 1, 300) == 240
    assert gpu.limit_of(groups, 1, 150) == 120  # its own comes before c's
    assert gpu.limit_of(groups, 2, 30) == 30
    steps["b"] = gpu.Step(None, 250, kept=130, beside=True)
    groups = gpu.side_by_side(list(steps))
    assert groups == [["a", "b"], ["c"]]
    assert gpu.limit_of(groups, 0, 525) == 250
    assert gpu.limit_of(groups, 0, 170) == 130
    assert gpu.side_by_side(["b", "c"]) == [["b"], ["c"]]
    assert gpu.side_by_side(["a", "c", "b"]) == [["a"], ["c"], ["b"]]


def test_steps_beside_each_other_run_at_the_same_time(start, tmp_path):
    wait = "import os, pathlib, sys, time; here = pathlib.Path(os.environ['MODEPROBE_FACTS']).parent; "
    wait += "(here / sys.argv[1]).touch()\nwhile not (here / sys.argv[2]).exists(): time.sleep(0.05)"

    def meet(name, other):
        return lambda session, limit: gpu.run(session, name, [sys.executable, "-c", wait, name, other], limit)

    status, _ = start({"a": gpu.Step(meet("a", "b"), 30), "b": gpu.Step(meet("b", "a"), 30, beside=True)})
    assert status == 0
    assert [(one["step"], one["verdict"]) for one in outcomes(tmp_path)] == [("a", "ok"), ("b", "ok")]


TOOL = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
case $2 in
racecheck) {racecheck} ;;
esac
echo "$@" | grep -q "kernel_run.py{types}$" || test $2 != synccheck || exit 3
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.mark.parametrize(
    ("racecheck", "verdict"),
    [
        ("true", "ok"),
        ("sleep 60", "timeout"),
        ("echo '========= Error: Race reported between'; sleep 60", "failed"),
        ("exit 9", "failed"),
    ],
)
def test_a_sanitizer_without_time_has_not_failed(tmp_path, monkeypatch, racecheck, verdict):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(racecheck=racecheck, types=" float32 bfloat16"))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    outcome = gpu.sanitizer(gpu.Session("cpu", "x", tmp_path, tmp_path), 2)
    assert outcome.verdict == verdict, outcome
    assert re.match(rf"memcheck ok .*, racecheck {verdict} .*, synccheck ok .*, initcheck ok ", outcome.note)


def test_steps_are_picked_and_the_others_outcomes_stay(start, tmp_path):
    steps = {name: gpu.Step(command(name, "pass"), 30) for name in ("one", "two", "three")}
    status, _ = start(steps, "--steps", "three,one", gpu_name="NVIDIA H200")
    assert status == 0
    assert [one["step"] for one in outcomes(tmp_path, "nvidia-h200")] == ["three", "one"]
    start(steps, "--steps", "two,one", gpu_name="NVIDIA H200")
    assert [one["step"] for one in outcomes(tmp_path, "nvidia-h200")] == ["three", "two", "one"]
    with pytest.raises(SystemExit, match="unknown step 'four'"):
        start(steps, "--steps", "four")


def test_results_are_packed_while_a_step_runs(start, tmp_path, monkeypatch):
    """A machine that goes away in the middle of a step leaves what the step had written."""
    monkeypatch.setattr(gpu, "PACKED", 0.2)
    archive = tmp_path / "out" / "results.tar.gz"
    code = f"""
import os, pathlib, tarfile, time
print("so far", flush=True)
for _ in range(200):
    if os.path.exists({str(archive)!r}):
        with tarfile.open({str(archive)!r}) as packed:
            print("packed" if b"so far" in packed.extractfile("gpu/one.log").read() else "empty", flush=True)
        break
    time.sleep(0.1)
"""
    start({"one": gpu.Step(command("one", code), 60)}, "--archive", str(archive), gpu_name="GPU")
    with tarfile.open(archive) as packed:
        assert set(packed.getnames()) == {"gpu/one.log", "gpu/steps.json", "gpu/summary.md"}
        assert packed.extractfile("gpu/one.log").read().split()[-1] == b"packed"


def test_a_library_of_the_same_sources_is_used_again(tmp_path, monkeypatch):
    session = gpu.Session("cpu", "x", tmp_path, tmp_path / "site", arch="9.0")
    done = []

    def run(session, name, command, limit, **changes):
        done.append(name)
        if name == "build":
            assert changes["environment"]["TORCH_CUDA_ARCH_LIST"] == session.arch
            (session.site / "modeprobe" / "_C.abi3.so").write_text("library")
        return gpu.Outcome(name, verdicts.pop(0) if verdicts else "ok")

    monkeypatch.setattr(gpu, "run", run)
    verdicts: list[str] = []
    for arch, coming, expected in (
        ("9.0", [], ["build"]),
        ("9.0", [], ["library"]),
        ("9.0", ["failed"], ["library", "build"]),  # it does not load here
        ("8.0", [], ["build"]),
    ):
        session.arch, verdicts[:] = arch, coming
        assert gpu.build(session, 60).verdict == "ok"
        assert done == expected
        assert (session.site / "modeprobe" / "_C.abi3.so").exists()
        done.clear()
    monkeypatch.setattr(gpu, "fingerprint", lambda arch: "other sources")
    gpu.build(session, 60)
    assert done == ["build"]


def test_a_profile_is_a_line_per_kernel():
    """What ncu wrote on an H100, less the columns of the device's attributes."""
    log = (gpu.ROOT / "tests" / "data" / "ncu.csv").read_text()
    header, _, *lines = ncu.table(log)
    assert header.startswith("| kernel | us | DRAM % |")
    assert lines == [
        "| dropout_forward_kernel<float> | 186.3 | 83.06 | 19.93 | 19.13 | 48.25 | 62 | 528 |",
        "| batch_norm_normalize_kernel<float, 0, 1> | 143.8 | 80.92 | 34.21 | 27.25 | 46.68 | 48 | 528 |",
        "| batch_norm_input_gradient_kernel<__nv_bfloat16, 1, 1> "
        "| 72.1 | 76.18 | 45.35 | 31.95 | 36.03 | 72 | 396 |",
    ]
    in_milliseconds = log.replace('"ns"', '"msecond"').replace('"186,304"', '"1,181.5"')
    assert ncu.table(in_milliseconds)[2].startswith("| dropout_forward_kernel<float> | 1.182e+06 | 83.06 |")
    assert ncu.table("==ERROR== ERR_NVGPUCTRPERM") == []


def test_the_numbers_are_the_targets(tmp_path):
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
    assert len(lines) == 19
    assert lines[0].split() == ["1.00", "work", "1:", "at", "least", "2x", "torch:", "met"]
    session = gpu.Session("cuda", "m", tmp_path, tmp_path, outcomes=[gpu.Outcome("tests", "ok")])
    (tmp_path / "facts.json").write_text(json.dumps({"gpu": "G", "torch": "2.11", "cuda": "13.0"}))
    rows[1]["verdict"] = "missed"
    (tmp_path / "results.json").write_text(json.dumps({"targets": rows}))
    gpu.write(session)
    first = (tmp_path / "summary.md").read_text().splitlines()[:7]
    assert first[2:5] == ["G, torch 2.11, CUDA 13.0", "Steps: 1 ok", "Targets: 19 met, 1 missed"]
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
    outcome = gpu.pytest(session, "tests", 180, "tests/gpu", "tests/batch_norm/test_values.py")
    assert outcome.verdict == "ok", (tmp_path / "tests.log").read_text()
    assert re.fullmatch(r"\d+ skipped.*", outcome.note)


def test_every_file_of_gpu_tests_is_judged(start, tmp_path, monkeypatch):
    def one(session, name, limit, file, option, which, *workers, environment):
        assert environment["OMP_NUM_THREADS"] == "1"
        assert re.fullmatch(r"tests/gpu/test_\w+\.py", file)
        assert (option, which) == ("-k", "triton" if name.endswith("-triton") else "not triton")
        assert workers in ((), ("-n", "4"))
        return gpu.Outcome(name, "failed" if name == "tests-dropout-triton" else "ok", 1.0, "3 passed")

    monkeypatch.setattr(gpu, "pytest", one)
    outcome = gpu.tests(gpu.Session("cpu", "x", tmp_path, tmp_path), 60)
    assert outcome.verdict == "failed"
    files = len(list((gpu.ROOT / "tests" / "gpu").glob("test_*.py")))
    passed = int(re.match(r"(\d+) passed; dropout-triton: 3 passed$", outcome.note)[1])
    assert 3 * files < passed < 6 * files


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

"""One command for a machine with an NVIDIA GPU: build, test, measure, sanitize, profile. ``make gpu``.

Runs from a source checkout with what is installed, offline, and installs nothing: the package is built into
``.cache/gpu`` beside links to the sources, and a library that was built from the same sources is used again,
also one built elsewhere with ``--arch`` and brought along in ``.cache/gpu/library``. What torch.compile and
Triton compile is kept there, too. Every step has a time
limit, a step that fails does not stop the next, and results are written as they come, to
``benchmarks/results/<gpu>/`` and, packed, to ``--archive``. Without a GPU the same driver runs its steps on
the CPU, as a rehearsal. The standard library is all that it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from . import ncu

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 525.0  # seconds; what is left after a slow step is what the next one gets
NUMBERS = 20
PACKED = 10.0  # seconds between two packings of the results while a step runs


@dataclass
class Outcome:
    """How a step ended. ``verdict``: ok, failed, timeout, absent (a tool is missing) or no time."""

    step: str
    verdict: str
    seconds: float = 0.0
    note: str = ""


@dataclass
class Session:
    """What the steps share."""

    device: str  # "cuda" or "cpu"
    machine: str
    results: Path
    site: Path
    bench: list[str] = field(default_factory=list)
    archive: Path | None = None
    arch: str | None = None  # to build for, instead of the visible GPU's
    until: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    packing: Any = field(default_factory=threading.Lock)

    def environment(self) -> dict[str, str]:
        def before(name: str, *folders: Path) -> str:
            return os.pathsep.join(filter(None, (*map(str, folders), os.environ.get(name))))

        # What torch.compile and Triton compile goes home with the library, and comes along the next time.
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        kept = {name: os.environ.get(name) or str(self.site / folder) for name, folder in caches.items()}
        own = {
            "MODEPROBE_FACTS": str(self.results / "facts.json"),
            "MODEPROBE_GPU_REHEARSAL": "1" if self.device == "cpu" else "",
            # Before what is there already: torch itself may come from it. Processes that tests spawn import
            # these again, as tests.batch_norm and so on.
            "PYTHONPATH": before("PYTHONPATH", self.site, ROOT),
            "PATH": before("PATH", Path(sys.executable).parent),  # ninja beside an interpreter not activated
        }
        return os.environ | kept | own

    def pack(self) -> None:
        """The results so far in one file: a machine that goes away leaves what was there ten seconds ago."""
        if self.archive is None:
            return
        with self.packing, contextlib.suppress(OSError):
            part = self.archive.with_name(self.archive.name + ".part")
            self.archive.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(part, "w:gz") as packed:
                for path in sorted(self.results.iterdir()):
                    if path.suffix in (".json", ".log", ".md") and not path.name.startswith("."):
                        content = path.read_bytes()  # a log may grow meanwhile
                        entry = tarfile.TarInfo(f"{self.results.name}/{path.name}")
                        entry.size, entry.mtime = len(content), int(time.time())
                        packed.addfile(entry, io.BytesIO(content))
            part.replace(self.archive)

    def python(self, *arguments: str) -> list[str]:
        # Not the working directory but .cache/gpu comes first on the path.
        return [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), *arguments]


def run(session: Session, name: str, command: Sequence[str], limit: float, **changes: Any) -> Outcome:
    """A command with its output in ``<name>.log``; past the limit it ends with everything it started."""
    log = session.results / f"{name}.log"
    environment = session.environment() | changes.pop("environment", {})
    start = time.monotonic()
    with log.open("w") as output:
        output.write("$ " + " ".join(map(str, command)) + "\n")
        output.flush()
        try:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=changes.pop("cwd", ROOT),
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(name, "failed", 0.0, str(error))
        status = None
        while status is None and (left := limit - (time.monotonic() - start)) > 0:
            status = exited(process, min(left, PACKED))
            session.pack()
        if status is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Outcome(name, "timeout", time.monotonic() - start, f"stopped after {limit:.0f} s")
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    note = lines[-1][:140] if len(lines) > 1 else ""
    return Outcome(name, "ok" if status == 0 else "failed", time.monotonic() - start, note)


def exited(process: subprocess.Popen, seconds: float) -> int | None:
    """The status that the process ends with within ``seconds``."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def lay_out(session: Session) -> None:
    """``.cache/gpu``: the package as an installation would lay it out, by links, with its own library."""
    site = session.site
    shutil.rmtree(site / "modeprobe", ignore_errors=True)
    (site / "modeprobe").mkdir(parents=True)
    links = {path.name: path for path in (ROOT / "modeprobe").iterdir() if path.suffix not in (".so",)}
    links.pop("__pycache__", None)
    links |= {"triton_kernels": ROOT / "triton_kernels", "benchmarks": ROOT / "benchmarks"}
    for name, path in links.items():
        (site / "modeprobe" / name).symlink_to(path)
    # Without pyproject.toml: an older setuptools does not read all of it, and the library needs none of it.
    for name in ("setup.py", "csrc"):
        if not (site / name).exists():
            (site / name).symlink_to(ROOT / name)


def fingerprint(arch: str) -> str:
    """Of what a library is built from, and for which architecture."""
    found = hashlib.sha256(arch.encode())
    for path in (ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*.*"))):
        found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()


def works(session: Session, limit: float) -> bool:
    """Whether the library in place loads here and, with a GPU, runs there."""
    code = "import torch, modeprobe as m; from modeprobe import _extension as e; assert e.built_for('cuda')"
    if session.device == "cuda":
        code += "; k = m.mask.key(1, device='cuda'); torch.ops.modeprobe.dropout(k.float(), k, 0.5).cpu()"
    return run(session, "library", session.python("-c", code), limit).verdict == "ok"


def build(session: Session, limit: float) -> Outcome:
    lay_out(session)
    start = time.monotonic()
    place, kept = session.site / "modeprobe", session.site / "library"
    arch = session.arch or (capability() or "9.0" if session.device == "cuda" else None)
    if arch is None:
        here = sorted((ROOT / "modeprobe").glob("_C*.so"))
        if here:  # a rehearsal does not compile what is there
            shutil.copy(here[0], place)
            return Outcome("build", "ok", 0.0, f"rehearsal with {here[0].name}")
        changes = {"MODEPROBE_CUDA": "0"}
    else:
        changes = {"MODEPROBE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch}
        stamp, earlier = kept / "fingerprint", sorted(kept.glob("_C*.so"))
        if earlier and stamp.is_file() and stamp.read_text() == fingerprint(arch):
            shutil.copy(earlier[0], place)
            if works(session, limit / 2):
                note = f"{earlier[0].name} of the same sources"
                return Outcome("build", "ok", time.monotonic() - start, note)
            (place / earlier[0].name).unlink()
    command = session.python("setup.py", "-q", "build_ext", "--inplace")
    changes["MAX_JOBS"] = str(os.cpu_count() or 1)
    left = limit - (time.monotonic() - start)
    outcome = run(session, "build", command, left, cwd=session.site, environment=changes)
    if outcome.verdict == "ok":
        built = sorted(place.glob("_C*.so"))
        outcome.note = built[0].name if built else ""
        outcome.verdict = "ok" if built else "failed"
        if built and arch is not None:
            kept.mkdir(exist_ok=True)
            shutil.copy(built[0], kept)
            (kept / "fingerprint").write_text(fingerprint(arch))
    return outcome


def facts(session: Session, limit: float) -> Outcome:
    script = (
        "import json, os, platform, sys, torch\n"
        "found = {'python': platform.python_version(), 'torch': torch.__version__}\n"
        "found['cuda'] = torch.version.cuda\n"
        "if torch.cuda.is_available():\n"
        "    p = torch.cuda.get_device_properties(0)\n"
        "    found |= {'gpu': p.name, 'multiprocessors': p.multi_processor_count, 'memory': p.total_memory,\n"
        "              'l2_bytes': getattr(p, 'L2_cache_size', None), 'capability': [p.major, p.minor]}\n"
        "json.dump(found, open(os.environ['MODEPROBE_FACTS'], 'w'), indent=1)\n"
        "print(json.dumps(found))\n"
    )
    return run(session, "facts", session.python("-c", script), limit)


RESULT = r"(\d+) (passed|failed|skipped|errors?)"  # of pytest's last line
# Of some twenty processes: threads of their own and pools of compilers would be in each other's way.
SIDE_BY_SIDE = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def pytest(session: Session, name: str, limit: float, *arguments: str, **changes: Any) -> Outcome:
    options = ("-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    command = session.python("-m", "pytest", *options, *arguments)
    outcome = run(session, name, command, limit, **changes)
    text = (session.results / f"{name}.log").read_text(errors="replace")
    counts = re.findall(r"^[\d\w ,]*\d+ (?:passed|failed|skipped)[^\n]*", text, re.MULTILINE)
    outcome.note = counts[-1][:140] if counts else outcome.note
    return outcome


def tests(session: Session, limit: float) -> Outcome:
    """Every file in a process of its own, for an illegal access takes the GPU from the process that made it;
    side by side and Triton apart, because most of the time goes into compiling."""
    start = time.monotonic()
    several: tuple[str, ...] = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    parts: list[tuple[str, str, str, tuple[str, ...]]] = []
    for file in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        name = file.stem.removeprefix("test_").removesuffix("_gpu")
        parts.append((name, file.name, "not triton", ()))
        if "triton" in file.read_text():
            parts.append((f"{name}-triton", file.name, "triton", several))

    def one(part: tuple[str, str, str, tuple[str, ...]]) -> Outcome:
        name, file, which, options = part
        arguments = (f"tests/gpu/{file}", "-k", which, *options)
        return pytest(session, f"tests-{name}", limit, *arguments, environment=SIDE_BY_SIDE)

    with ThreadPoolExecutor(len(parts)) as pool:
        found = list(pool.map(one, parts))
    verdicts = [one.verdict for one in found]
    verdict = next((word for word in ("failed", "timeout") if word in verdicts), "ok")
    counts = [(how, int(count)) for one in found for count, how in re.findall(RESULT, one.note)]
    totals = {how: sum(count for which, count in counts if which == how) for how in dict(counts)}
    parts_left = [f"{one.step.removeprefix('tests-')}: {one.note}" for one in found if one.verdict != "ok"]
    note = "; ".join([", ".join(f"{count} {how}" for how, count in totals.items()), *parts_left])
    return Outcome("tests", verdict, time.monotonic() - start, note)


def suite(session: Session, limit: float) -> Outcome:
    """The rest of the suite, as far as the time goes: its rungs without a GPU matter less here."""
    outcome = pytest(session, "suite", limit, "tests/dropout", "tests/batch_norm", "tests/emulator")
    if outcome.verdict == "timeout":
        text = (session.results / "suite.log").read_text(errors="replace")
        signs = "".join(re.findall(r"^[.FEsxX]+(?= *(?:\[|$))", text, re.MULTILINE))
        outcome.verdict = "failed" if set(signs) & set("FE") else "ok"
        outcome.note = f"{outcome.note}; until then {signs.count('.')} passed"
    return outcome


@dataclass(frozen=True)
class Check:
    """A tool of compute-sanitizer: its options, the types that kernel_run.py takes, and the environment."""

    options: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()  # all
    environment: dict[str, str] = field(default_factory=dict)


# Kernels are chosen by a part of their mangled name. initcheck has to watch torch's, too: it would take what
# they wrote for uninitialised. Calls into CUDA that torch tries and recovers from are no finding. The tools
# that look at memory must not be given any that was used before; those that look at barriers and shared
# memory are the slow ones, and a kernel's way through its barriers does not depend on the type.
OURS = ("--kernel-name", "kns=modeprobe")
FRESH = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SANITIZERS = {
    "memcheck": Check((*OURS, "--report-api-errors", "no"), environment=FRESH),
    "racecheck": Check(OURS, ("float32", "bfloat16")),
    "synccheck": Check(OURS, ("float32", "bfloat16")),
    "initcheck": Check(environment=FRESH),
}


def sanitizer(session: Session, limit: float) -> Outcome:
    """The four tools side by side. "timeout" where one had no time to end and none has found anything."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    )
    if tool is None:
        return Outcome("sanitizer", "absent", 0.0, "no compute-sanitizer in the toolkit or on PATH")
    start = time.monotonic()
    program = str(ROOT / "tests" / "gpu" / "kernel_run.py")

    def one(name: str) -> Outcome:
        check = SANITIZERS[name]
        command = [tool, "--tool", name, "--error-exitcode", "9", *check.options]
        command += session.python(program, *check.dtypes)
        environment = SIDE_BY_SIDE | check.environment
        outcome = run(session, f"sanitizer-{name}", command, limit, environment=environment)
        if outcome.verdict == "timeout" and findings(session.results / f"sanitizer-{name}.log"):
            outcome.verdict = "failed"
        return outcome

    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        found = dict(zip(SANITIZERS, pool.map(one, SANITIZERS), strict=True))
    verdicts = [outcome.verdict for outcome in found.values()]
    verdict = next((word for word in ("failed", "timeout") if word in verdicts), "ok")
    note = ", ".join(f"{name} {outcome.verdict} ({outcome.seconds:.0f} s)" for name, outcome in found.items())
    return Outcome("sanitizer", verdict, time.monotonic() - start, note)


def findings(log: Path) -> bool:
    """Whether a tool of compute-sanitizer that did not end had reported something."""
    report = r"^=+ +(?:Error|Warning: Race|Race|Invalid|Misaligned|Uninitialized|Barrier error)"
    return re.search(report, log.read_text(errors="replace"), re.MULTILINE) is not None


def bench(session: Session, limit: float) -> Outcome:
    arguments = ["--device", session.device, "--budget", str(max(10, int(limit) - 15))]
    arguments += ["--warm", str(int(min(limit / 4, 75)))] if session.device == "cuda" else []
    arguments += ["--machine", session.machine, "--output", str(session.results.parent), *session.bench]
    return run(session, "bench", session.python("-m", "modeprobe.benchmarks.plain", *arguments), limit)


def profile(session: Session, limit: float) -> Outcome:
    """What bounds the headline kernels, from the GPU's own counters: one line per kernel, in profile.md."""
    found = [shutil.which("ncu"), shutil.which("ncu", path="/usr/local/cuda/bin")]
    found += map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))[-1:])
    tool = next(filter(None, found), None)
    if tool is None:
        return Outcome("profile", "absent", 0.0, "no ncu in the toolkit or on PATH")
    command = [tool, "--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(ncu.METRICS)]
    command += ["--kernel-name-base", "mangled", "--kernel-name", "regex:modeprobe"]
    program = session.python("-m", "modeprobe.benchmarks.headline_kernels")
    outcome = run(session, "profile", [*command, *program], limit)
    lines = ncu.table((session.results / "profile.log").read_text(errors="replace"))
    if lines:
        (session.results / "profile.md").write_text("\n".join(lines) + "\n")
        outcome.note = f"{len(lines) - 2} kernels in profile.md"
    elif outcome.verdict == "ok":
        outcome.verdict = "failed"  # counters may be closed to this user
    return outcome


class Step(NamedTuple):
    """``most``: seconds that it may take. ``kept``: seconds that the steps before it leave to it.
    ``beside``: whether it runs beside the step before it; nothing that is timed does."""

    run: Callable[[Session, float], Outcome]
    most: float
    kept: float = 0.0
    beside: bool = False


# The most valuable first: a machine may go away.
STEPS: dict[str, Step] = {
    "facts": Step(facts, 60),  # a first import reads gigabytes
    "build": Step(build, 200),  # nothing goes without it
    "tests": Step(tests, 150, kept=60),
    "sanitizer": Step(sanitizer, 150, kept=60, beside=True),
    "bench": Step(bench, 400, kept=120),
    "profile": Step(profile, 45, kept=25),
    "suite": Step(suite, 60),
}


def side_by_side(names: Sequence[str]) -> list[list[str]]:
    """The steps in groups that run at the same time, where those that go beside each other are neighbours."""
    groups: list[list[str]] = []
    order = list(STEPS)
    for name in names:
        before = order[order.index(name) - 1] if STEPS[name].beside else None
        if groups and before in groups[-1]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def limit_of(groups: Sequence[Sequence[str]], index: int, left: float) -> float:
    """Seconds for a group of steps, when ``left`` are left for it and those after it."""
    most, kept = (max(getattr(STEPS[name], what) for name in groups[index]) for what in ("most", "kept"))
    later = sum(max(STEPS[name].kept for name in group) for group in groups[index + 1 :])
    if [list(group) for group in groups] == [["build"]]:
        return left  # ahead, on a machine of any speed
    return min(most, max(left - later, min(kept, left)))


def capability() -> str | None:
    """The visible GPU's, as "9.0"; None without a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    found = re.findall(r"^\d+\.\d+$", done.stdout, re.MULTILINE)
    return found[0] if done.returncode == 0 and found else None


def gpu_name() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    names = done.stdout.strip().splitlines()
    return names[0] if done.returncode == 0 and names else None


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def read(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def targets(results: Path, device: str) -> list[dict[str, Any]]:
    return [one for one in read(results / "results.json").get("targets", []) if one.get("device") == device]


def numbers(results: Path, device: str) -> list[str]:
    """The most important figures: the targets in their order, with what was measured."""
    if not read(results / "results.json"):
        return ["no benchmark results"]
    measured = [one for one in targets(results, device) if one.get("measured")]
    lines = [
        f"{one['measured'][1]:8.2f}  {one['text']}: {one['bound']}: {one['verdict']}" for one in measured
    ]
    return lines[:NUMBERS] or ["no target was measured"]


def in_short(session: Session) -> list[str]:
    """How the steps ended, and how many targets are met: the first lines of summary.md."""

    def counted(words: Sequence[str]) -> str:
        return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))

    found = targets(session.results, session.device)
    machine = read(session.results / "facts.json")
    software = f"torch {machine['torch']}, CUDA {machine['cuda']}" if "torch" in machine else ""
    return [
        *([f"{machine.get('gpu', 'no GPU')}, {software}"] if software else []),
        f"Steps: {counted([one.verdict for one in session.outcomes])}",
        f"Targets: {counted([one['verdict'] for one in found]) or 'none measured'}",
    ]


def write(session: Session) -> None:
    """steps.json and summary.md, after every step."""
    (session.results / "steps.json").write_text(
        json.dumps([asdict(one) for one in session.outcomes], indent=1) + "\n"
    )
    lines = [f"# {session.machine}", "", *in_short(session), ""]
    lines += ["```", *numbers(session.results, session.device), "```", ""]
    lines += ["| step | verdict | seconds | note |", "|---|---|---|---|"]
    for one in session.outcomes:
        note = one.note.replace("|", "/")
        lines.append(f"| {one.step} | {one.verdict} | {one.seconds:.0f} | {note} |")
    lines.append("")
    (session.results / "summary.md").write_text("\n".join(lines))
    session.pack()


def earlier_outcomes(results: Path, names: Sequence[str]) -> list[Outcome]:
    """How the steps that are not among ``names`` ended when they last ran."""
    try:
        found = [Outcome(**one) for one in json.loads((results / "steps.json").read_text())]
    except (OSError, ValueError, TypeError):
        return []
    return [one for one in found if one.step not in names]


def chosen_steps(text: str | None) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] if text else list(STEPS)
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        raise SystemExit(f"unknown step {unknown[0]!r}: choose from {', '.join(STEPS)}")
    return names


def outcome_of(session: Session, name: str, limit: float) -> Outcome:
    """How a step ends: whatever happens in it, the next one runs."""
    if limit < 1:
        return Outcome(name, "no time", 0.0, "the steps before took it")
    try:
        return STEPS[name].run(session, limit)
    except Exception as error:
        return Outcome(name, "failed", 0.0, f"{type(error).__name__}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every step that could run is ok."""
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--steps", help=f"comma separated, from {', '.join(STEPS)}; default all")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of folders"
    )
    parser.add_argument(
        "--site", type=Path, default=ROOT / ".cache" / "gpu", help="where the package is built"
    )
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for everything")
    parser.add_argument("--bench", default="", help="more arguments for the benchmarks")
    parser.add_argument("--archive", type=Path, help="also pack the results into this file, a .tar.gz")
    parser.add_argument("--arch", help='build for this GPU ("9.0"), whatever is visible here')
    options = parser.parse_args(arguments)
    names = chosen_steps(options.steps)
    gpu = gpu_name()
    device, machine = ("cuda", slug(gpu)) if gpu else ("cpu", "rehearsal-without-gpu")
    session = Session(
        device,
        machine,
        options.results / machine,
        options.site,
        options.bench.split(),
        options.archive,
        options.arch,
    )
    session.results.mkdir(parents=True, exist_ok=True)
    session.until = time.monotonic() + options.total
    if not gpu:
        print("No NVIDIA GPU: a rehearsal of the same steps on the CPU.")
    if "build" not in names and not (session.site / "modeprobe").exists():
        names.insert(0, "build")
    session.outcomes = earlier_outcomes(session.results, names)
    groups = side_by_side(names)
    for index, group in enumerate(groups):
        limit = limit_of(groups, index, session.until - time.monotonic())
        print(f"{' and '.join(group)} (at most {max(limit, 0):.0f} s) ...", flush=True)
        before, ended = session.outcomes, {}
        with ThreadPoolExecutor(len(group)) as pool:
            for done in as_completed([pool.submit(outcome_of, session, name, limit) for name in group]):
                outcome = done.result()
                ended[outcome.step] = outcome
                session.outcomes = [*before, *(ended[name] for name in group if name in ended)]
                write(session)
                print(f"  {outcome.step} {outcome.verdict} after {outcome.seconds:.0f} s: {outcome.note}")
    print(f"\nResults: {session.results}\n")
    for outcome in session.outcomes:
        print(f"{outcome.step:<10} {outcome.verdict:<8} {outcome.seconds:6.0f} s  {outcome.note}")
    print("\n" + "\n".join(numbers(session.results, session.device)))
    own = [one for one in session.outcomes if one.step in names]
    return 0 if all(one.verdict in ("ok", "absent") for one in own) else 1


if __name__ == "__main__":
    sys.exit(main())

"""One results file per machine; a later run of a work replaces its rows.

The file is JSON::

    {"schema": 1,
     "machine": {"name", "cpu", "generation", "cores", "threads", "simd", "memory_gib", "huge_pages", "gpu",
                 "system"},
     "runs": {"<run>": {"date", "commit", "versions", "rivals", "limits", "allocator", "load"}},
     "results": [a measure.Row each, with "run"],
     "instructions": [a callgrind row each, with "run"],
     "targets": [a verdict each]}

Times are seconds, sizes bytes, spreads [20th, 50th, 80th percentile].
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
KEYS = {"results": ("device", "work"), "instructions": ("name",)}
# What two sets of figures must share to stand in one file.
IDENTITY = ("cpu", "generation", "cores", "threads", "simd")
GPU_IDENTITY = ("name", "memory_gib", "multiprocessors", "capability")
# What decides how fast a work runs: the kernels and the Python on the way to them.
KERNEL_SOURCES = (
    "csrc",
    "triton_kernels",
    "setup.py",
    *(f"modeprobe/{part}" for part in ("_extension.py", "mask.py", "ops", "functional", "nn")),
)

_COMMENT = r"^[[:space:]]*(//|# )"  # a line that is one, of C++ or Python

Results = dict[str, Any]


def checkout() -> Path | None:
    """The root of the source tree that this package was imported from; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "csrc").is_dir() else None


def default_folder() -> Path:
    """``benchmarks/results`` of the source tree, or ``modeprobe-benchmarks`` below the working directory."""
    root = checkout()
    return root / "benchmarks" / "results" if root else Path.cwd() / "modeprobe-benchmarks"


def machine(device: str) -> dict[str, Any]:
    """The machine, under a name that another CPU generation, instruction set or GPU does not share."""
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "generation": generation(cpu_facts()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": memory_gib(),
        "huge_pages": huge_pages(),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    found["name"] = machine_name(found)
    return found


def machine_name(found: dict[str, Any]) -> str:
    """``nvidia-h100-80gb-hbm3``, or ``amd-epyc-family-23-model-1-avx2-2-cores``."""
    if found["gpu"]:
        return slug(found["gpu"]["name"])
    parts = [found["cpu"], found["generation"], found["simd"], f"{found['cores']} cores"]
    if found["threads"] != found["cores"]:
        parts.append(f"{found['threads']} threads")
    return "-".join(slug(part) for part in parts if part)


def identity(found: dict[str, Any]) -> dict[str, Any]:
    """What tells a machine from another one; a CPU beside a GPU is not part of it."""
    if found["gpu"]:
        return {key: found["gpu"].get(key) for key in GPU_IDENTITY}
    return {key: found.get(key) for key in IDENTITY}


def require_same_machine(results: Results, here: dict[str, Any], path: Path) -> None:
    """
    Raises:
        ValueError: the results were measured on another machine, so rows of two would stand in one table.
    """
    theirs, ours = identity(results["machine"]), identity(here)
    if theirs != ours:
        differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        raise ValueError(
            f"machine: {path} was measured on another one: "
            + ", ".join(f"{key} {theirs.get(key)!r}, here {ours.get(key)!r}" for key in differing)
            + "; give this machine a folder of its own with --machine or --output"
        )


def slug(text: str) -> str:
    words = re.sub(r"\((R|TM)\)|@.*|CPU", " ", text)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "machine"


def cpu_name() -> str:
    return cpu_facts().get("model name") or platform.processor() or platform.machine()


def cpu_facts() -> dict[str, str]:
    """The first processor's fields of ``/proc/cpuinfo``; empty where there is none."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return facts


def generation(facts: dict[str, str]) -> str:
    """Family and model on x86, implementer and part on ARM: the marketing name alone spans generations."""
    if "cpu family" in facts:
        return f"family {facts['cpu family']} model {facts.get('model', '?')}"
    if "CPU part" in facts:
        return f"implementer {facts.get('CPU implementer', '?')} part {facts['CPU part']}"
    return ""


def huge_pages() -> str | None:
    """``always``, ``madvise`` or ``never``: how large fresh memory is mapped."""
    try:
        chosen = re.search(r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())
    except OSError:
        return None
    return chosen[1] if chosen else None


def memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def versions() -> dict[str, str | None]:
    from modeprobe._version import __version__

    from .rivals import version

    return {
        "modeprobe": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit of the source tree, with "+" when files under version control differ from it.

    Documents and saved results do not count: publishing changes them. ``MODEPROBE_COMMIT`` says what a
    copy of the tree is a copy of, where its git does not know.
    """
    copied = os.environ.get("MODEPROBE_COMMIT")
    if copied:
        return copied
    apart = (":!benchmarks/results", ":!docs", ":!*.md")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *apart)
    head = git("rev-parse", "--short=12", "HEAD")
    return None if head is None else head + ("+" if changed else "")


def older_kernels(measured: str | None) -> bool:
    """Whether the kernels of this source tree differ from those of a measured commit, as far as git knows.

    Lines of comments alone do not count.
    """
    if measured is None or checkout() is None:
        return False
    if measured.endswith("+"):
        return True  # measured on a tree that no commit holds
    changed = git("diff", "--numstat", f"-I{_COMMENT}", measured, "--", *KERNEL_SOURCES)
    return changed is None or bool(changed)


def git(*arguments: str) -> str | None:
    """What git prints in the source tree; None without git, or when it refuses."""
    root = checkout()
    if root is None:
        return None
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def empty(device: str = "cpu") -> Results:
    return {
        "schema": SCHEMA,
        "machine": machine(device),
        "runs": {},
        "results": [],
        "instructions": [],
        "targets": [],
    }


def load(path: Path) -> Results:
    """The results in a file, or in the folder of a machine.

    Raises:
        FileNotFoundError: there is none; the message lists the machines beside it.
        ValueError: not a results file of this schema.
    """
    if path.suffix != ".json":
        path = path / "results.json"
    if not path.is_file():
        beside = sorted(file.parent.name for file in path.parent.parent.glob("*/results.json"))
        hint = f"; there are {', '.join(beside)}" if beside else "; make some with: modeprobe bench"
        raise FileNotFoundError(f"no results at {path}{hint}")
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a results file of schema {SCHEMA}")
    return found


def others(path: Path) -> list[Results]:
    """The results of other machines beside a file, the latest first; no quick runs."""
    found = []
    for file in path.parent.parent.glob("*/results.json"):
        if file.parent == path.parent or file.parent.name.endswith("-quick"):
            continue
        other = load(file)
        if other["results"]:
            found.append(other)
    return sorted(found, key=lambda one: max(run["date"] for run in one["runs"].values()), reverse=True)


def save(results: Results, path: Path) -> None:
    """Writes the file in one step: a run that is stopped leaves the last complete state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".results", suffix=".json")
    with os.fdopen(handle, "w") as file:
        file.write(dumps(results))
    os.chmod(name, 0o644)
    os.replace(name, path)


def dumps(results: Results) -> str:
    """JSON with one row per line, so that a change of a row is a change of a line."""
    parts = []
    for key, value in results.items():
        if isinstance(value, list):
            rows = ",\n".join("  " + json.dumps(item) for item in value)
            parts.append(f'"{key}": [\n{rows}\n]' if rows else f'"{key}": []')
        else:
            parts.append(f'"{key}": {json.dumps(value, indent=1)}')
    return "{" + ",\n".join(parts) + "}\n"


def upsert(results: Results, table: str, rows: Iterable[dict[str, Any]], run: str) -> None:
    """All rows of a work replace all earlier rows of it, so that what stands side by side ran side by side.

    Runs that no row refers to any more are dropped.
    """
    fresh: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        fresh.setdefault(tuple(row[key] for key in KEYS[table]), []).append({**row, "run": run})
    kept: dict[tuple, list[dict[str, Any]]] = {}
    for row in results[table]:
        kept.setdefault(tuple(row[key] for key in KEYS[table]), []).append(row)
    results[table] = [row for group in {**kept, **fresh}.values() for row in group]
    used = {row["run"] for name in KEYS for row in results[name]} | {run}
    results["runs"] = {name: value for name, value in results["runs"].items() if name in used}


def find(results: Results, work: str, provider: str, device: str) -> dict[str, Any] | None:
    for row in results["results"]:
        if row["work"] == work and row["provider"] == provider and row["device"] == device:
            return row
    return None

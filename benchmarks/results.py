"""One results file per machine; a later run of a work replaces its rows.

The file is JSON::

    {"schema": 1,
     "machine": {"name", "cpu", "cores", "threads", "simd", "memory_gib", "gpu", "system"},
     "runs": {"<run>": {"date", "commit", "versions", "rivals", "options", "load"}},
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
    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": memory_gib(),
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
    name = found["gpu"]["name"] if found["gpu"] else f"{found['cpu']} {found['cores']} cores"
    found["name"] = slug(name)
    return found


def slug(text: str) -> str:
    words = re.sub(r"\((R|TM)\)|@.*|CPU", " ", text)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "machine"


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


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
    """The commit of the source tree, with "+" when files under version control differ from it."""
    root = checkout()
    if root is None:
        return None

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results", ":!docs")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


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

"""Builds C++ for tests with ninja, on demand, and keeps what is up to date under ``.cache/``."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "csrc" / "include"
EMULATOR = ROOT / "tests" / "emulator"
CACHE = ROOT / ".cache"

WARNINGS = ("-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def why_not() -> str | None:
    """Why nothing can be built here; None if it can."""
    if compiler() is None:
        return "no C++ compiler: install g++ 12 or later"
    if ninja() is None:
        return "no ninja: pip install ninja"
    return None


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def ninja() -> str | None:
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else shutil.which("ninja")


def build(
    name: str,
    sources: Iterable[Path],
    *,
    flags: Iterable[str] = (),
    link: Iterable[str] = (),
    headers: Path = HEADERS,
    objects: Iterable[Path] = (),
    module: bool = False,
) -> Path:
    """Compiles ``sources`` against ``headers`` into an executable, or a Python module with pybind11.

    ``objects``: compiled before (they lie beside an earlier target), linked too.

    Raises:
        RuntimeError: with the compiler's output.
    """
    folder = CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    compile_flags = [
        "-std=c++20",
        "-g1",
        *WARNINGS,
        "-DMODEPROBE_EMULATOR",
        f"-I{headers}",
        f"-I{EMULATOR}",
        *flags,
    ]
    target = name
    if module:
        import pybind11

        compile_flags += [
            "-fPIC",
            f"-isystem{pybind11.get_include()}",
            f"-isystem{sysconfig.get_path('include')}",
        ]
        target = "modeprobe_emulator" + sysconfig.get_config_var("EXT_SUFFIX")
    link_flags = [*link, "-shared"] if module else [*link, "-rdynamic"]
    lines = [
        f"cxx = {compiler()}",
        f"flags = {' '.join(compile_flags)}",
        "rule compile",
        "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = $cxx $in -o $out {' '.join(link_flags)} -ldl",
    ]
    linked = [str(path) for path in objects]
    for source in sources:
        linked.append(f"{source.stem}.o")
        lines.append(f"build {linked[-1]}: compile {source}")
    lines.append(f"build {target}: link {' '.join(linked)}")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test processes build once
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run([str(ninja()), "-C", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building {name} failed:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    return folder / target


def changed_headers(name: str, header: str, old: str, new: str) -> Path:
    """A copy of the headers in which ``header`` has ``new`` where ``old`` stood, once."""
    text = (HEADERS / "modeprobe" / header).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{header} has {text.count(old)} places that read {old!r}, expected one")
    folder = CACHE / name / "include"
    for path in (HEADERS / "modeprobe").iterdir():
        content = text.replace(old, new) if path.name == header else path.read_text()
        copy = folder / "modeprobe" / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text() != content:
            copy.write_text(content)
    return folder


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("modeprobe_emulator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""What pip gets: the wheel, the sdist, and what setup.py says when something is missing."""

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler: install g++"
)
pytestmark = pytest.mark.rung("compiler")


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=900, **options
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def setup_py(monkeypatch):
    """The functions of setup.py, without a build."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    return runpy.run_path("setup.py")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    for stale in (ROOT / "build").glob("[lb]*"):  # lib*, bdist*: modules that are gone must not be packed
        shutil.rmtree(stale)
    out = tmp_path_factory.mktemp("wheel")
    from modeprobe import _extension

    # As the library that is being tested was built: its objects are used again.
    cuda = {"MODEPROBE_CUDA": "1" if _extension.built_for("cuda") else "0"}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "-w", out, ROOT, env={**os.environ, **cuda})
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def clean_python(wheel, tmp_path_factory):
    """A Python with torch and the other dependencies, where only the wheel is installed."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A plain path entry: the .pth files of that folder, the editable install among them, are not read.
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    assert sysconfig.get_path("purelib") in dependencies
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--no-deps", "--ignore-installed", wheel)
    return python


@needs_compiler
def test_wheel_is_one_abi3_binary_for_every_python(wheel):
    assert wheel.name.startswith("modeprobe-")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "modeprobe/_C.abi3.so" in names
    assert "modeprobe/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"modeprobe"}


@needs_compiler
def test_wheel_holds_every_module_of_the_source_tree(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, prefix in [
        ("modeprobe", "modeprobe"),
        ("triton_kernels", "modeprobe/triton_kernels"),
        ("benchmarks", "modeprobe/benchmarks"),
    ]:
        tracked = run("git", "ls-files", folder, ":!benchmarks/results", cwd=ROOT).split()
        wanted = {name for name in tracked if name.endswith((".py", ".typed", ".j2", ".html", ".css", ".js"))}
        missing = {name for name in wanted if prefix + name.removeprefix(folder) not in names}
        assert not missing


@needs_compiler
def test_wheel_works_from_any_directory(clean_python, tmp_path):
    code = """
import torch, modeprobe, modeprobe.triton_kernels, modeprobe.benchmarks
from modeprobe import _extension
assert _extension.loaded(), _extension.why_not("cpu")
x = torch.ones(64)
y = modeprobe.functional.dropout(x, 0.1, key=modeprobe.mask.key(1234, 5))
kept = "".join(str(int(v > 0)) for v in y.tolist())
assert kept == "1101111111111111111111101111111111101111111111010110111111111111", kept
print(modeprobe.__file__)
print("cuda" if _extension.built_for("cuda") else "cpu")
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    file, built = run(clean_python, "-c", code, cwd=tmp_path, env=environment).split()
    assert Path(file).is_relative_to(clean_python.parent.parent)
    from modeprobe import _extension

    assert built == ("cuda" if _extension.built_for("cuda") else "cpu")


@needs_compiler
def test_console_script(clean_python, tmp_path):
    out = run(clean_python.parent / "modeprobe", "info", cwd=tmp_path)
    assert "modeprobe" in out


def test_sdist_holds_what_a_build_needs(tmp_path):
    code = "from setuptools import build_meta; import sys; print(build_meta.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", code, tmp_path, cwd=ROOT).split()[-1]
    with tarfile.open(tmp_path / name) as archive:
        members = {member.split("/", 1)[-1] for member in archive.getnames()}
    left_out = [":!benchmarks/results", ":!.ci", ":!.gitignore"]
    sources = run("git", "ls-files", ".", *left_out, cwd=ROOT).split()
    assert not set(sources) - members


def test_without_torch_the_command_to_run_is_named():
    code = (
        "import sys, runpy; sys.modules['torch'] = None; sys.argv = ['setup.py', 'bdist_wheel']; "
        "runpy.run_path('setup.py')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr


def test_cuda_can_be_demanded(setup_py, monkeypatch):
    cuda_home = setup_py["cuda_home"]
    monkeypatch.setitem(cuda_home.__globals__, "find_cuda", lambda: None)
    assert cuda_home("auto") is None
    with pytest.raises(SystemExit, match="CUDA_HOME"):
        cuda_home("1")
    with pytest.raises(SystemExit, match="auto, 0 or 1, got 'yes'"):
        cuda_home("yes")


def test_toolkit_is_found_behind_a_wrapper(setup_py, tmp_path, monkeypatch):
    real = tmp_path / "toolkit"
    (real / "bin").mkdir(parents=True)
    (real / "bin" / "nvcc").write_text(f'#!/bin/sh\necho "#$ TOP={real}/bin/.." >&2\n')
    (real / "bin" / "nvcc").chmod(0o755)
    wrapper = tmp_path / "elsewhere" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {real}/bin/nvcc "$@"\n')
    wrapper.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    assert setup_py["find_cuda"]() == real.resolve()

"""Builds modeprobe._C: one abi3 library on torch's stable ABI, with CUDA kernels where a toolkit is found.

Environment:
    MODEPROBE_CUDA        auto (default): CUDA kernels when nvcc is found; 1: fail without it; 0: never
    MODEPROBE_EXTENSION   0: a pure Python install (plain torch and Triton only)
    TORCH_CUDA_ARCH_LIST  default "8.0 9.0 10.0+PTX"; no GPU needs to be visible
    CUDA_HOME, MAX_JOBS   as for any torch extension
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
TORCH_TARGET = "0x020a000000000000"  # torch 2.10
PYTHON_TARGET = "0x030a0000"  # CPython 3.10

NO_TORCH = """\
modeprobe compiles against the torch that it will run with, and none can be imported here.
Install torch first, then build without isolation so that this build sees it:

    pip install "torch>=2.10" "setuptools>=77" ninja
    pip install --no-build-isolation .
"""


def fail(message: str) -> None:
    sys.exit(f"\n{message}")


def nvcc_top(nvcc: str) -> Path | None:
    """The toolkit root as nvcc itself reports it: the one on PATH may be a wrapper script far from it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.touch()
        command = [nvcc, "--dryrun", "-c", str(source), "-o", os.devnull]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
        except (OSError, subprocess.TimeoutExpired):
            return None
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(found.group(1)).resolve() if found else None


def find_cuda() -> Path | None:
    candidates = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    top = nvcc_top(on_path) if on_path else None
    if top:
        candidates.append(top)
    candidates += [
        Path("/usr/local/cuda"),
        Path("/opt/cuda"),
        *sorted(Path("/usr/local").glob("cuda-*"))[::-1],
    ]
    return next((path for path in candidates if (path / "bin" / "nvcc").exists()), None)


def cuda_home(switch: str) -> Path | None:
    if switch not in ("auto", "0", "1"):
        fail(f"MODEPROBE_CUDA must be auto, 0 or 1, got {switch!r}.")
    home = None if switch == "0" else find_cuda()
    if home is None and switch == "1":
        fail("MODEPROBE_CUDA=1, but no CUDA toolkit was found; set CUDA_HOME to the folder with bin/nvcc.")
    return home


def extension(cpp_extension, cuda: Path | None):
    sources = [CSRC / "library.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", PYTHON_TARGET)]
    compile_args = {
        "cxx": [
            "-std=c++20",
            "-O3",
            "-g0",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            "-Wall",
            "-Wno-unknown-pragmas",
        ]
    }
    library_dirs, libraries, include_dirs = [], [], [str(CSRC / "include")]
    link_args = ["-Wl,--exclude-libs,ALL"]
    if cuda:
        # torch drops CUDA_HOME on a CPU build, whatever the environment says.
        cpp_extension.CUDA_HOME = str(cuda)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0 9.0 10.0+PTX")
        sources += sorted((CSRC / "cuda").glob("*.cu"))
        macros += [("MODEPROBE_WITH_CUDA", None), ("USE_CUDA", None)]
        compile_args["nvcc"] = [
            "-std=c++20",
            "-O3",
            "-lineinfo",
            "--expt-relaxed-constexpr",
            "-Xcompiler=-fvisibility=hidden",
        ]
        include_dirs.append(str(cuda / "include"))
        # The static runtime leaves no libcudart to be found: the same wheel imports on a CPU-only torch.
        library_dirs += [
            str(path) for path in (cuda / "lib64", cuda / "targets/x86_64-linux/lib") if path.is_dir()
        ]
        libraries += ["cudart_static", "dl", "rt", "pthread"]
        # Through libtorch alone the weak symbol of csrc/cuda/runtime.h reaches libtorch_cuda; no other symbol
        # is taken from it, and the linker would leave it out.
        link_args += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    # CppExtension, not CUDAExtension: the latter links libc10_cuda, which a CPU build of torch lacks.
    return cpp_extension.CppExtension(
        "modeprobe._C",
        [str(path.relative_to(ROOT)) for path in sources],
        include_dirs=include_dirs,
        # Without these setuptools takes the library for up to date after a header has changed.
        depends=[str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.*h"))],
        define_macros=macros,
        extra_compile_args=compile_args,
        library_dirs=library_dirs,
        libraries=libraries,
        extra_link_args=link_args if sys.platform == "linux" else [],
        py_limited_api=True,
    )


def build_options() -> dict:
    if os.environ.get("MODEPROBE_EXTENSION", "1") == "0":
        return {}
    if not {"build_ext", "bdist_wheel", "editable_wheel", "build", "install", "develop"} & set(sys.argv):
        return {}  # metadata and sdist need neither torch nor a compiler
    try:
        from torch.utils import cpp_extension
    except ImportError:
        fail(NO_TORCH)

    class BuildExtension(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # Editable installs would use a fresh temporary folder; here ninja rebuilds only what changed.
            self.build_temp = str(ROOT / "build" / "objects")

        def build_extensions(self):
            # With a CPU torch the ninja rule for nvcc tracks no headers.
            headers = [*(CSRC / "include").rglob("*.*h"), *(CSRC / "cuda").glob("*.*h")]
            newest = max(path.stat().st_mtime for path in headers)
            for compiled in Path(self.build_temp, "csrc", "cuda").glob("*.o"):
                if compiled.stat().st_mtime < newest:
                    compiled.unlink()
            super().build_extensions()

    ext = extension(cpp_extension, cuda_home(os.environ.get("MODEPROBE_CUDA", "auto")))
    return {
        "ext_modules": [ext],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**build_options())

"""The shipped library: loads on a CPU-only torch, registers CUDA kernels, stays inside both stable ABIs."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modeprobe.benchmarks import kernels

from modeprobe import _extension

pytestmark = [
    pytest.mark.rung("compiler"),
    pytest.mark.skipif(not _extension.loaded(), reason=f"no compiled library: {_extension.why_not('cpu')}"),
]
needs_cuda_kernels = pytest.mark.skipif(
    kernels.library() is None,
    reason="the library has no CUDA kernels: MODEPROBE_CUDA=1 pip install --no-build-isolation -e .",
)

# What the library may need from the dynamic loader. libcudart is linked statically.
NEEDED = re.compile(
    r"(libtorch|libtorch_cpu|libtorch_python|libc10|libstdc\+\+|libm|libgcc_s|libc|libdl|librt|libpthread|libgomp)"
    r"\.so(\.\d+)?|ld-linux-.*"
)
# torch's stable C shims; everything else of torch may change with its next release.
STABLE = re.compile(r"^(aoti_torch_|torch_|shim_)")


def path():
    from modeprobe import _C

    return Path(_C.__file__)


def output(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}: install binutils")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(kind):
    lines = output("nm", "-D", kind, str(path())).splitlines()
    return [(line.split()[-2], line.split()[-1].split("@")[0]) for line in lines]


@needs_cuda_kernels
def test_cuda_implementations_are_registered():
    for operator in ("dropout", "dropout_", "dropout_mask", "fold_in", "batch_norm_train", "batch_norm_eval",
                     "batch_norm_moments", "batch_norm_merge", "batch_norm_backward",
                     "batch_norm_backward_reduce", "batch_norm_backward_input",
                     "structured_dropout", "alpha_dropout", "bias_dropout_add", "bias_dropout_add_backward",
                     "softmax_dropout", "softmax_dropout_backward"):  # fmt: skip
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"modeprobe::{operator}", "CUDA"), operator


@needs_cuda_kernels
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is a CUDA build")
def test_a_cuda_tensor_on_a_cpu_torch_is_refused_by_torch():
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(3, device="cuda")


def test_needs_no_library_that_a_cpu_torch_lacks():
    needed = set(re.findall(r"NEEDED\s+(\S+)", output("objdump", "-p", str(path()))))
    assert [name for name in needed if not NEEDED.fullmatch(name)] == []


@needs_cuda_kernels
def test_finds_the_stream_of_a_cuda_torch():
    # The weak symbol is looked up in what the library needs: libtorch leads on to libtorch_cuda, and nothing
    # else does. Without it every CUDA operator would take a CUDA build of torch for a CPU build.
    assert "libtorch.so" in output("objdump", "-p", str(path()))


def test_uses_no_symbol_of_torch_outside_its_stable_abi():
    strange, weak = [], []
    for kind, name in symbols("--undefined-only"):
        if "torch" in name or "c10" in name or "at6" in name:
            (weak if kind == "w" else strange).append(name)
    assert all(STABLE.match(name) for name in [*strange, *weak]), [n for n in strange if not STABLE.match(n)]
    # Absent from a CPU build of torch, therefore weak.
    assert set(weak) <= {"aoti_torch_get_current_cuda_stream"}


def test_exports_nothing_of_its_own_but_the_initialiser():
    exported = {name for _, name in symbols("--defined-only")}
    assert "PyInit__C" in exported
    assert [name for name in exported if "modeprobe" in name or "torch" in name] == []


def test_stays_inside_the_limited_python_api():
    if importlib.util.find_spec("abi3audit") is None:
        pytest.skip("no abi3audit: pip install abi3audit")
    done = subprocess.run(
        [sys.executable, "-m", "abi3audit", "--strict", "--assume-minimum-abi3", "3.10", str(path())],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_auditwheel_shows_a_manylinux_tag(tmp_path):
    if importlib.util.find_spec("auditwheel") is None:
        pytest.skip("no auditwheel: pip install auditwheel")
    folder, wheel = tmp_path / "tree", tmp_path / "modeprobe-0-cp310-abi3-linux_x86_64.whl"
    (folder / "modeprobe").mkdir(parents=True)
    shutil.copy(path(), folder / "modeprobe")
    info = folder / "modeprobe-0.dist-info"
    info.mkdir()
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp310-abi3-linux_x86_64\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modeprobe\nVersion: 0\n")
    (info / "RECORD").write_text(f"modeprobe/{path().name},,\n")
    archive = shutil.make_archive(str(tmp_path / "wheel"), "zip", folder)
    Path(archive).rename(wheel)
    shown = output(sys.executable, "-m", "auditwheel", "show", str(wheel))
    assert "manylinux" in shown
    assert "libcudart" not in shown

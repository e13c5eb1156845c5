import json
import platform

import pytest
import torch

import modeprobe as mp
from modeprobe import _extension
from modeprobe.ops import backend as backends

pytestmark = pytest.mark.rung("reference")


def by_place(info):
    return {(item.name, item.device): item for item in info.backends}


def test_versions_and_backends():
    info = mp.info()
    assert info.versions["modeprobe"] == mp.__version__
    assert info.versions["torch"] == torch.__version__
    assert info.versions["python"] == platform.python_version()
    assert info.cpu_threads == torch.get_num_threads()
    assert set(by_place(info)) == {
        (name, device) for name in ("native", "triton", "reference") for device in ("cpu", "cuda")
    }
    assert by_place(info)["reference", "cpu"].usable
    assert all(item.usable == (item.why_not is None) for item in info.backends)
    assert info.automatic["cpu"] == backends.resolve("cpu")
    assert by_place(info)[info.automatic["cpu"], "cpu"].usable


def test_as_dict_is_plain_data():
    info = mp.info()
    assert json.loads(json.dumps(info.as_dict())) == info.as_dict()
    assert repr(info) == str(info)


@pytest.mark.skipif(not _extension.loaded(), reason="the compiled library is not built; run: pip install .")
def test_cpu_capability_is_what_the_kernels_use():
    assert mp.info().cpu_capability == torch.ops.modeprobe.cpu_capability()
    assert f"{torch.ops.modeprobe.cpu_capability()}, " in str(mp.info())


def test_without_the_compiled_library(monkeypatch):
    monkeypatch.setattr(_extension, "_error", "libfoo.so: no such file")
    backends._automatic.cache_clear()
    try:
        info = mp.info()
    finally:
        monkeypatch.undo()
        backends._automatic.cache_clear()
    native = by_place(info)["native", "cpu"]
    assert not native.built
    assert not native.usable
    assert "libfoo.so: no such file" in native.why_not
    assert _extension.REBUILD in native.why_not
    assert info.cpu_capability is None
    assert info.automatic["cpu"] == "reference"
    assert "unknown (no compiled library)" in str(info)


def test_a_gpu_that_torch_cannot_use_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = by_place(mp.info())["reference", "cuda"]
    assert not cuda.usable
    assert "CPU build" in cuda.why_not if torch.version.cuda is None else "nvidia-smi" in cuda.why_not


def test_a_missing_extra_says_how_to_install(monkeypatch):
    find = mp.info.__globals__["importlib"].util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "sklearn" else find(name, *rest)
    )
    info = mp.info()
    assert info.extras["sklearn"] is None
    row = dict(info.rows())["scikit-learn"]
    assert "not installed" in row
    assert "pip install 'modeprobe[tour]'" in row

"""The worked example, shortened: faults cost accuracy or have a sign, and recalibration brings it back."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the example needs scikit-learn: pip install scikit-learn")
pytestmark = pytest.mark.rung("reference")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples/batchnorm_statistics.py"


@pytest.fixture(scope="module")
def rows():
    spec = importlib.util.spec_from_file_location("batchnorm_statistics", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        threads = torch.get_num_threads()
        try:
            return {row.fault: row for row in module.run(epochs=4)}
        finally:
            torch.set_num_threads(threads)


def test_recovers_within_one_point(rows):
    clean = rows["none"].moving
    assert clean > 0.95
    for row in rows.values():
        assert row.layerwise > clean - 0.011, row.fault


def test_faults_cost_accuracy(rows):
    clean = rows["none"].moving
    for fault, points in (
        ("sorted by class", 5),
        ("large last batch", 1),
        ("NaN batch", 50),
        ("batch times 1000", 50),
    ):
        assert rows[fault].moving < clean - points / 100, fault
    assert rows["NaN batch"].update_bn < 0.2  # the loader still has that batch


def test_drift_tells_them_apart(rows):
    assert not rows["none"].report.off
    causes = {fault: {layer.cause for layer in row.report.layers} - {"fits"} for fault, row in rows.items()}
    assert causes["sorted by class"] == causes["large last batch"] == {"not representative"}
    assert causes["NaN batch"] == {"not finite"}
    assert causes["batch times 1000"] == {"stale"}
    signs = {fault: " ".join(row.report.signs) for fault, row in rows.items()}
    assert "sorted or grouped" in signs["sorted by class"]
    assert "tiny" in signs["batches of 4"]
    assert "last batch has 1142 samples" in signs["large last batch"]
    assert "activation checkpointing" in signs["checkpointing"]
    assert "running variance of block1.1" in signs["batch times 1000"]
    assert signs["none"] == ""

from pathlib import Path

import pytest
import torch

REASON = "no CUDA device" if torch.version.cuda else "no CUDA device (this torch is a CPU build)"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.rung("gpu"))
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(autouse=True)
def kernels_have_ended():
    """A kernel's fault comes up in the test that launched it."""
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()

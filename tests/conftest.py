import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `from support import ...`

from support.ladder import Ladder


def pytest_configure(config):
    config.pluginmanager.register(Ladder(), "ladder")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

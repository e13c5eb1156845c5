import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `from support import ...`

from support.ladder import Ladder


def pytest_configure(config):
    config.pluginmanager.register(Ladder(), "ladder")


# Files that keep a worker busy for minutes start first, or one worker would end alone with them.
LONG = ("tests/triton/", "tests/emulator/", "tests/test_packaging", "tests/probe/", "tests/compiler/")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [not item.nodeid.startswith(part) for part in LONG])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

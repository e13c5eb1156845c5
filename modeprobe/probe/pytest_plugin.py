"""pytest plugin: the probe's assertions as fixtures. The probe is imported when a test asks for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def assert_mode_invariant() -> Callable[..., Any]:
    """`assert_mode_invariant(model, *inputs)`: train() and eval() give the same outputs."""
    from modeprobe.probe import assertions

    return assertions.assert_mode_invariant


@pytest.fixture(scope="session")
def assert_eval_deterministic() -> Callable[..., Any]:
    """`assert_eval_deterministic(model, *inputs)`: eval mode does not depend on random numbers."""
    from modeprobe.probe import assertions

    return assertions.assert_eval_deterministic


@pytest.fixture(scope="session")
def assert_modes() -> Callable[..., Any]:
    """`assert_modes(model, training, except_for={path: mode})`: every module is in the expected mode."""
    from modeprobe.probe import assertions

    return assertions.assert_modes

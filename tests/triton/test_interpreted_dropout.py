"""The interpreted kernels of the dropout family, and the operators; see test_interpreted_batch_norm.py."""

import pytest
from support.interpreted import FILES, run_interpreted

pytestmark = pytest.mark.rung("triton")


@pytest.mark.parametrize("file", [name for name in FILES if "batch_norm" not in name])
def test_in_a_process_that_interprets(file):
    run_interpreted(file)

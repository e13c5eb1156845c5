"""What the tests on a GPU share."""

import torch


def close(got, same_dtype, truth, what):
    """As near to the truth as twice the error of ``same_dtype``, and a few units in the last place."""
    eps = torch.finfo(got.dtype).eps
    allowed = 2 * (same_dtype.double() - truth).abs().max() + 4 * eps * truth.abs().max()
    if got.dtype == torch.float64:  # the truth is not longer than that
        allowed = allowed * 64
    error = (got.double() - truth).abs().max()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"

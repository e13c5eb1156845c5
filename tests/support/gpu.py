"""What the tests on a GPU share."""

import torch


def close(got, same_dtype, truth, what, *, units=4, scale=0.0):
    """As near to the truth as twice the error of ``same_dtype``, and some units in the last place.

    units: 8 where Triton divides and takes roots, in two units each. scale: of what was added up, where sums
    cancel.
    """
    eps = torch.finfo(got.dtype).eps
    largest = max(truth.abs().max().item(), scale)
    allowed = 2 * (same_dtype.double() - truth).abs().max().item() + units * eps * largest
    if got.dtype == torch.float64:  # the truth is not longer than that
        allowed *= 64
    error = (got.double() - truth).abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"

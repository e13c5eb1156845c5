"""What the tests on a GPU share."""

import torch

# Units in the last place beside twice torch's error. The same kernels on the emulator need 1.6 in float32
# and none in 16 bits. On a GPU exp is good to two units; Triton also divides (div.full) and takes roots
# (sqrt.approx) in two, and has exp from ex2.approx.
UNITS = {("native", False): 2, ("native", True): 4, ("triton", False): 5, ("triton", True): 8}
# The truth is float64 itself, by other sums: on the emulator both together are off by 21 units.
FLOAT64_UNITS = 64


def close(got, same_dtype, truth, what, *, backend="native", exp=False, scale=0.0):
    """As near to the truth as twice the error of ``same_dtype``, and some units in the last place.

    exp: whether an exponential is taken on the way. scale: of what was added up, where sums cancel.
    """
    bits = torch.finfo(got.dtype).bits
    units = FLOAT64_UNITS if bits == 64 else UNITS[backend, exp] if bits == 32 else 0
    largest = max(truth.abs().max().item(), scale)
    allowed = 2 * (same_dtype.double() - truth).abs().max().item()
    allowed += units * torch.finfo(got.dtype).eps * largest
    error = (got.double() - truth).abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"

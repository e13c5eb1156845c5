"""Arithmetic of grids and tiles on the host: Triton's own functions serve kernels, too, and take longer."""


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 0

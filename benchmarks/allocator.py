"""Where fresh tensors come from on the CPU, made the same for every contender of a race.

glibc moves two thresholds while a program runs: how large an allocation must be to be mapped anew, and how
much free memory is given back. A 25 MB output then costs 6,272 page faults or none, depending on who ran
before. Both are pinned where a long run ends up: memory below 32 MiB is used again, above it is fresh.
"""

from __future__ import annotations

import ctypes
import platform

MAP_FROM = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX of glibc on 64-bit machines, from which on it always maps
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
NEVER = -1


def give_back() -> None:
    """Returns free memory to the system before a race, or large outputs might land in what others left."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def pin() -> str:
    """Pins the thresholds for this process; returns how fresh memory is made from now on, in words."""
    if platform.libc_ver()[0] != "glibc":
        return "as the C library does"
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(M_MMAP_THRESHOLD, MAP_FROM) and mallopt(M_TRIM_THRESHOLD, NEVER)):
        return "as glibc adapts itself"
    return "used again below 32 MiB, mapped anew above"

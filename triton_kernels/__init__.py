"""Triton kernels of modeprobe and their launchers; they know torch and Triton, nothing of modeprobe."""

if __name__ != "modeprobe.triton_kernels":
    # From the repository root Python finds this folder under its bare name: a second copy of every kernel.
    raise ImportError("import this package as modeprobe.triton_kernels")

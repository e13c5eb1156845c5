"""Triton decides at import whether kernels are interpreted, so these tests need a process of their own:
support/interpreted.py starts it. Here they are collected only in such a process."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

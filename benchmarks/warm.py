"""Compiles torch.compile's peers ahead of a run, in processes side by side, into Inductor's cache on disk.

Time on a GPU is dear, and one process that compiles a hundred works one after the other uses it up. Only
compilation is taken ahead; the run sets its peers up, judges and times them as ever. A work leaves a mark in
the cache, so that nothing is started for what an earlier run compiled.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .registry import Work, all_works, distinct
from .runner import COMPILE

MOST = 12  # processes: each holds a context and a work's tensors on the GPU


def warm_up(works: Sequence[Work], device: str, limit: float) -> str:
    """Compiles the peers of ``works`` within ``limit`` seconds, first ones first. What was done, in words."""
    missing = [work for work in works if not mark(work, device).exists()]
    count = min(MOST, max(1, (os.cpu_count() or 1) * 3 // 4), len(missing))
    if not count:
        return f"{len(works)} works were compiled before"
    begin = time.monotonic()
    # Like this process, not from the working directory: -P stands before -m there.
    python = [sys.executable, *(["-P"] if "-P" in sys.orig_argv else []), "-m", f"{__package__}.warm"]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*python, "--device", device, *(work.name for work in missing[part::count])],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for part in range(count)
    ]
    for process in processes:
        end(process, begin + limit - time.monotonic())
    done = sum(mark(work, device).exists() for work in missing)
    before = f", {len(works) - len(missing)} before" if len(missing) < len(works) else ""
    return f"{done} of {len(missing)} works compiled in {time.monotonic() - begin:.0f} s{before}"


def end(process: subprocess.Popen, seconds: float) -> None:
    """Waits for a process; past the seconds it is stopped."""
    try:
        process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def mark(work: Work, device: str) -> Path:
    """The file, in Inductor's cache, that says that a work was compiled by this torch for this device."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    where = torch.cuda.get_device_name() if device == "cuda" else device
    text = "\n".join((torch.__version__, where, work.name))
    return Path(cache_dir()) / "modeprobe-warm" / hashlib.sha256(text.encode()).hexdigest()[:24]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m modeprobe.benchmarks.warm")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("works", nargs="*")
    options = parser.parse_args(arguments)
    by_name = {work.name: work for work in distinct(all_works(options.device))}
    for name in options.works:
        work = by_name[name]
        try:
            work.setup(work, options.device).candidates[COMPILE]()
        except Exception as error:  # the run will meet it again, and say so
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        made = mark(work, options.device)
        made.parent.mkdir(parents=True, exist_ok=True)
        made.touch()
        gc.collect()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

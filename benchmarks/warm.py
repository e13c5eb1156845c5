"""Compiles torch.compile's peers ahead of a run, in processes side by side, into Inductor's cache on disk.

Time on a GPU is dear, and one process that compiles a hundred works one after the other uses it up. Only
compilation is taken ahead; the run sets its peers up, judges and times them as ever.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from .registry import Work, all_works, distinct
from .runner import COMPILE

MOST = 12  # processes: each holds a context and a work's tensors on the GPU


def warm_up(works: Sequence[Work], device: str, limit: float) -> str:
    """Compiles the peers of ``works`` within ``limit`` seconds. What was done, in words."""
    count = min(MOST, max(1, (os.cpu_count() or 1) * 3 // 4), len(works))
    if not count:
        return "nothing to compile"
    begin = time.monotonic()
    # Like this process, not from the working directory: -P stands before -m there.
    python = [sys.executable, *(["-P"] if "-P" in sys.orig_argv else []), "-m", f"{__package__}.warm"]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*python, "--device", device, *(work.name for work in works[part::count])],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for part in range(count)
    ]
    ended = sum(ends(process, begin + limit - time.monotonic()) for process in processes)
    return f"{ended} of {count} processes compiled their works in {time.monotonic() - begin:.0f} s"


def ends(process: subprocess.Popen, seconds: float) -> bool:
    """Whether a process ends well within ``seconds``; past them it is stopped."""
    try:
        return process.wait(max(0.1, seconds)) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False


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
        gc.collect()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

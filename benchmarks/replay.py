"""Calls replayed from a CUDA graph: what a work's kernels take, without the host that launches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .registry import Candidate

WARM_UPS = 3  # on a side stream, as torch asks for before a capture
MOST_CALLS = 10  # in one graph, so that little of a replay is its own launch


def captured(candidate: Candidate, calls: int) -> Candidate:
    """A candidate whose run replays ``calls`` calls of ``candidate`` and returns the last one's results.

    Inputs stay where they are; what a call allocates, gradients included, is in the graph's own memory. A
    backward pass belongs to the graph only with its forward pass.

    Raises:
        RuntimeError: something in the call cannot be captured, such as a wait for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with candidate.context():
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                candidate.run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            for _ in range(calls - 1):
                candidate.run()
            results = candidate.run()
    torch.cuda.synchronize()
    return Candidate(replayed(graph, results), note=f"{calls} calls in one graph" if calls > 1 else "")


def replayed(graph: Any, results: Any) -> Callable[[], Any]:
    def run() -> Any:
        graph.replay()
        return results

    return run


def calls_in_a_graph(seconds: float, sample_seconds: float) -> int:
    """As many calls of ``seconds`` each as a sample has room for."""
    return max(1, min(MOST_CALLS, int(sample_seconds / max(seconds, 1e-9))))

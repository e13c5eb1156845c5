"""torch.compile as a peer that is proven to run compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .registry import Unavailable


class CompiledPeer:
    """``function`` under torch.compile with Inductor, without graph breaks.

    Call :meth:`warm_up` before timing: it compiles, and raises :class:`Unavailable` unless Inductor was
    really handed a graph and a further call was served without compiling again. Nothing of the check
    stays in the timed path.
    """

    def __init__(self, function: Callable[..., Any]):
        self.graphs = 0
        self.operations = 0
        torch.compiler.reset()
        self.call = torch.compile(function, backend=self._backend, fullgraph=True, dynamic=False)

    def _backend(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.graphs += 1
        self.operations += sum(node.op.startswith("call") for node in graph.graph.nodes)
        return compile_fx(graph, inputs)

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Compile by calling ``run``, which calls this peer, and make sure that it did.

        Raises:
            Unavailable: the compiler was never asked (disabled, or it fell back to eager), or each
                call compiles anew.
        """
        run()
        if not self.graphs or not self.operations:
            raise Unavailable(
                "torch.compile compiled nothing (is TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE set?)"
            )
        run()
        before = self.graphs
        try:
            # Under this stance a call that finds no compiled code raises instead of compiling.
            with torch.compiler.set_stance("fail_on_recompile"):
                run()
        except RuntimeError as error:
            raise Unavailable(f"torch.compile compiles again at each call: {first_line(error)}") from error
        if self.graphs != before:
            raise Unavailable("torch.compile compiled again after warming up")


def first_line(error: BaseException, limit: int = 160) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:limit]

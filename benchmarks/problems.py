"""From a function per provider to a problem: inputs, gradients, floors, peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._functorch import config as functorch_config

from . import rivals
from .compiled import CompiledPeer
from .registry import Candidate, Problem, Unavailable, Work, with_context

Function = Callable[..., torch.Tensor]


def random_tensor(work: Work, device: str, seed: int = 0) -> torch.Tensor:
    """Standard normal values in the work's shape, type and layout."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, work.dtype)
    values = torch.empty(work.shape, dtype=dtype, device=device)
    if work.layout == "channels_last":
        layout = torch.channels_last if len(work.shape) == 4 else torch.channels_last_3d
        values = values.contiguous(memory_format=layout)
    return values.normal_(generator=generator)


def floors(work: Work, x: torch.Tensor) -> dict[str, Callable[[], Candidate]]:
    """Plain passes over the input: a multiply and a copy into fresh memory, a copy into existing memory.

    ``x * 2`` goes the way of the work (backward included); the two copies are always one pass each way.
    """
    plain = x.detach()
    target = torch.empty_like(plain)
    source = leaf(plain) if work.mode in ("backward", "forward_backward") else plain
    gradient = torch.ones_like(plain) if source.requires_grad else None
    return {
        "x * 2": lambda: mode_candidate(work.mode, lambda value: value * 2, [source], [source], gradient),
        "x.clone()": lambda: Candidate(plain.clone),
        "y.copy_(x)": lambda: Candidate(lambda: target.copy_(plain)),
    }


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def mode_candidate(
    mode: str,
    function: Function,
    inputs: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    gradient: torch.Tensor | None,
) -> Candidate:
    """``function(*inputs)`` in a mode.

    "forward" and "evaluation" run without grad and return ``(y,)``; "forward_backward" returns ``(y,
    *gradients of wanted)``; "backward" runs one forward pass now and times the gradients alone.
    """
    if mode in ("forward", "evaluation"):
        return Candidate(lambda: (function(*inputs),), context=torch.no_grad)
    if mode == "forward_backward":

        def both() -> tuple[torch.Tensor, ...]:
            y = function(*inputs)
            return (y, *torch.autograd.grad(y, wanted, gradient))

        return Candidate(both, forward=lambda: function(*inputs))
    if mode == "backward":
        y = function(*inputs)
        return Candidate(
            lambda: (y, *torch.autograd.grad(y, wanted, gradient, retain_graph=True)),
            forward=lambda: function(*inputs),
        )
    raise ValueError(f"mode must be forward, evaluation, backward or forward_backward, got {mode!r}")


def problem(
    work: Work,
    x: torch.Tensor,
    functions: dict[str, Callable[[], tuple[Function, Sequence[torch.Tensor]]]],
    inputs: Sequence[torch.Tensor],
    verify: Callable[[Any], str | None],
) -> Problem:
    """A problem from one setup per provider.

    Args:
        x: the tensor that the floors run over.
        functions: ``"modeprobe"`` and ``"torch"``: a setup that returns the function and its own
            parameters. Triton is the first under another backend, torch.compile the second compiled.
        inputs: what the functions are called with; those that require grad are differentiated.
        verify: judges ``(y, *gradients)``, gradients of the inputs first, then of the parameters.
    """
    backward = work.mode in ("backward", "forward_backward")
    gradient = output_gradient(x) if backward else None

    def build(setup: Callable[[], tuple[Function, Sequence[torch.Tensor]]]) -> Candidate:
        function, parameters = setup()
        wanted = [tensor for tensor in (*inputs, *parameters) if tensor.requires_grad]
        return mode_candidate(work.mode, function, inputs, wanted, gradient)

    def modeprobe(backend: str) -> Candidate:
        with modeprobe_backend(backend, x.device.type)():
            candidate = build(functions["modeprobe"])
        return with_context(candidate, modeprobe_backend(backend, x.device.type))

    def triton() -> Candidate:
        if work.replays:
            raise Unavailable("not measured in lists of layers")  # which cost minutes of a GPU as it is
        return modeprobe("triton")

    def compiled() -> Candidate:
        if not work.compiled:
            raise Unavailable("not compiled for this row")
        function, parameters = functions["torch"]()
        peer = CompiledPeer(function)
        wanted = [tensor for tensor in (*inputs, *parameters) if tensor.requires_grad]
        # "backward" runs again over one graph, whose buffers must not have been given away.
        with functorch_config.patch(donated_buffer=work.mode != "backward"):
            candidate = mode_candidate(work.mode, peer, inputs, wanted, gradient)
            with candidate.context():
                if work.mode == "backward" and candidate.forward:
                    peer.warm_up(candidate.forward)
                    candidate.run()
                else:
                    peer.warm_up(candidate.run)
        return candidate

    candidates: dict[str, Callable[[], Candidate]] = {
        "modeprobe": lambda: modeprobe("native"),
        "modeprobe triton": triton,
        "torch": lambda: build(functions["torch"]),
        "torch.compile": compiled,
    }
    candidates.update(rivals.candidates(work, x.device.type, functions, build))
    return Problem(candidates, verify, floors(work, x))


def output_gradient(x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(x.device).manual_seed(1)
    return torch.empty_like(x.detach()).normal_(generator=generator)


def package() -> Any:
    """modeprobe, imported when a work is set up: what it lacks shows as that row's failure."""
    import modeprobe

    return modeprobe


def modeprobe_backend(name: str, device: str) -> Callable[[], AbstractContextManager]:
    """A context that selects a backend of modeprobe.

    Raises:
        Unavailable: the backend cannot run on ``device``; a Triton interpreter does not count.
    """
    from modeprobe.ops import backend

    if name == "triton" and device != "cuda":
        raise Unavailable("Triton kernels run on CUDA tensors")
    reason = backend.why_not(name, device)
    if reason:
        raise Unavailable(reason)
    return lambda: backend.backend(name)

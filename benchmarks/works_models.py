"""Whole models: one training step before and after `modeprobe.swap`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import models
from .compiled import CompiledPeer
from .problems import modeprobe_backend, package, random_tensor
from .registry import Candidate, Problem, Unavailable, Work


def model_problem(build: Callable[[], torch.nn.Module], exact: bool) -> Callable[[Work, str], Problem]:
    """A training step of a model: forward, loss, backward, SGD with momentum.

    Args:
        build: makes the model.
        exact: the model has no dropout, so that the first step's loss can be compared in training mode;
            otherwise the outputs in evaluation mode are.
    """

    def setup(work: Work, device: str) -> Problem:
        x = random_tensor(work, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            original = build().to(device, getattr(torch, work.dtype))
        if work.layout == "channels_last":
            original = original.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        expected = first_value(copy.deepcopy(original), x, exact)

        def step(model: torch.nn.Module, call: Callable[..., Any] | None = None) -> Candidate:
            model.train()
            forward = call or model
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
            seen = first_value(copy.deepcopy(model), x, exact)

            def run() -> tuple[torch.Tensor, torch.Tensor]:
                optimizer.zero_grad(set_to_none=True)
                loss = models.loss_of(forward(x))
                loss.backward()
                optimizer.step()
                return seen, loss.detach()

            return Candidate(run, forward=lambda: models.loss_of(forward(x)))

        def swapped(backend: str, fuse: bool) -> Candidate:
            context = modeprobe_backend(backend, x.device.type)
            model = copy.deepcopy(original)
            if fuse:
                package().swap(model, fuse=True)
            else:
                package().swap(model)
            with context():
                candidate = step(model)
            candidate.context = context
            return candidate

        def compiled() -> Candidate:
            if not work.compiled:
                raise Unavailable("not compiled for this row")
            model = copy.deepcopy(original)
            peer = CompiledPeer(model)
            candidate = step(model, peer)
            peer.warm_up(candidate.run)
            return candidate

        def verify(results: Sequence[Any]) -> str | None:
            seen, loss = results
            if not torch.isfinite(loss):
                return f"loss is {loss.item()}"
            error = (seen - expected).abs().max().item()
            allowed = 1e-4 * float(expected.abs().max()) if work.dtype == "float32" else 0.05
            what = "loss of the first step" if exact else "output in evaluation mode"
            return f"{what} is off by {error:.3g}" if not error <= allowed else None

        return Problem(
            {
                "modeprobe": lambda: swapped("native", False),
                "modeprobe fused": lambda: swapped("native", True),
                "modeprobe triton": lambda: swapped("triton", False),
                "torch": lambda: step(copy.deepcopy(original)),
                "torch.compile": compiled,
            },
            verify,
        )

    return setup


def first_value(model: torch.nn.Module, x: torch.Tensor, exact: bool) -> torch.Tensor:
    with torch.no_grad():
        output = model.train(exact)(x)
        return models.loss_of(output) if exact else output.float()


def model_works(device: str) -> Iterator[Work]:
    """Bytes are not counted for models: the matrix products decide, and ``passes`` is 0.

    torch.compile is a peer where it takes seconds: a GPU's ResNet-50 takes it a minute.
    """
    large = device == "cuda"
    dtype = "bfloat16" if large else "float32"
    yield Work(
        "model mlp",
        "step",
        (8192, 1024) if large else (1024, 256),
        dtype,
        0,
        model_problem(lambda: models.mlp(1024 if large else 256), exact=False),
        groups=("models",),
        compiled=True,
    )
    yield Work(
        "model gpt2_block",
        "step",
        (16, 1024, 768) if large else (4, 128, 768),
        dtype,
        0,
        model_problem(models.GPTBlock, exact=False),
        groups=("models",),
        compiled=True,
    )
    for layout in ("contiguous", "channels_last"):
        yield Work(
            "model resnet",
            "step",
            (64, 3, 224, 224) if large else (8, 3, 64, 64),
            dtype,
            0,
            model_problem(
                (lambda: models.ResNet())
                if large
                else (lambda: models.ResNet(depths=(2, 2, 2, 2), width=32, classes=100)),
                exact=True,
            ),
            layout=layout,
            groups=("models",),
        )

"""Works of the dropout family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from . import judge
from .problems import Function, leaf, output_gradient, package, problem, random_tensor
from .registry import Candidate, Problem, Work

P = 0.1  # not a dyadic fraction: the contract's tie test is needed, as in any language model
SCALE = 1.0 / (1.0 - P)

# torch.nn.functional.alpha_dropout: the dropped value is -scale * alpha of SELU, then an affine map
# brings mean and variance back (Klambauer et al., 2017).
ALPHA = -1.7580993408473766
ALPHA_A = ((1 - P) * (1 + P * ALPHA**2)) ** -0.5
ALPHA_B = -ALPHA_A * ALPHA * P

Setup = Callable[[], tuple[Function, Sequence[torch.Tensor]]]


def plain(function: Function) -> Setup:
    return lambda: (function, ())


def differentiable(work: Work, tensor: torch.Tensor) -> torch.Tensor:
    return leaf(tensor) if work.mode in ("backward", "forward_backward") else tensor


def flat_fault(
    results: Sequence[Any], x: torch.Tensor, kept: Any, dropped: float, slope: float
) -> str | None:
    """Judges an elementwise dropout with independent draws: values, share, gradient of the same mask."""
    y = results[0]
    fault = judge.same_kind(y, x)
    if fault:
        return fault
    for window in judge.windows(x.numel()):
        part = x.detach().reshape(-1)[window].double()
        values = kept(part), torch.full_like(part, dropped)
        fault, keep = judge.choice(y.reshape(-1)[window], *values)
        fault = fault or judge.share(keep, P, judge.told_apart(x.dtype, *values))
        if fault is None and len(results) > 1:
            got = results[1].reshape(-1)[window]
            gradient = output_gradient(x).reshape(-1)[window].double() * slope
            keep = judge.keep_by_gradient(keep, *values, got, gradient)
            want = torch.where(keep, gradient, 0.0)
            fault = judge.close("gradient", got, want, judge.tolerance(x.dtype, gradient))
        if fault:
            return fault
    return None


def dropout(work: Work, device: str) -> Problem:
    x = differentiable(work, random_tensor(work, device))

    def modeprobe() -> tuple[Function, Sequence[torch.Tensor]]:
        function = package().functional.dropout
        return lambda value: function(value, P), ()

    return problem(
        work,
        x,
        {"modeprobe": modeprobe, "torch": plain(lambda value: F.dropout(value, P))},
        [x],
        lambda results: flat_fault(results, x, lambda part: part * SCALE, 0.0, SCALE),
    )


def dropout_inplace(work: Work, device: str) -> Problem:
    """Each provider works on a buffer of its own, which its first call turns into dropout(x)."""
    x = random_tensor(work, device)

    def modeprobe() -> tuple[Function, Sequence[torch.Tensor]]:
        function, buffer = package().functional.dropout, x.clone()
        return lambda _: function(buffer, P, inplace=True), ()

    def eager() -> tuple[Function, Sequence[torch.Tensor]]:
        buffer = x.clone()
        return lambda _: F.dropout(buffer, P, inplace=True), ()

    built = problem(
        work,
        x,
        {"modeprobe": modeprobe, "torch": eager},
        [x],
        lambda results: flat_fault(results, x, lambda part: part * SCALE, 0.0, SCALE),
    )
    buffer = x.clone()
    built.floors["x * 2"] = lambda: Candidate(lambda: buffer.mul_(1.0))
    return built


def alpha_dropout(work: Work, device: str) -> Problem:
    x = differentiable(work, random_tensor(work, device))

    def modeprobe() -> tuple[Function, Sequence[torch.Tensor]]:
        return package().nn.AlphaDropout(P), ()

    return problem(
        work,
        x,
        {"modeprobe": modeprobe, "torch": plain(torch.nn.AlphaDropout(P))},
        [x],
        lambda results: flat_fault(
            results, x, lambda part: ALPHA_A * part + ALPHA_B, ALPHA_A * ALPHA + ALPHA_B, ALPHA_A
        ),
    )


def dropout2d(work: Work, device: str) -> Problem:
    x = differentiable(work, random_tensor(work, device))

    def modeprobe() -> tuple[Function, Sequence[torch.Tensor]]:
        return package().nn.Dropout2d(P), ()

    def verify(results: Sequence[Any]) -> str | None:
        y = results[0]
        values = x.detach().double()
        fault = judge.same_kind(y, x)
        if fault:
            return fault
        fault, keep = judge.choice(y, values * SCALE, torch.zeros_like(values))
        if fault:
            return fault
        channels = keep.flatten(2)
        if (channels.any(-1) != channels.all(-1)).any():
            return "a channel is kept in part"
        fault = judge.share(channels.all(-1), P)
        if fault is None and len(results) > 1:
            want = torch.where(keep, output_gradient(x).double() * SCALE, 0.0)
            fault = judge.close("gradient", results[1], want, judge.tolerance(x.dtype, want))
        return fault

    return problem(work, x, {"modeprobe": modeprobe, "torch": plain(torch.nn.Dropout2d(P))}, [x], verify)


def bias_dropout_add(work: Work, device: str) -> Problem:
    """residual + dropout(x + bias), bias over the last dimension."""
    x = differentiable(work, random_tensor(work, device))
    residual = differentiable(work, random_tensor(work, device, seed=2))
    bias = differentiable(work, random_tensor(work, device, seed=3)[0].clone())

    def modeprobe() -> tuple[Function, Sequence[torch.Tensor]]:
        function = package().functional.bias_dropout_add
        return lambda value, shift, other: function(value, shift, other, P), ()

    def verify(results: Sequence[Any]) -> str | None:
        y = results[0]
        fault = judge.same_kind(y, x)
        if fault:
            return fault
        base, shifted = residual.detach().double(), (x.detach() + bias.detach()).double()
        values = base + shifted * SCALE, base
        # In 16 bits each of the three steps of the composition rounds.
        fault, keep = judge.choice(y, *values, 32.0)
        fault = fault or judge.share(keep, P, judge.told_apart(x.dtype, *values, 32.0))
        if fault is None and len(results) > 1:
            gradient = output_gradient(x).double()
            keep = judge.keep_by_gradient(keep, *values, results[1], gradient * SCALE)
            want = torch.where(keep, gradient * SCALE, 0.0)
            fault = (
                judge.close("x gradient", results[1], want, judge.tolerance(x.dtype, want))
                or judge.close(
                    "bias gradient",
                    results[2],
                    want.sum(0),
                    16 * torch.finfo(x.dtype).eps * float(want.abs().sum(0).max()),
                )
                or judge.close("residual gradient", results[3], gradient, 0.0)
            )
        return fault

    return problem(
        work,
        x,
        {
            "modeprobe": modeprobe,
            "torch": plain(lambda value, shift, other: other + F.dropout(value + shift, P)),
        },
        [x, bias, residual],
        verify,
    )


def softmax_dropout(work: Work, device: str) -> Problem:
    """dropout(softmax(scores, -1)): attention probabilities."""
    scores = differentiable(work, random_tensor(work, device))

    def modeprobe() -> tuple[Function, Sequence[torch.Tensor]]:
        function = package().functional.softmax_dropout
        return lambda value: function(value, P), ()

    def verify(results: Sequence[Any]) -> str | None:
        y = results[0]
        fault = judge.same_kind(y, scores)
        if fault:
            return fault
        share = torch.softmax(scores.detach()[:1].double(), -1)
        values = share * SCALE, torch.zeros_like(share)
        fault, keep = judge.choice(y[:1], *values, 64.0)
        fault = fault or judge.share(keep, P, judge.told_apart(scores.dtype, *values, 64.0))
        if fault is None and len(results) > 1:
            inner = torch.where(keep, output_gradient(scores)[:1].double() * SCALE, 0.0)
            want = share * (inner - (share * inner).sum(-1, keepdim=True))
            fault = judge.close(
                "gradient", results[1][:1], want, 8 * torch.finfo(scores.dtype).eps * float(want.abs().max())
            )
        return fault

    return problem(
        work,
        scores,
        {
            "modeprobe": modeprobe,
            "torch": plain(lambda value: F.dropout(torch.softmax(value, -1), P)),
        },
        [scores],
        verify,
    )


def target_works(device: str) -> Iterator[Work]:
    """A GPU gets tensors that do not fit its cache; what fits one is over before the host's next call."""
    yield from large_works() if device == "cuda" else cpu_works()
    for mode, passes in (("forward", 2), ("forward_backward", 4)):
        yield Work("dropout", mode, (16,), "float32", passes, dropout, compiled=True)


def cpu_works() -> Iterator[Work]:
    yield from (
        Work("dropout", "forward", (1 << power,), dtype, 2, dropout, compiled=True)
        for power in (20, 24)
        for dtype in ("float32", "bfloat16")
    )
    yield Work("dropout_inplace", "forward", (1 << 24,), "float32", 2, dropout_inplace, unit="y.copy_(x)")
    for power in (20, 24):
        yield Work("dropout", "forward_backward", (1 << power,), "float32", 4, dropout, compiled=True)
    for family, mode, shape, passes, setup in FUSED:
        yield Work(family, mode, shape, "float32", passes, setup, compiled=True)


def large_works() -> Iterator[Work]:
    for dtype, power in (("float32", 26), ("bfloat16", 27), ("float32", 28), ("bfloat16", 29)):
        for mode, passes in (("forward", 2), ("backward", 2), ("forward_backward", 4)):
            yield Work("dropout", mode, (1 << power,), dtype, passes, dropout, compiled=True)
    for dtype in ("float32", "bfloat16"):
        for family, mode, shape, passes, setup in LARGE:
            yield Work(family, mode, shape, dtype, passes, setup, compiled=True)


# A dropped channel of Dropout2d is not read. The softmax saves its probabilities: a pass more when
# gradients are wanted. bias_dropout_add returns the residual's gradient as it came.
FUSED = [
    ("dropout2d", "forward", (32, 64, 56, 56), 2 - P, dropout2d),
    ("dropout2d", "forward_backward", (32, 64, 56, 56), 4 - 2 * P, dropout2d),
    ("alpha_dropout", "forward", (1 << 22,), 2, alpha_dropout),
    ("alpha_dropout", "forward_backward", (1 << 22,), 4, alpha_dropout),
    ("bias_dropout_add", "forward", (1 << 12, 1 << 10), 3, bias_dropout_add),
    ("bias_dropout_add", "forward_backward", (1 << 12, 1 << 10), 5, bias_dropout_add),
    ("softmax_dropout", "forward", (8, 12, 256, 256), 2, softmax_dropout),
    ("softmax_dropout", "forward_backward", (8, 12, 256, 256), 6, softmax_dropout),
]


LARGE = [
    ("alpha_dropout", "forward", (1 << 26,), 2, alpha_dropout),
    ("alpha_dropout", "forward_backward", (1 << 26,), 4, alpha_dropout),
    ("bias_dropout_add", "forward", (1 << 14, 1 << 12), 3, bias_dropout_add),
    ("bias_dropout_add", "forward_backward", (1 << 14, 1 << 12), 5, bias_dropout_add),
    ("softmax_dropout", "forward", (32, 16, 512, 512), 2, softmax_dropout),
    ("softmax_dropout", "forward_backward", (32, 16, 512, 512), 6, softmax_dropout),
]


def size_works(device: str) -> Iterator[Work]:
    powers = range(12, 31, 2) if device == "cuda" else range(4, 27, 2)
    dtypes = ["float32", "bfloat16"] if device == "cuda" else ["float32"]
    for dtype in dtypes:
        for power in powers:
            yield Work("dropout", "forward", (1 << power,), dtype, 2, dropout, groups=("dropout sizes",))

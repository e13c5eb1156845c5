"""Works of the BatchNorm family, ResNet-50's layers among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from . import judge
from .problems import Function, leaf, output_gradient, package, problem, random_tensor
from .registry import EAGER, Problem, Work

Setup = Callable[[], tuple[Function, Sequence[torch.Tensor]]]

# The 53 BatchNorm layers of ResNet-50 at 224 x 224: (channels, height and width, how many).
# He et al., Deep Residual Learning for Image Recognition, 2015, table 1.
RESNET50 = [
    (64, 112, 1),
    (64, 56, 6),
    (256, 56, 4),
    (128, 56, 1),
    (128, 28, 7),
    (512, 28, 5),
    (256, 28, 1),
    (256, 14, 11),
    (1024, 14, 7),
    (512, 14, 1),
    (512, 7, 5),
    (2048, 7, 4),
]


def layer_class(namespace: Any, shape: Sequence[int]) -> Any:
    return {2: namespace.BatchNorm1d, 3: namespace.BatchNorm1d, 4: namespace.BatchNorm2d}[len(shape)]


def prepared(layer: Any, work: Work, device: str) -> Any:
    """The same weights and statistics in every provider's layer; parameters in float32."""
    layer = layer.to(device)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for tensor, low, high in (
            (layer.weight, 0.5, 1.5),
            (layer.bias, -0.5, 0.5),
            (layer.running_mean, -0.5, 0.5),
            (layer.running_var, 0.5, 1.5),
        ):
            values = torch.empty(tensor.shape).uniform_(low, high, generator=generator)
            tensor.copy_(values)
    return layer.eval() if work.mode == "evaluation" else layer.train()


@dataclass
class Reference:
    """The work in float64 by plain torch; ``gradients`` are those of input, residual, weight and bias."""

    y: torch.Tensor
    before: torch.Tensor
    inputs: list[torch.Tensor]

    def gradients(self, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.before, self.inputs, gradient, retain_graph=True)


def reference(work: Work, x: torch.Tensor, layer: Any, residual: torch.Tensor | None) -> Reference:
    double = [leaf(tensor.detach().double()) for tensor in (x, layer.weight, layer.bias)]
    evaluation = work.mode == "evaluation"
    before = F.batch_norm(
        double[0],
        layer.running_mean.double() if evaluation else None,
        layer.running_var.double() if evaluation else None,
        double[1],
        double[2],
        training=not evaluation,
        eps=layer.eps,
    )
    if residual is None:
        return Reference(before.detach(), before, double)
    shortcut = leaf(residual.detach().double())
    before = before + shortcut
    return Reference(torch.relu(before).detach(), before, [double[0], shortcut, *double[1:]])


def verifier(
    work: Work, device: str, x: torch.Tensor, residual: torch.Tensor | None = None
) -> Callable[[Any], str | None]:
    """Compares with float64, allowing four times the error that torch makes in the work's type.

    After a ReLU the gradient is judged for the sign that the provider's own output has: next to zero,
    rounding decides it.
    """
    names = ["y", "input gradient", *(["residual gradient"] if residual is not None else [])]
    names += ["weight gradient", "bias gradient"]
    backward = work.mode in ("backward", "forward_backward")
    made: list[Reference] = []
    errors: list[float] = []

    def expected(y: torch.Tensor) -> list[torch.Tensor]:
        truth = made[0]
        if not backward:
            return [truth.y]
        gradient = output_gradient(x).double()
        return [truth.y, *truth.gradients(gradient if residual is None else gradient * (y.detach() > 0))]

    def measure_torch() -> None:
        layer = prepared(layer_class(torch.nn, work.shape)(work.shape[1]), work, device)
        made.append(reference(work, x, layer, residual))
        with torch.set_grad_enabled(backward):
            y = layer(x) if residual is None else torch.relu(layer(x) + residual)
        own = [y]
        if backward:
            inputs = [x, *([residual] if residual is not None else [])]
            own += torch.autograd.grad(y, [*inputs, layer.weight, layer.bias], output_gradient(x))
        errors.extend(
            float((mine.detach().double() - want).abs().max()) if want.numel() else 0.0
            for mine, want in zip(own, expected(y), strict=True)
        )

    def verify(results: Sequence[Any]) -> str | None:
        with torch.enable_grad():
            if not made:
                measure_torch()
            fault = judge.same_kind(results[0], x)
            if fault:
                return fault
            truth = expected(results[0])
        return judge.against_reference(names[: len(truth)], results, truth, errors, x.dtype)

    return verify


def differentiable(work: Work, tensor: torch.Tensor) -> torch.Tensor:
    return leaf(tensor) if work.mode in ("backward", "forward_backward") else tensor


def batch_norm(work: Work, device: str) -> Problem:
    x = differentiable(work, random_tensor(work, device))

    def setup(namespace: Callable[[], Any]) -> Setup:
        def build() -> tuple[Function, Sequence[torch.Tensor]]:
            layer = prepared(layer_class(namespace(), work.shape)(work.shape[1]), work, device)
            return layer, tuple(layer.parameters())

        return build

    return problem(
        work,
        x,
        {"modeprobe": setup(modeprobe_nn), "torch": setup(lambda: torch.nn)},
        [x],
        verifier(work, device, x),
    )


def batch_norm_add_relu(work: Work, device: str) -> Problem:
    """relu(batch_norm(x) + residual), the end of a residual block."""
    x = differentiable(work, random_tensor(work, device))
    residual = differentiable(work, random_tensor(work, device, seed=2))

    def modeprobe() -> tuple[Function, Sequence[torch.Tensor]]:
        layer = modeprobe_nn().BatchNorm2d(work.shape[1], activation="relu")
        layer = prepared(layer, work, device)
        return layer, tuple(layer.parameters())

    def eager() -> tuple[Function, Sequence[torch.Tensor]]:
        layer = prepared(torch.nn.BatchNorm2d(work.shape[1]), work, device)
        return lambda value, other: torch.relu(layer(value) + other), tuple(layer.parameters())

    return problem(
        work,
        x,
        {"modeprobe": modeprobe, "torch": eager},
        [x, residual],
        verifier(work, device, x, residual),
    )


def modeprobe_nn() -> Any:
    return package().nn


LAYOUTS = ("contiguous", "channels_last")
PASSES = {"forward": 3, "backward": 5, "forward_backward": 8, "evaluation": 2}


def norm(mode: str, shape: tuple[int, ...], dtype: str = "float32", **options: Any) -> Work:
    return Work("batch_norm", mode, shape, dtype, PASSES[mode], batch_norm, **options)


def add_relu(mode: str, shape: tuple[int, ...], dtype: str = "float32", **options: Any) -> Work:
    """Reads x twice and the residual, writes y; backward reads x and dy twice, writes two gradients."""
    passes = {"forward": 4, "forward_backward": 10}[mode]
    return Work("batch_norm_add_relu", mode, shape, dtype, passes, batch_norm_add_relu, **options)


def target_works(device: str) -> Iterator[Work]:
    yield from large_works() if device == "cuda" else cpu_works()
    for mode in ("forward", "forward_backward"):
        yield norm(mode, (4, 16), compiled=True)


def cpu_works() -> Iterator[Work]:
    for shape in ((32, 64, 56, 56), (8, 64, 112, 112), (32, 256, 14, 14)):
        for mode in ("forward", "forward_backward"):
            for layout in LAYOUTS:
                yield norm(mode, shape, layout=layout, compiled=True)
    yield norm("forward_backward", (4096, 256), compiled=True)
    for layout in LAYOUTS:
        yield norm("evaluation", (32, 64, 56, 56), layout=layout, compiled=True)
        yield norm("forward_backward", (32, 64, 56, 56), "bfloat16", layout=layout, compiled=True)
        yield add_relu("forward_backward", (32, 64, 56, 56), layout=layout, compiled=True)


def large_works() -> Iterator[Work]:
    for dtype in ("float32", "bfloat16"):
        for layout in LAYOUTS:
            for mode in ("forward", "backward", "forward_backward", "evaluation"):
                yield norm(mode, (256, 64, 112, 112), dtype, layout=layout, compiled=True)
            yield add_relu("forward_backward", (256, 64, 56, 56), dtype, layout=layout, compiled=True)


def layer_works(device: str) -> Iterator[Work]:
    """Every distinct BatchNorm of ResNet-50, forward and backward, in both layouts."""
    batches = (256, 32) if device == "cuda" else (8,)
    dtypes = ("bfloat16", "float32") if device == "cuda" else ("float32",)
    for dtype in dtypes:
        for batch in batches:
            for layout in LAYOUTS:
                group = f"ResNet-50 layers, batch {batch}, {dtype}, {layout}"
                for channels, side, count in RESNET50:
                    yield norm(
                        "forward_backward",
                        (batch, channels, side, side),
                        dtype,
                        layout=layout,
                        groups=(group + EAGER if device == "cuda" else group,),
                        count=count,
                        compiled=device == "cuda",
                        replays=device == "cuda",
                    )


def size_works(device: str) -> Iterator[Work]:
    """64 channels: on a CPU from 2^6 elements on, as a linear layer's output at first, then as an image."""
    shapes: list[tuple[int, ...]] = [(4, 16), (16, 64)]
    shapes += [(4, 64, side, side) for side in (4, 8, 16, 32)]
    shapes += [(1 << power, 64, 32, 32) for power in (4, 6, 8, 10)]
    if device == "cuda":
        shapes = [(1 << power, 64, 32, 32) for power in (2, 5, 8, 11, 14)]
    for dtype in ("float32", "bfloat16") if device == "cuda" else ("float32",):
        for shape in shapes:
            for layout in LAYOUTS if len(shape) == 4 else LAYOUTS[:1]:
                yield norm("forward", shape, dtype, layout=layout, groups=("batch_norm sizes",))

"""Question 2: which statistics does BatchNorm use in evaluation, and how good is the moving average?"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeprobe.statistics import recalibrate
from modeprobe.swap import swap
from modeprobe.tour.section import Advance, no_progress, percent

NEEDS = {"sklearn": "scikit-learn"}
SOURCES = ("batch statistics", "moving average", "full pass")
VERSIONS = ("torch", "modeprobe")
# Falls to 0 over the run, as schedules do: late weights move little, and the average can follow them.
LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; the defaults are the tour's."""

    epochs: int = 8
    batch: int = 64
    seed: int = 0
    # The share of the images to train on, the rest is for testing.
    train_share: float = 0.8
    # Optimizer steps after which all three kinds of statistics are tried.
    early: tuple[int, ...] = (5, 15, 46)
    # Accuracy with batch statistics is also told for batches this small.
    small_batch: int = 4

    # Full passes are taken after each of the first steps and then after every third.
    watch_all: int = 24
    watch_every: int = 3

    @property
    def steps(self) -> int:
        return self.epochs


@dataclass
class Run:
    """One training run: ``accuracy[step][source]`` on the test images, and the time of each step."""

    model: nn.Module
    accuracy: dict[int, dict[str, float]] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Training time in all."""
        return sum(self.step_seconds)

    @property
    def median_step(self) -> float:
        """Seconds of a typical step, whatever the warm-up and the machine's other work cost."""
        return statistics.median(self.step_seconds)


@dataclass(frozen=True)
class Approach:
    """How the moving average nears the full-pass value.

    ``training``: after each of ``steps`` of training, the mean over all channels of |moving average of the
    mean - full-pass mean| / full-pass standard deviation, both for the weights of that step. ``frozen``: the
    same after steps 1, 2, ... that gather statistics afresh, from (0, 1) on, under the trained weights.
    ``momentum`` is m of the update: the average still carries (1 - m)^n of where it started.
    ``channel_moving`` and ``channel_full`` are the mean of one channel of the last layer, at ``steps``.
    """

    steps: list[int]
    training: list[float]
    frozen: list[float]
    momentum: float
    channel_moving: list[float]
    channel_full: list[float]


@dataclass(frozen=True)
class Result:
    train_images: int
    test_images: int
    steps: int
    layers: int
    runs: dict[str, Run]
    small_batch: int
    small_batch_accuracy: float
    approach: Approach

    @property
    def final(self) -> dict[str, dict[str, float]]:
        """Accuracy at the end of training, by version and source of the statistics."""
        return {name: run.accuracy[self.steps] for name, run in self.runs.items()}

    @property
    def answer(self) -> str:
        ours, theirs = self.runs["modeprobe"], self.runs["torch"]
        # The early step at which the two sources differ most.
        shown = max(ours.accuracy, key=lambda n: abs(_gain(ours.accuracy[n])))
        then, last, torchs = ours.accuracy[shown], ours.accuracy[self.steps], theirs.accuracy[self.steps]
        return (
            "In evaluation BatchNorm uses the moving average that training left behind. With the weights "
            f"after {shown} steps it gives {percent(then['moving average'])} where a full pass over the "
            f"training set gives {percent(then['full pass'])}; after {self.steps} steps it gives "
            f"{percent(last['moving average'])} against {percent(last['full pass'])}. Trained from the same "
            f"weights, torch's layers reach {percent(torchs['moving average'])} in "
            f"{theirs.seconds:.2f} s, the swapped ones {percent(last['moving average'])} in "
            f"{ours.seconds:.2f} s."
        )


def _gain(accuracy: dict[str, float]) -> float:
    return accuracy["full pass"] - accuracy["moving average"]


def network() -> nn.Sequential:
    """A small convolutional network for (N, 1, 8, 8) images of ten classes."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 1), (32, 64, 2)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10))


def digits(train_share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's handwritten digits: images (N, 1, 8, 8) in [0, 1] and labels, to train and to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    split = round(train_share * len(labels))
    return images[:split], labels[:split], images[split:], labels[split:]


def batches(images: Tensor, labels: Tensor, size: int, generator: torch.Generator):
    """One epoch in random order; a last batch of one, too few for BatchNorm, joins the one before."""
    order = torch.randperm(len(labels), generator=generator)
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    for part in parts:
        yield images[part], labels[part]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """One step of training; returns its seconds."""
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    return time.perf_counter() - start


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose BatchNorm layers normalise each batch by its own statistics."""
    model = copy.deepcopy(model).eval()
    for norm in norms(model):
        norm.train()
    return model


def with_full_pass(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy in evaluation mode whose running statistics are those of all ``images``, for these weights."""
    model = copy.deepcopy(model).eval()
    recalibrate(model, [images], progress=False)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> float:
    found = torch.cat([model(part).argmax(1) for part in images.split(batch)])
    return (found == labels).float().mean().item()


def accuracies(model: nn.Module, data: tuple[Tensor, ...], batch: int) -> dict[str, float]:
    """Test accuracy of the same weights with each source of statistics."""
    train_images, _, images, labels = data
    versions = (
        with_batch_statistics(model),
        copy.deepcopy(model).eval(),
        with_full_pass(model, train_images),
    )
    return {
        source: accuracy(version, images, labels, batch)
        for source, version in zip(SOURCES, versions, strict=True)
    }


def mean_of(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def variance_of(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_var is not None
    return norm.running_var


def distance(model: nn.Module, full: nn.Module) -> float:
    """Mean over all channels of |running mean - full-pass mean| in full-pass standard deviations."""
    shifts = []
    for norm, exact in zip(norms(model), norms(full), strict=True):
        std = (variance_of(exact) + exact.eps).sqrt()
        shifts.append((mean_of(norm) - mean_of(exact)).abs() / std)
    return torch.cat(shifts).mean().item()


def frozen_approach(
    model: nn.Module, data: tuple[Tensor, ...], steps: int, batch: int, seed: int
) -> list[float]:
    """Distances while statistics are gathered afresh under final weights."""
    images, labels = data[:2]
    full = with_full_pass(model, images)
    model = with_batch_statistics(model)
    for norm in norms(model):
        norm.reset_running_stats()
    generator = torch.Generator().manual_seed(seed)
    distances: list[float] = []
    with torch.no_grad():
        while len(distances) < steps:
            for part, _ in batches(images, labels, batch, generator):
                model(part)
                distances.append(distance(model, full))
    return distances[:steps]


def train_both(
    settings: Settings,
    data: tuple[Tensor, ...],
    after_step: Callable[[int, nn.Module], None],
    advance: Advance,
) -> tuple[dict[str, Run], int]:
    """Train the network with torch's layers and swapped, from the same weights on the same batches.

    The two take turns by step, so that what else the machine does meets both alike. ``after_step`` sees
    each step of the swapped network, outside the timing.
    """
    torch.manual_seed(settings.seed)
    model = network()
    total = settings.epochs * len(list(batches(data[0], data[1], settings.batch, torch.Generator())))
    runs = {name: Run(copy.deepcopy(model)) for name in VERSIONS}
    swap(runs["modeprobe"].model)
    optimizers = {
        name: torch.optim.Adam(run.model.parameters(), lr=LEARNING_RATE) for name, run in runs.items()
    }
    done = 0
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        for images, labels in batches(data[0], data[1], settings.batch, generator):
            rate = LEARNING_RATE * (1 - done / total)
            done += 1
            for name, run in runs.items():
                optimizers[name].param_groups[0]["lr"] = rate
                run.step_seconds.append(train_step(run.model, optimizers[name], images, labels))
                if done in settings.early:
                    run.accuracy[done] = accuracies(run.model, data, settings.batch)
            after_step(done, runs["modeprobe"].model)
        advance()
    for run in runs.values():
        run.accuracy[done] = accuracies(run.model, data, settings.batch)
    return runs, done


def compute(settings: Settings = Settings(), advance: Advance = no_progress) -> Result:
    """Train both networks and compare the three sources of statistics, on one thread: images are 8 x 8."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _compute(settings, advance)
    finally:
        torch.set_num_threads(threads)


def _compute(settings: Settings, advance: Advance) -> Result:
    data = digits(settings.train_share)
    steps: list[int] = []
    distances: list[float] = []
    channel: tuple[list[float], list[float]] = ([], [])

    def watch(step: int, model: nn.Module) -> None:
        if step > settings.watch_all and step % settings.watch_every:
            return
        full = with_full_pass(model, data[0])
        steps.append(step)
        distances.append(distance(model, full))
        for values, version in zip(channel, (model, full), strict=True):
            values.append(mean_of(norms(version)[-1])[0].item())

    runs, total = train_both(settings, data, watch, advance)
    model = runs["modeprobe"].model
    small = accuracy(with_batch_statistics(model), data[2], data[3], settings.small_batch)
    approach = Approach(
        steps=steps,
        training=distances,
        frozen=frozen_approach(model, data, total, settings.batch, settings.seed),
        momentum=norms(model)[0].momentum or 0.0,
        channel_moving=channel[0],
        channel_full=channel[1],
    )
    return Result(
        train_images=len(data[0]),
        test_images=len(data[2]),
        steps=total,
        layers=len(norms(model)),
        runs=runs,
        small_batch=settings.small_batch,
        small_batch_accuracy=small,
        approach=approach,
    )

"""Six ways to spoil BatchNorm's running statistics, what `drift` says and what `recalibrate` does about it.

A small network learns scikit-learn's handwritten digits. Its last epoch is run once as it should
be and once with each fault; the weights are nearly the same, only the statistics differ. Every fault is then
looked at and repaired with the very loader that it came with: still sorted, still in tiny batches, still with
the NaN batch in it. torch's own `update_bn` gets the same loader.

    python examples/batchnorm_statistics.py            the table
    python examples/batchnorm_statistics.py --html D   also one drift report per fault, in folder D
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import modeprobe as mp

Batches = list[tuple[Tensor, Tensor]]


class Network(nn.Module):
    """Three hidden layers with BatchNorm for (N, 64) images; `checkpointed` recomputes the second."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2, self.block3 = self._block(64, 96), self._block(96, 96), self._block(96, 64)
        self.head = nn.Linear(64, 10)
        self.checkpointed = False

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(x)
        x = checkpoint(self.block2, x, use_reentrant=False) if self.checkpointed else self.block2(x)
        return self.head(self.block3(x))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 64) in [0, 1] and labels, to train and to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


def shuffled(images: Tensor, labels: Tensor, size: int, seed: int) -> Batches:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = [part for part in order.split(size) if len(part) > 1]  # BatchNorm cannot train on one
    return [(images[part], labels[part]) for part in parts]


def sorted_by_class(images: Tensor, labels: Tensor) -> Batches:
    order = labels.argsort(stable=True)
    return [(images[part], labels[part]) for part in order.split(16) if len(part) > 1]


def large_last_batch(images: Tensor, labels: Tensor) -> Batches:
    """The digits 0 and 1 in batches of 16, then all others at once: four fifths of the data, one update."""
    few = labels < 2
    small = shuffled(images[few], labels[few], 16, seed=1)
    return [*small, (images[~few], labels[~few])]


def poisoned(images: Tensor, labels: Tensor, factor: float) -> Batches:
    """The last batch came out of the sensor multiplied by `factor`."""
    batches = shuffled(images, labels, 64, seed=1)
    x, y = batches[-1]
    return [*batches[:-1], (x * factor, y)]


def train(model: nn.Module, batches: Batches, rates: Iterator[float]) -> None:
    """One epoch. Steps on values beyond [0, 1] are skipped, as a GradScaler skips what overflows."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in batches:
        for group in optimizer.param_groups:
            group["lr"] = next(rates)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if x.abs().max() <= 1:
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(images).argmax(1) == labels).float().mean().item()


def right(output: Tensor, batch: tuple[Tensor, Tensor]) -> float:
    return (output.argmax(1) == batch[1]).float().mean().item()


@dataclass
class Row:
    fault: str
    moving: float
    update_bn: float
    one_pass: float
    layerwise: float
    report: mp.statistics.DriftReport


def run(epochs: int = 6, last_rate: float = 2e-4) -> list[Row]:
    """The clean row first. Accuracies are of the test set, in evaluation mode."""
    images, labels, *test = digits()
    torch.set_num_threads(1)  # the network is too small to share
    torch.manual_seed(0)
    model = Network()
    steps = (epochs - 1) * len(shuffled(images, labels, 64, 0))
    rates = iter(0.1 * (1 - step / steps) + last_rate for step in range(steps))
    for epoch in range(epochs - 1):
        train(model, shuffled(images, labels, 64, seed=10 + epoch), rates)

    clean = shuffled(images, labels, 64, seed=1)
    faults = {
        "none": clean,
        "sorted by class": sorted_by_class(images, labels),
        "batches of 4": shuffled(images, labels, 4, seed=1),
        "large last batch": large_last_batch(images, labels),
        "NaN batch": poisoned(images, labels, float("nan")),
        "batch times 1000": poisoned(images, labels, 1000.0),
        "checkpointing": clean,
    }
    rows = []
    for name, batches in faults.items():
        faulty = copy.deepcopy(model)
        faulty.checkpointed = name == "checkpointing"
        torch.manual_seed(1)
        train(faulty, batches, iter(lambda: last_rate, None))
        faulty.checkpointed = False
        if name == "batch times 1000":  # found and thrown out of the data by now
            batches = batches[:-1]
        report = mp.drift(faulty, batches, metric=right)
        rows.append(Row(name, accuracy(faulty, *test), *repaired(faulty, batches, test), report))
    return rows


def repaired(model: nn.Module, batches: Batches, test: list[Tensor]) -> tuple[float, float, float]:
    """Accuracy after torch's update_bn and after both kinds of recalibration."""
    theirs, one_pass, layerwise = (copy.deepcopy(model) for _ in range(3))
    update_bn(batches, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # names the NaN batch that is left out
        mp.recalibrate(one_pass, batches)
        mp.recalibrate(layerwise, batches, layerwise=True)
    return accuracy(theirs, *test), accuracy(one_pass, *test), accuracy(layerwise, *test)


def explanation(row: Row) -> str:
    """What drift says, in a few words."""
    off = row.report.off
    return f"{off[0].cause} ({len(off)} of {len(row.report.layers)} layers)" if off else "fits"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--html", type=Path, metavar="D", help="folder for one drift report per fault")
    folder = parser.parse_args().html
    rows = run()
    head = ("last epoch", "moving average", "update_bn", "recalibrate", "layerwise", "drift says")
    print("{:18} {:>14} {:>10} {:>12} {:>10}   {}".format(*head))
    for row in rows:
        values = (row.moving, row.update_bn, row.one_pass, row.layerwise)
        cells = [f"{value:{width}.1%}" for value, width in zip(values, (14, 10, 12, 10), strict=True)]
        print(f"{row.fault:18} {' '.join(cells)}   {explanation(row)}")
    for row in rows:
        for sign in row.report.signs:
            print(f"{row.fault}: {sign}")
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{row.fault.replace(' ', '-')}.html"
            path.write_text(row.report.to_html(), encoding="utf-8")


if __name__ == "__main__":
    main()

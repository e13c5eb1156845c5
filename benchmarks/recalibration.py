"""What a pass of recalibration costs, as ratios to a plain forward pass over the same loader.

    python -m benchmarks.recalibration [--channels-last] [--device cuda]

The network is a small ResNet (two BatchNorm layers per block); rounds are interleaved and the least time of
each counts, so that what else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import modeprobe as mp


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu_()
        return (self.norm2(self.conv2(y)) + self.skip(x)).relu_()


def network(width: int = 32) -> nn.Module:
    blocks = [Block(width << i >> (i > 0), width << i, 1 + (i > 0)) for i in range(4)]
    return nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), *blocks)


def plain(model: nn.Module, loader: list[Tensor]) -> None:
    with torch.no_grad():
        for batch in loader:
            model(batch)


def measure(works: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Least seconds of each work over interleaved rounds, after one that does not count."""
    best = dict.fromkeys(works, float("inf"))
    for number in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    options = parser.parse_args()
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    torch.manual_seed(0)
    model = network().to(device=options.device, memory_format=layout)  # type: ignore[call-overload]
    shape = (16, 3, options.size, options.size)
    loader = [torch.randn(shape).to(options.device, memory_format=layout) for _ in range(4)]
    swapped = copy.deepcopy(model)
    mp.swap(swapped)
    evaluated, trained = copy.deepcopy(model).eval(), copy.deepcopy(model)
    times = measure(
        {
            "plain forward (torch, evaluation)": lambda: plain(evaluated, loader),
            "plain forward (torch, training)": lambda: plain(trained, loader),
            "update_bn": lambda: update_bn(loader, trained),
            "recalibrate": lambda: mp.recalibrate(model, loader, progress=False),
            "recalibrate, swapped": lambda: mp.recalibrate(swapped, loader, progress=False),
            "recalibrate, plain torch": lambda: reference(model, loader),
            "drift without effect": lambda: mp.drift(model, loader, effect=False, progress=False),
        },
        options.device,
        options.rounds,
    )
    base = times["plain forward (torch, evaluation)"]
    for name, seconds in times.items():
        print(f"{name:36} {1e3 * seconds / len(loader):8.2f} ms per batch  {seconds / base:5.2f}x")


def reference(model: nn.Module, loader: list[Tensor]) -> None:
    with mp.backend("reference"):
        mp.recalibrate(model, loader, progress=False)


if __name__ == "__main__":
    main()

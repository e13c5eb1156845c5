"""What a pass of recalibration costs, as ratios to a plain forward pass over the same loader.

    python -m benchmarks.recalibration [--channels-last] [--device cuda]

Three plain passes stand below the line: torch's evaluation forward; the evaluation forward of the same model,
which for a swapped one runs modeprobe's kernels; and its training forward, which also needs the statistics of
every batch. The network is a small ResNet (two BatchNorm layers per block). On a CPU one thread works and its
processor time counts, on a GPU wall time. Rounds are interleaved, and a ratio is the median over the rounds
of the two times of one round, so that what else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

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


def measure(works: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in every round; one round before does not count."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            start = clock()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append(clock() - start)
    return times


def ratio(times: dict[str, list[float]], work: str, base: str) -> float:
    return median(a / b for a, b in zip(times[work], times[base], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    options = parser.parse_args()
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    if options.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    model = network().to(device=options.device, memory_format=layout)  # type: ignore[call-overload]
    shape = (16, 3, options.size, options.size)
    loader = [torch.randn(shape).to(options.device, memory_format=layout) for _ in range(4)]
    swapped = copy.deepcopy(model)
    mp.swap(swapped)

    def of(name: str, model: nn.Module) -> dict[str, Callable[[], object]]:
        evaluated, trained, averaged = (copy.deepcopy(model) for _ in range(3))
        evaluated.eval()
        return {
            f"{name}: evaluation forward": lambda: plain(evaluated, loader),
            f"{name}: training forward": lambda: plain(trained, loader),
            f"{name}: update_bn": lambda: update_bn(loader, averaged),
            f"{name}: recalibrate": lambda: mp.recalibrate(model, loader, progress=False),
            f"{name}: drift without effect": lambda: mp.drift(model, loader, effect=False, progress=False),
        }

    works = of("torch", model) | of("swapped", swapped)
    works["torch: recalibrate, reference backend"] = lambda: reference(model, loader)
    times = measure(works, options.device, options.rounds)
    print(f"{'':38} {'per batch':>11}   as many times as the evaluation forward   the training forward")
    print(f"{'':38} {'':>11}   {'of torch':>19}{'of the same model':>20}   {'of the same model':>20}")
    for name in works:
        kind = name.split(":")[0]
        bases = "torch: evaluation forward", f"{kind}: evaluation forward", f"{kind}: training forward"
        a, b, c = (ratio(times, name, base) for base in bases)
        milliseconds = 1e3 * min(times[name]) / len(loader)
        print(f"{name:38} {milliseconds:8.2f} ms   {a:18.2f}x{b:19.2f}x   {c:19.2f}x")


def reference(model: nn.Module, loader: list[Tensor]) -> None:
    with mp.backend("reference"):
        mp.recalibrate(model, loader, progress=False)


if __name__ == "__main__":
    main()

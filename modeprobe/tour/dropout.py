"""Question 1: where does dropout scale, does it matter, and what does it cost?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from modeprobe import functional, mask, nn
from modeprobe.ops import backend as backends
from modeprobe.tour.section import Advance, count, faster, interleaved, listed, milliseconds, no_progress

SCALINGS = ("inverted", "classic")
WORKS = ("F.dropout", "modeprobe", "x * 2", "copy")

# docs/contract.md: (seed, stream), the first eight 16-bit draws, which of 64 elements p = 0.1 keeps.
VECTORS = (
    (
        (0, 0),
        (59605, 26151, 50573, 57705, 44108, 48215, 56280, 39680),
        "0111111111101111111111111011011110111111110111111111111011111111",
    ),
    (
        (1234, 5),
        (8649, 51753, 63083, 13122, 53158, 45554, 7992, 38405),
        "1101111111111111111111101111111111101111111111010110111111111111",
    ),
)
# Kept of the first 2^22 elements with seed 1234, stream 5.
COUNTS = ((0.1, 3_774_657), (1 / 3, 2_795_527))
# p = 0.5, 32 elements from i = 2^35 + 3 on.
FAR = (2**35 + 3, "01101101101100110111000011111101")


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; the defaults are the tour's."""

    p: tuple[float, ...] = (0.1, 0.5)
    elements: int = 2**20
    speed_elements: tuple[int, ...] = (2**12, 2**14, 2**16, 2**18, 2**20, 2**22, 2**24)
    speed_p: float = 0.1
    speed_seconds: float = 0.8

    @property
    def steps(self) -> int:
        return len(self.p) + 1 + len(self.speed_elements)


@dataclass(frozen=True)
class Means:
    """Mean output of one convention over ones, in both modes."""

    scaling: str
    p: float
    training: float
    evaluation: float


@dataclass(frozen=True)
class Check:
    """One line of the mask contract, checked on one backend."""

    backend: str
    what: str
    passed: bool


@dataclass(frozen=True)
class Speed:
    """Seconds per call, by work, for ``elements`` float32 on the CPU."""

    elements: int
    seconds: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times F.dropout's time is that of modeprobe's dropout."""
        return self.seconds["F.dropout"] / self.seconds["modeprobe"]


@dataclass(frozen=True)
class Result:
    elements: int
    speed_p: float
    threads: int
    means: tuple[Means, ...]
    checks: tuple[Check, ...]
    speeds: tuple[Speed, ...]

    @property
    def answer(self) -> str:
        seconds = self.speeds[-1].seconds
        by = {(row.scaling, row.p): row for row in self.means}
        p = self.means[0].p
        inverted, classic = by["inverted", p], by["classic", p]
        failed = sum(not check.passed for check in self.checks)
        contract = (
            f"All {len(self.checks)} checks of the mask contract hold"
            if not failed
            else f"{failed} of {len(self.checks)} checks of the mask contract FAILED"
        )
        used = listed(sorted({check.backend for check in self.checks}))
        top = self.speeds[-1]
        return (
            f"Both conventions keep the mean the same in training and in evaluation (p = {p:g}, input of "
            f"ones): inverted {inverted.training:.3f} and {inverted.evaluation:.3f}, classic "
            f"{classic.training:.3f} and {classic.evaluation:.3f}; inverted leaves nothing to do in "
            f"evaluation. {contract} ({used}). "
            f"For {top.elements:,} elements it takes {milliseconds(seconds['modeprobe'])}, "
            f"{faster(top.ratio)} than F.dropout ({milliseconds(seconds['F.dropout'])}), where "
            f"x.clone() takes {milliseconds(seconds['copy'])}, on {count(self.threads, 'thread')}."
        )


def means(p: float, elements: int) -> list[Means]:
    """Mean output of the inverted and the classic convention over ones, in both modes."""
    ones = torch.ones(elements)
    rows = []
    for scaling in SCALINGS:
        layer = nn.Dropout(p, scaling=scaling)
        training, evaluation = layer.train()(ones), layer.eval()(ones)
        rows.append(Means(scaling, p, training.mean().item(), evaluation.mean().item()))
    return rows


def kept(elements: int, p: float, key: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Which of ``elements`` ones dropout keeps: the kernel itself is asked, not a mask function."""
    return functional.dropout(torch.ones(elements, device=key.device), p, key=key, offset=offset) != 0


def bits(kept: torch.Tensor) -> str:
    return "".join("01"[bit] for bit in kept.tolist())


def places() -> list[tuple[str, str]]:
    """(backend, device) pairs that work here. Triton only on a GPU: its interpreter would take minutes."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return [
        (name, device)
        for device in devices
        for name in ("native", "triton", "reference")
        if (name, device) != ("triton", "cpu") and backends.why_not(name, device) is None
    ]


def check_contract() -> list[Check]:
    """Every vector of the mask contract, on every backend and device that work here."""
    checks = [
        Check(
            "reference", f"draws u(0..7) of key {key}", mask.draws(mask.key(*key), 8).tolist() == list(draws)
        )
        for key, draws, _ in VECTORS
    ]
    for name, device in places():
        where = name if device == "cpu" else f"{name} on {device}"
        with backends.backend(name):
            for key, _, expected in VECTORS:
                found = bits(kept(64, 0.1, mask.key(*key, device)))
                checks.append(Check(where, f"mask of key {key} at p = 0.1", found == expected))
            far = mask.key(1234, 5, device)
            for p, number in COUNTS:
                right = int(kept(2**22, p, far).sum()) == number
                checks.append(Check(where, f"{number:,} of 2^22 kept at p = {p:.3g}", right))
            offset, expected = FAR
            right = bits(kept(32, 0.5, far, offset)) == expected
            checks.append(Check(where, "mask from element 2^35 + 3 on", right))
    return checks


def speed(elements: int, p: float, seconds: float) -> Speed:
    """Time per call of the forward pass, output freshly allocated, against the floor of any such pass."""
    x = torch.randn(elements)
    repeat = max(1, 2**16 // elements)
    with torch.no_grad():
        works: dict[str, Callable[[], object]] = {
            "F.dropout": lambda: F.dropout(x, p),
            "modeprobe": lambda: functional.dropout(x, p),
            "x * 2": lambda: x * 2,
            "copy": lambda: x.clone(),
        }
        return Speed(elements, interleaved(works, seconds, repeat))


def compute(settings: Settings = Settings(), advance: Advance = no_progress) -> Result:
    """Compare the conventions, check the mask contract, and measure speed."""
    rows = []
    for p in settings.p:
        rows += means(p, settings.elements)
        advance()
    checks = check_contract()
    advance()
    speeds = []
    for elements in settings.speed_elements:
        speeds.append(speed(elements, settings.speed_p, settings.speed_seconds))
        advance()
    return Result(
        elements=settings.elements,
        speed_p=settings.speed_p,
        threads=torch.get_num_threads(),
        means=tuple(rows),
        checks=tuple(checks),
        speeds=tuple(speeds),
    )

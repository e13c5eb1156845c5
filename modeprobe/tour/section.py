"""What the three parts of the tour have in common."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Called once per finished step of a section, for a progress bar.
Advance = Callable[[], None]


def no_progress() -> None:
    pass


@dataclass(frozen=True)
class Missing:
    """A section that could not run, or a chart that could not be drawn, for want of packages."""

    packages: tuple[str, ...]

    @property
    def message(self) -> str:
        names = " and ".join(self.packages)
        verb = "is" if len(self.packages) == 1 else "are"
        return f"{names} {verb} not installed. Run: pip install 'modeprobe[tour]'"


def missing(packages: dict[str, str]) -> Missing | None:
    """Which of the packages (name to install, by name to import) are not there."""
    absent = tuple(name for module, name in packages.items() if importlib.util.find_spec(module) is None)
    return Missing(absent) if absent else None


def interleaved(
    works: dict[str, Callable[[], object]], seconds: float, repeat: int = 1, at_least: int = 5
) -> dict[str, float]:
    """Shortest seconds per call of each work.

    Works take turns, so that what else the machine does meets all of them alike; the shortest time is the one
    that it disturbed least. Every other round goes backwards: a work that frees much leaves the next one to
    fetch its memory anew, and must not be followed by the same one each time. The first round, which warms
    up, is not counted; rounds go on for ``seconds``, ``at_least`` so many.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds <= at_least or time.perf_counter() < end:
        for name, work in list(works.items())[:: 1 if rounds % 2 else -1]:
            start = time.perf_counter()
            for _ in range(repeat):
                work()
            if rounds:
                times[name].append((time.perf_counter() - start) / repeat)
        rounds += 1
    return {name: min(values) for name, values in times.items()}


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.3f} ms" if value < 1 else f"{value:.2f} ms" if value < 100 else f"{value:.0f} ms"


def faster(ratio: float) -> str:
    """A ratio of speeds in words."""
    return f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"


def count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """Words as a sentence lists them: "a", "a and b", "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

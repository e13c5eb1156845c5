"""What this installation of modeprobe can use on this machine, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from modeprobe import _extension
from modeprobe._version import __version__
from modeprobe.ops import backend as backends

# What each optional package is for, and the extra that installs it.
OPTIONAL = {
    "triton": ("Triton kernels", "triton"),
    "transformers": ("probing and touring language models", "tour"),
    "sklearn": ("the tour's handwritten digits", "tour"),
    "matplotlib": ("charts", "tour"),
}
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators on one type of device.

    Attributes:
        name: ``"native"``, ``"triton"`` or ``"reference"``.
        device: ``"cpu"`` or ``"cuda"``.
        built: whether its code is part of this installation.
        usable: whether an operator can run on it now.
        why_not: why it cannot, and what to do; None if it can.
    """

    name: str
    device: str
    built: bool
    usable: bool
    why_not: str | None


@dataclass(frozen=True)
class Info:
    """Versions, devices and backends. ``str(info)`` is a table; :meth:`as_dict` is plain data.

    Attributes:
        versions: version by package, of modeprobe, Python, torch and its CUDA (None for a CPU build).
        platform: operating system and processor architecture.
        cpu_capability: vector instructions that the CPU kernels use (``"avx512"``, ``"avx2"`` or
            ``"portable"``); None without the compiled library.
        cpu_threads: threads that torch, and so the CPU kernels, use.
        gpus: name and compute capability of each visible CUDA device.
        backends: every backend on every type of device.
        automatic: the backend that ``"auto"`` picks, by device type; devices not there are left out.
        extras: version of each optional package; None when it is not installed.
    """

    versions: dict[str, str | None]
    platform: str
    cpu_capability: str | None
    cpu_threads: int
    gpus: tuple[str, ...]
    backends: tuple[Backend, ...]
    automatic: dict[str, str]
    extras: dict[str, str | None]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists, strings and numbers, for JSON."""
        data = asdict(self)
        data["gpus"], data["backends"] = list(data["gpus"]), list(data["backends"])
        return data

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) pairs, in the order in which the table shows them, without the backends."""
        capability = self.cpu_capability or "unknown (no compiled library)"
        forced = os.environ.get("MODEPROBE_CPU_CAPABILITY")
        if forced and self.cpu_capability:
            capability += f" (MODEPROBE_CPU_CAPABILITY={forced})"
        cuda = self.versions["cuda"]
        return [
            ("modeprobe", str(self.versions["modeprobe"])),
            ("Python", f"{self.versions['python']} on {self.platform}"),
            ("torch", f"{self.versions['torch']} ({'CUDA ' + cuda if cuda else 'CPU build'})"),
            ("CPU kernels", f"{capability}, {self.cpu_threads} thread{'s' * (self.cpu_threads != 1)}"),
            ("GPUs", ", ".join(self.gpus) or "none visible"),
            *[
                (
                    _DISTRIBUTIONS.get(name, name),
                    version or f"not installed ({use}); run: pip install 'modeprobe[{extra}]'",
                )
                for (name, (use, extra)), version in zip(OPTIONAL.items(), self.extras.values(), strict=True)
            ],
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(what) for what, _ in rows)
        lines = [f"{what:<{width}}  {value}" for what, value in rows]
        lines.append("")
        lines.append(f"{'backend':<10} {'device':<7} {'built':<6} usable")
        for item in self.backends:
            chosen = " (automatic choice)" if self.automatic.get(item.device) == item.name else ""
            state = "yes" + chosen if item.usable else f"no: {item.why_not}"
            lines.append(f"{item.name:<10} {item.device:<7} {'yes' if item.built else 'no':<6} {state}")
        return "\n".join(lines)

    __repr__ = __str__  # what a prompt shows


def info() -> Info:
    """Report versions, the CPU instructions in use, and which backends can be used here and why not others.

    Returns:
        An :class:`Info`; ``print(mp.info())`` shows it as a table. ``modeprobe info`` prints the same.
    """
    gpus = _gpus()
    rows = []
    for name in backends.BACKENDS[1:]:
        for device in ("cpu", "cuda"):
            why_not = backends.why_not(name, device)
            if why_not is None and device == "cuda" and not gpus:
                why_not = _no_gpu()
            rows.append(Backend(name, device, _built(name, device), why_not is None, why_not))
    return Info(
        versions={
            "modeprobe": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
        },
        platform=f"{platform.system()} {platform.machine()}",
        cpu_capability=torch.ops.modeprobe.cpu_capability() if _extension.loaded() else None,
        cpu_threads=torch.get_num_threads(),
        gpus=gpus,
        backends=tuple(rows),
        automatic={device: backends._automatic(device) for device in ("cpu", *["cuda"] * bool(gpus))},
        extras={name: _version(name) for name in OPTIONAL},
    )


def _built(name: str, device: str) -> bool:
    if name == "native":
        return _extension.built_for(device)
    return True if name == "reference" else backends.triton_installed()


def _gpus() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return tuple(found)


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return "this torch is a CPU build; install a CUDA build of torch to use a GPU"
    return "torch sees no CUDA device; check nvidia-smi and CUDA_VISIBLE_DEVICES"


def _version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"

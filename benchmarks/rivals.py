"""Other packages with dropout or BatchNorm kernels, measured when they can be imported."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .registry import Candidate, Unavailable, Work, with_context

Build = Callable[[Callable[[], Any]], Candidate]
Functions = dict[str, Callable[[], Any]]
Setups = dict[str, Callable[[], Candidate]]


@dataclass(frozen=True)
class Rival:
    """A package: its import name, the families it has, and how a work is set up with it."""

    module: str
    distribution: str
    families: tuple[str, ...]
    setup: Callable[[Work, Functions, Build], Candidate] | None
    remark: str = ""


def flag_gems(work: Work, functions: Functions, build: Build) -> Candidate:
    """FlagGems replaces ATen operators inside a context: the torch function, under it."""
    gems: Any = importlib.import_module("flag_gems")
    with gems.use_gems():
        candidate = build(functions["torch"])
    return with_context(candidate, gems.use_gems)


def inplace_abn(work: Work, functions: Functions, build: Build) -> Candidate:
    """InPlaceABN overwrites its input, which a plain BatchNorm must not: it gets a copy."""
    if work.mode == "evaluation" or work.dtype == "bfloat16" or len(work.shape) != 4:
        raise Unavailable("inplace_abn has no such layer")
    package: Any = importlib.import_module("inplace_abn")

    def setup() -> Any:
        ours, parameters = functions["torch"]()
        layer = package.InPlaceABN(work.shape[1], activation="identity").to(next(iter(parameters)).device)
        layer.load_state_dict(ours.state_dict(), strict=False)
        return lambda value: layer(value.clone()), tuple(layer.parameters())

    candidate = build(setup)
    candidate.note = "on a copy of its input, which it overwrites"
    return candidate


def apex(work: Work, functions: Functions, build: Build) -> Candidate:
    """apex.contrib.groupbn: float16, channels_last."""
    if work.dtype != "float16" or work.layout != "channels_last" or work.mode == "evaluation":
        raise Unavailable("apex.contrib.groupbn takes float16 channels_last only")
    package: Any = importlib.import_module("apex.contrib.groupbn.batch_norm")

    def setup() -> Any:
        ours, _ = functions["torch"]()
        layer = package.BatchNorm2d_NHWC(work.shape[1], fuse_relu=False).cuda()
        layer.load_state_dict(ours.state_dict(), strict=False)
        return (lambda value: layer(value.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), tuple(layer.parameters())

    return build(setup)


def xformers(work: Work, functions: Functions, build: Build) -> Candidate:
    """xformers.triton.dropout, removed from xformers in June 2024."""
    if not present("xformers.triton.dropout"):
        raise Unavailable("this version of xformers has no fused dropout (removed in 2024)")
    package: Any = importlib.import_module("xformers.triton.dropout")
    from .works_dropout import P

    return build(lambda: (lambda value: package.dropout(value, P), ()))


RIVALS = {
    "FlagGems": Rival(
        "flag_gems",
        "flag_gems",
        ("dropout", "dropout_inplace", "alpha_dropout", "softmax_dropout", "batch_norm"),
        flag_gems,
        "CUDA only",
    ),
    "inplace_abn": Rival("inplace_abn", "inplace-abn", ("batch_norm",), inplace_abn),
    "apex": Rival("apex.contrib.groupbn", "apex", ("batch_norm",), apex, "CUDA, float16 channels_last only"),
    "xformers": Rival("xformers", "xformers", ("dropout",), xformers, "CUDA only"),
    "Liger-Kernel": Rival("liger_kernel", "liger-kernel", (), None, "has neither dropout nor BatchNorm"),
    "flash-attn": Rival(
        "flash_attn", "flash-attn", (), None, "has dropout only inside attention and layer norm"
    ),
}


def installed(rival: Rival) -> bool:
    return present(rival.module)


def present(module: str) -> bool:
    """Whether a module is there, working or not: looking for it imports the packages around it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
    except Exception:  # a package that breaks when it is imported shows its message in its own row
        return True


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def states() -> dict[str, str]:
    """For each rival: its version and what limits it here, or that it is not installed."""
    found = {}
    for name, rival in RIVALS.items():
        if not installed(rival):
            found[name] = "not installed" if rival.setup else f"not installed; {rival.remark}"
        else:
            found[name] = f"{version(rival.distribution) or 'version unknown'}" + (
                f"; {rival.remark}" if rival.remark else ""
            )
    return found


def candidates(
    work: Work, device: str, functions: Functions, build: Build
) -> dict[str, Callable[[], Candidate]]:
    """A setup for each installed rival that has the work's family and runs on the device."""
    found: Setups = {}
    for name, rival in RIVALS.items():
        setup = rival.setup
        if setup is None or work.family not in rival.families or not installed(rival):
            continue
        if device != "cuda" and "CUDA" in rival.remark:
            continue
        found[name] = lambda setup=setup: setup(work, functions, build)  # type: ignore[misc]
    return found

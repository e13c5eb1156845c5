"""What is wrong with a provider's result, in words: compared in float64, before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

WINDOW = 1 << 18  # elements looked at from either end of a large flat tensor
SIGMAS = 6.0


def windows(elements: int) -> list[slice]:
    """The whole of a small flat tensor, both ends of a large one."""
    if elements <= 2 * WINDOW:
        return [slice(0, elements)]
    return [slice(0, WINDOW), slice(elements - WINDOW, elements)]


def same_kind(y: object, like: torch.Tensor) -> str | None:
    if not isinstance(y, torch.Tensor):
        return f"returned {type(y).__name__}, not a tensor"
    if y.shape != like.shape:
        return f"shape is {tuple(y.shape)}, expected {tuple(like.shape)}"
    if y.dtype != like.dtype:
        return f"dtype is {y.dtype}, expected {like.dtype}"
    return None


def tolerance(dtype: torch.dtype, size: torch.Tensor, roundings: float = 4.0) -> torch.Tensor:
    """``roundings`` units in the last place of ``dtype`` at each value of ``size`` (float64)."""
    info = torch.finfo(dtype)
    return roundings * info.eps * size.abs() + info.tiny


def choice(
    y: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor, roundings: float = 4.0
) -> tuple[str | None, torch.Tensor]:
    """Whether each element of y is the kept or the dropped value (float64), and which.

    Returns:
        What is wrong or None, and the bool mask of the kept elements; where the two values are too close
        to tell, the gradient has to (:func:`keep_by_gradient`).
    """
    value = y.detach().double()
    to_kept, to_dropped = (value - kept).abs(), (value - dropped).abs()
    keep = to_kept <= to_dropped
    error = torch.where(keep, to_kept, to_dropped)
    size = torch.maximum(kept.abs(), dropped.abs())
    far = ~(error <= tolerance(y.dtype, size, roundings))
    if not far.any():
        return None, keep
    place = tuple(torch.nonzero(far)[0].tolist())
    return (
        f"{int(far.sum())} of {far.numel()} elements are neither kept nor dropped values; at {place} "
        f"{value[place].item():.6g}, kept would be {kept[place].item():.6g}, "
        f"dropped {dropped[place].item():.6g}"
    ), keep


def told_apart(
    dtype: torch.dtype, kept: torch.Tensor, dropped: torch.Tensor, roundings: float = 4.0
) -> torch.Tensor:
    """Where the kept and the dropped value (float64) lie further apart than ``roundings`` of a result.

    It depends on the inputs alone: the draws of these elements are a fair sample of all.
    """
    size = torch.maximum(kept.abs(), dropped.abs())
    return (kept - dropped).abs() > tolerance(dtype, size, roundings)


def keep_by_gradient(
    keep: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor, got: torch.Tensor, slope: torch.Tensor
) -> torch.Tensor:
    """``keep``, read off the gradient (``slope`` if kept, else 0) where rounding blurs the two values."""
    value = got.detach().double()
    clear = told_apart(got.dtype, kept, dropped, 32.0)
    return torch.where(clear, keep, (value - slope).abs() <= value.abs())


def share(keep: torch.Tensor, p: float, among: torch.Tensor | None = None) -> str | None:
    """Whether the share of kept draws is 1 - p within six standard deviations of a binomial.

    ``among``: the draws that count, where some cannot be read off the result.
    """
    if among is not None:
        keep = keep & among
    draws, kept = keep.numel() if among is None else int(among.sum()), int(keep.sum())
    if keep.numel() and not draws:
        return "no element tells whether it was kept"
    expected, sigma = draws * (1 - p), math.sqrt(draws * p * (1 - p))
    if abs(kept - expected) > SIGMAS * sigma + 1:
        return f"kept {kept} of {draws} draws, expected {expected:.0f} within {SIGMAS * sigma:.0f}"
    return None


def close(name: str, got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor | float) -> str | None:
    """Whether ``got`` equals the float64 ``want`` within ``allowed``, elementwise."""
    error = (got.detach().double() - want).abs()
    far = ~(error <= allowed)
    if not far.any():
        return None
    worst = torch.where(far, error.nan_to_num(math.inf), torch.zeros_like(error)).max().item()
    return f"{name}: {int(far.sum())} of {far.numel()} elements are off, the worst by {worst:.3g}"


def against_reference(
    names: Sequence[str],
    got: Sequence[torch.Tensor],
    want: Sequence[torch.Tensor],
    torch_error: Sequence[float],
    dtype: torch.dtype,
) -> str | None:
    """Whether every output is within four times torch's worst error plus a few roundings to ``dtype``."""
    roundings = 8.0 if torch.finfo(dtype).bits > 16 else 2.0
    for name, mine, truth, error in zip(names, got, want, torch_error, strict=True):
        fault = same_kind(mine, torch.empty(truth.shape, dtype=mine.dtype, device="meta"))
        if fault is None:
            largest = float(truth.abs().max()) if truth.numel() else 0.0
            allowed = roundings * torch.finfo(dtype).eps * largest + 4 * error
            fault = close(name, mine, truth, allowed)
        else:
            fault = f"{name}: {fault}"
        if fault:
            return fault
    return None

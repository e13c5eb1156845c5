"""Outputs taken apart: any nest of containers and objects as a flat mapping from path to leaf."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeprobe.probe.state import slots

_MAX_DEPTH = 100
_MAX_ITEMS = 10_000
_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_OPAQUE = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, nn.Module)


def children(value: Any) -> list[tuple[str, Any]] | None:
    """Named parts of a container or plain object, or None for a leaf."""
    if isinstance(value, (Tensor, *_ATOMS, *_OPAQUE)):
        return None
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", item) for name, item in zip(value._fields, value, strict=True)]
    if isinstance(value, (list, tuple, deque)):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [(f"{{{index}}}", item) for index, item in enumerate(sorted(value, key=repr))]
    if type(value).__module__ == "numpy":
        return None
    if dataclasses.is_dataclass(value):
        return [(f".{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    attributes = {
        **getattr(value, "__dict__", {}),
        **{member.__name__: held for member, held in slots(value)},
    }
    return [(f".{name}", item) for name, item in attributes.items()] or None


def drained(output: Any) -> Any:
    """A generator's or iterator's items as a list: what it does is done while it is read."""
    return list(itertools.islice(output, _MAX_ITEMS)) if isinstance(output, Iterator) else output


def flatten(value: Any) -> dict[str, Any]:
    """Leaves by path. Shared and cyclic objects appear once; tensors are detached copies."""
    leaves: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(node: Any, path: str, depth: int) -> None:
        if isinstance(node, Tensor):
            leaves[path] = node.detach().clone()
            return
        parts = children(node) if depth < _MAX_DEPTH else None
        if parts is None:
            leaves[path] = node
            return
        if id(node) in seen:
            return
        seen.add(id(node))
        if not parts:
            leaves[path] = type(node).__name__ + "()"
        for name, item in parts:
            walk(item, path + name, depth + 1)

    walk(value, "", 0)
    return leaves


def map_tensors(value: Any, function: Callable[[Tensor], Any], copy_objects: bool = True) -> Any:
    """The same structure with every tensor replaced; other mutable objects are deep-copied where possible."""
    import copy

    memo: dict[int, Any] = {}
    keep: list[Any] = []

    def collect(node: Any, depth: int) -> None:
        if id(node) in memo:
            return
        if isinstance(node, Tensor):
            memo[id(node)] = function(node)
            keep.append(node)
            return
        if isinstance(node, nn.Module):
            memo[id(node)] = node
            return
        for _, item in (children(node) if depth < _MAX_DEPTH else None) or []:
            collect(item, depth + 1)

    collect(value, 0)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        return value


def clone_inputs(value: Any) -> Any:
    """Independent copies of all tensors in a nest, with `requires_grad` kept."""

    def clone(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return map_tensors(value, clone)


@dataclass(frozen=True)
class LeafDifference:
    """One leaf that is not the same in both outputs.

    kind: "value", "roundoff", "shape", "dtype", "type", "missing" (only in the second), "extra" (only in
    the first). `amount` is the largest absolute difference divided by the largest finite magnitude.
    """

    path: str
    kind: str
    amount: float = math.nan
    detail: str = ""


@dataclass(frozen=True)
class Comparison:
    differences: tuple[LeafDifference, ...]
    leaves: int

    @property
    def same(self) -> bool:
        """Bitwise equal (NaN equals NaN)."""
        return not self.differences

    @property
    def differs(self) -> bool:
        return any(d.kind != "roundoff" for d in self.differences)

    @property
    def structural(self) -> bool:
        return any(d.kind not in ("value", "roundoff") for d in self.differences)

    @property
    def amount(self) -> float:
        """Largest relative difference of the leaves that differ in value, 0 when none does."""
        return max((d.amount for d in self.differences if d.kind in ("value", "roundoff")), default=0.0)


def compare(
    first: Mapping[str, Any], second: Mapping[str, Any], tolerance: float | None = None
) -> Comparison:
    """Compare two flattened outputs leaf by leaf.

    tolerance: relative round-off bound; None takes a bound by dtype (`roundoff_bound`).
    """
    found: list[LeafDifference] = []
    for path, leaf in first.items():
        if path not in second:
            found.append(LeafDifference(path, "extra", detail=describe(leaf)))
            continue
        difference = _compare_leaf(path, leaf, second[path], tolerance)
        if difference is not None:
            found.append(difference)
    found += [
        LeafDifference(path, "missing", detail=describe(leaf))
        for path, leaf in second.items()
        if path not in first
    ]
    return Comparison(tuple(found), len({*first, *second}))


def describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{_shape(leaf)}"
    text = repr(leaf)
    return text if len(text) <= 40 else type(leaf).__name__


def roundoff_bound(dtype: torch.dtype) -> float:
    """Largest relative difference that rounding alone is expected to produce in a deep network."""
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    return {torch.float64: 1e-11, torch.complex128: 1e-11, torch.float32: 1e-5, torch.complex64: 1e-5}.get(
        dtype, 4 * torch.finfo(dtype).eps
    )


def _compare_leaf(path: str, a: Any, b: Any, tolerance: float | None) -> LeafDifference | None:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return _compare_tensor(path, a, b, tolerance)
    if type(a) is not type(b):
        return LeafDifference(path, "type", detail=f"{describe(a)} against {describe(b)}")
    if type(a).__module__ == "numpy":
        import numpy as np

        a, b = np.asarray(a), np.asarray(b)
        if a.dtype == b.dtype and a.dtype.kind in "biufc":
            return _compare_tensor(path, torch.from_numpy(a.copy()), torch.from_numpy(b.copy()), tolerance)
        return None if np.array_equal(a, b) else LeafDifference(path, "value")
    if isinstance(a, float):
        return _compare_tensor(
            path, torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), tolerance
        )
    if isinstance(a, _ATOMS):
        return None if a == b else LeafDifference(path, "value", 1.0, f"{describe(a)} against {describe(b)}")
    # Functions, modules and objects without a value of their own carry nothing to compare.
    if isinstance(a, _OPAQUE) or type(a).__eq__ is object.__eq__ or a == b:
        return None
    return LeafDifference(path, "value", 1.0, f"{describe(a)} against {describe(b)}")


def _compare_tensor(path: str, a: Tensor, b: Tensor, tolerance: float | None) -> LeafDifference | None:
    shapes = _shape(a), _shape(b)
    if shapes[0] != shapes[1]:
        return LeafDifference(path, "shape", detail="{} against {}".format(*shapes))
    if a.dtype != b.dtype:
        return LeafDifference(path, "dtype", detail=f"{a.dtype} against {b.dtype}")
    if a.is_meta or b.is_meta:
        return None
    dtype = a.dtype
    a, b = _plain(a), _plain(b)
    if torch.equal(a, b):
        return None
    if not (a.is_floating_point() or a.is_complex()):
        unequal = a != b
        return LeafDifference(path, "value", float(unequal.double().mean()))
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    finite = torch.isfinite(a) & torch.isfinite(b)
    odd = ~finite & ~(torch.isnan(a) & torch.isnan(b)) & ~(a == b)
    if bool(odd.any()):
        return LeafDifference(path, "value", math.inf)
    delta = (a - b)[finite].abs()
    largest = float(delta.max()) if delta.numel() else 0.0
    if largest == 0.0:
        return None
    scale = max(float(a[finite].abs().max()), float(b[finite].abs().max()))
    # What is stored in few bits is rounded to them, however wide it was computed.
    stored = 2 * torch.finfo(dtype).eps if torch.finfo(dtype).bits <= 16 else 0.0
    bound = roundoff_bound(dtype) if tolerance is None else max(tolerance, stored)
    return LeafDifference(path, "roundoff" if largest <= bound * scale else "value", largest / scale)


def indices_changed(a: Any, b: Any) -> list[int]:
    """For each axis with more than one index, at how many of them two tensors differ; empty where nowhere."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or _shape(a) != _shape(b):
        return []
    a, b = _plain(a), _plain(b)
    places = ((a != b) & ((a == a) | (b == b))).nonzero()
    axes = [axis for axis, n in enumerate(a.shape) if n > 1] if len(places) else []
    return [len(places[:, axis].unique()) for axis in axes]


def _shape(tensor: Tensor) -> list:
    return [list(part.shape) for part in tensor.unbind()] if tensor.is_nested else list(tensor.shape)


def _plain(tensor: Tensor) -> Tensor:
    """A dense, ordinary tensor with the same values."""
    if tensor.is_nested:
        return torch.cat([part.reshape(-1) for part in tensor.unbind()]) if tensor.size(0) else tensor
    if tensor.is_quantized:
        return tensor.dequantize()
    if tensor.layout is not torch.strided:
        return tensor.to_dense()
    return tensor.to("cpu") if tensor.device.type != "cpu" else tensor

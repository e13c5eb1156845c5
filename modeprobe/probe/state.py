"""Everything a model reaches, saved and put back in place: tensors, flags, hooks, Python attributes."""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_STOP = (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, str, bytes, int, float, bool)


def parts(value: Any) -> Iterator[Any]:
    """Objects directly held by `value`: attributes, items, closure cells, bound arguments."""
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    elif isinstance(value, functools.partial):
        yield value.func
        yield value.args
        yield value.keywords
    elif isinstance(value, types.MethodType):
        yield value.__self__
        yield value.__func__
    elif isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            yield _cell(cell)
        if value.__defaults__:
            yield value.__defaults__
    if isinstance(value, nn.Module):
        # A scripted module keeps tensors and submodules outside __dict__.
        yield from value._parameters.values()
        yield from value._buffers.values()
        yield from value._modules.values()
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and not isinstance(value, (Tensor, types.FunctionType)):
        yield attributes
    yield from (held for _, held in slots(value))


def slots(value: Any) -> Iterator[tuple[types.MemberDescriptorType, Any]]:
    """Descriptors and values of the `__slots__` that are set."""
    if isinstance(value, Tensor):
        return
    for kind in type(value).__mro__:
        if "__slots__" not in vars(kind):
            continue
        for member in vars(kind).values():
            if isinstance(member, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError):
                    yield member, member.__get__(value)


def reachable(roots: Iterable[Any]) -> list[Any]:
    """Objects reachable from `roots`, each once, without entering classes, modules of code and globals."""
    found: list[Any] = []
    seen: set[int] = set()
    todo = list(roots)
    keep: list[Any] = []  # temporaries must stay alive while their id marks them as seen
    while todo:
        value = todo.pop()
        if value is None or isinstance(value, _STOP) or id(value) in seen:
            continue
        seen.add(id(value))
        found.append(value)
        if isinstance(value, Tensor):
            continue
        for part in parts(value):
            keep.append(part)
            todo.append(part)
    return found


def shared_state(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models reach a common module or tensor (a copy that still refers to its original)."""
    kinds = (nn.Module, Tensor)
    ours = {id(item) for item in reachable([first]) if isinstance(item, kinds)}
    return any(id(item) in ours for item in reachable([second]) if isinstance(item, kinds))


class _SavedTensor:
    def __init__(self, tensor: Tensor, values: bool, twin: Tensor | None = None) -> None:
        self.tensor = tensor
        self.alias = tensor.data
        self.values: Tensor | None = None
        if values and not tensor.is_meta:
            same = twin is not None and twin is not tensor and bitwise_equal(tensor, twin)
            self.values = twin if same else tensor.detach().clone()
        self.requires_grad = tensor.requires_grad
        self.grad = tensor.grad if tensor.is_leaf else None
        self.grad_values = self.grad.detach().clone() if values and self.grad is not None else None

    def restore(self) -> None:
        tensor = self.tensor
        with torch.no_grad():
            if not _same_storage(tensor, self.alias):
                tensor.data = self.alias
            if self.values is not None and not bitwise_equal(tensor, self.values):
                # Through .data: the version counter must not move, a graph of the user may hold the tensor.
                tensor.data.copy_(self.values)
            if tensor.is_leaf:
                if tensor.requires_grad != self.requires_grad:
                    tensor.requires_grad_(self.requires_grad)
                if tensor.grad is not self.grad:
                    tensor.grad = self.grad
                saved = self.grad_values
                if self.grad is not None and saved is not None and not bitwise_equal(self.grad, saved):
                    self.grad.data.copy_(saved)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    try:
        return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
    except RuntimeError:
        return True  # no storage to compare (sparse, fake, ...)


def bitwise_equal(a: Tensor, b: Tensor) -> bool:
    """Equal shape, type and values, where NaN equals NaN."""
    if a is b or (a.is_meta and b.is_meta):
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    try:
        if torch.equal(a, b):
            return True
        return bool(((a == b) | ((a != a) & (b != b))).all()) if a.is_floating_point() else False
    except RuntimeError:
        return False


class Snapshot:
    """State of everything reachable from `roots`; `restore()` puts it back in place, object by object.

    values: tells for which tensors the values are copied (others keep only identity and flags).
    twins: tensors known by id that may have the same values elsewhere; where they do, nothing is copied.
    """

    def __init__(
        self,
        roots: Iterable[Any],
        values: Callable[[Tensor], bool] = lambda tensor: True,
        twins: Mapping[int, Tensor] = types.MappingProxyType({}),
    ) -> None:
        self._by_id: dict[int, _SavedTensor] = {}
        self._undo: list[Callable[[], Any]] = []
        for item in reachable(roots):
            if isinstance(item, Tensor):
                self._by_id[id(item)] = _SavedTensor(item, values(item), twins.get(id(item)))
            else:
                self._save(item)

    def _save(self, item: Any) -> None:
        if isinstance(item, dict):
            self._undo.append(functools.partial(_restore_dict, item, dict(item)))
        elif isinstance(item, (list, bytearray)):
            self._undo.append(functools.partial(_restore_list, item, list(item)))
        elif isinstance(item, (set, deque)):
            self._undo.append(functools.partial(_restore_other, item, list(item)))
        elif isinstance(item, torch.Generator):
            self._undo.append(functools.partial(item.set_state, item.get_state()))
        elif isinstance(item, random.Random):
            self._undo.append(functools.partial(item.setstate, item.getstate()))
        elif isinstance(item, types.FunctionType):
            for cell in item.__closure__ or ():
                self._undo.append(functools.partial(_restore_cell, cell, _cell(cell)))
        elif type(item).__module__.startswith("numpy"):
            self._save_numpy(item)
        for member, held in slots(item):
            self._undo.append(functools.partial(member.__set__, item, held))
        if isinstance(item, torch.jit.ScriptModule):
            self._undo.append(functools.partial(setattr, item, "training", item.training))

    def _save_numpy(self, item: Any) -> None:
        import numpy as np

        if isinstance(item, np.ndarray) and item.dtype != object and item.flags.writeable:
            self._undo.append(functools.partial(np.copyto, item, item.copy()))
        elif isinstance(item, np.random.Generator):
            self._undo.append(
                functools.partial(setattr, item.bit_generator, "state", item.bit_generator.state)
            )
        elif isinstance(item, np.random.RandomState):
            self._undo.append(functools.partial(item.set_state, item.get_state()))

    def restore(self) -> None:
        for undo in self._undo:
            undo()
        for saved in self._by_id.values():
            saved.restore()

    def values(self, tensor: Tensor) -> Tensor:
        """The saved values of one tensor."""
        saved = self._by_id[id(tensor)]
        return saved.values if saved.values is not None else tensor

    def changed(self, tensor: Tensor) -> bool:
        """Whether a tensor has other values than were saved, or was not there."""
        saved = self._by_id.get(id(tensor))
        return saved is None or saved.values is None or not bitwise_equal(tensor, saved.values)


def _restore_dict(target: dict, saved: dict) -> None:
    if len(target) == len(saved) and all(
        a is c and target[a] is saved[c] for a, c in zip(target, saved, strict=True)
    ):
        return
    kind = OrderedDict if isinstance(target, OrderedDict) else dict  # past overridden methods
    kind.clear(target)
    kind.update(target, saved)


def _restore_list(target: list | bytearray, saved: list) -> None:
    target[:] = saved


def _restore_other(target: Any, saved: list) -> None:
    target.clear()
    for item in saved:
        (target.add if isinstance(target, set) else target.append)(item)


_EMPTY = object()


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _restore_cell(cell: types.CellType, value: Any) -> None:
    if value is not _EMPTY:
        cell.cell_contents = value

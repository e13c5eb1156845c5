"""Replace dropout and BatchNorm layers inside a model, and undo it."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from modeprobe.nn.fused import FOLDED, activation_name, has_hooks
from modeprobe.ops import backend as backends

# Names in torch.nn; each is replaced by the class of the same name in modeprobe.nn.
SWAPPED = (
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "AlphaDropout",
    "FeatureAlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
)

# In the instance, not in a registry: copies and pickles of a swapped model can be restored, too. Its value is
# the dtype of the weight at the swap, None without one.
_MARK = "_modeprobe_swapped"


@dataclass(frozen=True)
class Swapped:
    """One module that was replaced: every path that leads to it, and the name of its class."""

    paths: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Left:
    """One dropout or BatchNorm layer that was left as it was, and why."""

    paths: tuple[str, ...]
    kind: str
    reason: str


@dataclass(frozen=True, repr=False)
class SwapReport:
    """What :func:`swap` did. ``str(report)`` is a table.

    Attributes:
        swapped: the replaced modules.
        left: layers that drop or normalise and were left as they were, each with its reason.
        fused: with ``fuse=True``, the paths of each BatchNorm and of what was folded into it.
        backends: the backend that the replaced modules use, by device type of the model's tensors.
    """

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    fused: tuple[tuple[str, ...], ...]
    backends: dict[str, str]
    _modules: tuple[weakref.ref[nn.Module], ...] = field(default=(), repr=False, compare=False)

    def undo(self) -> int:
        """Put back what this swap replaced, and return the number of modules put back.

        Modules that are gone, or were restored before, are passed over.

        Raises:
            RuntimeError: the class of a replaced module was changed since; nothing is put back then.
        """
        modules = [module for module in (ref() for ref in self._modules) if module is not None]
        return _restore((type(module).__name__, module) for module in modules)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain lists, dicts and strings."""
        return {
            "swapped": [{"paths": list(item.paths), "kind": item.kind} for item in self.swapped],
            "left": [
                {"paths": list(item.paths), "kind": item.kind, "reason": item.reason} for item in self.left
            ],
            "fused": [list(paths) for paths in self.fused],
            "backends": dict(self.backends),
        }

    def __repr__(self) -> str:
        return f"<SwapReport: {self._summary()}>"

    def _summary(self) -> str:
        return f"{_count(len(self.swapped), 'module')} swapped, {len(self.left)} left as they were"

    def __str__(self) -> str:
        lines = [self._summary()]
        kinds: dict[str, list[str]] = {}
        for item in self.swapped:
            kinds.setdefault(item.kind, []).append(_join(item.paths))
        width = max((len(kind) for kind in kinds), default=0)
        lines += [f"  {kind:<{width}}  {len(paths):>4}  {_shorten(paths)}" for kind, paths in kinds.items()]
        if self.fused:
            lines.append(f"fused: {_shorten([' + '.join(paths) for paths in self.fused])}")
        if self.left:
            lines.append("left:")
            reasons: dict[tuple[str, str], list[str]] = {}
            for left in self.left:
                reasons.setdefault((left.kind, left.reason), []).append(_join(left.paths))
            lines += [f"  {_shorten(paths)}: {kind}, {why}" for (kind, why), paths in reasons.items()]
        if self.swapped:
            used = ", ".join(f"{name} on {device}" for device, name in self.backends.items())
            lines.append(f"backend: {used}")
            lines.append("undo: report.undo() or modeprobe.restore(model)")
        return "\n".join(lines)


def swap(model: nn.Module, *, fuse: bool = False, backend: str | None = None) -> SwapReport:
    """Replace the dropout and BatchNorm layers of ``model`` by modeprobe's, in place.

    Each ``torch.nn`` dropout and BatchNorm module becomes an instance of the class of the same name in
    ``modeprobe.nn``, which subclasses torch's. The module objects stay: only their class changes. So
    parameters, buffers, hooks, ``training`` flags, state dict keys, optimizer references, shared modules,
    a model that is itself one such layer, and references held elsewhere all keep their meaning, and a
    compiled model recompiles by itself.

    Only exact torch types are replaced. Left as they are, each with its reason in the report: subclasses,
    parametrized, scripted and lazy modules, modules whose ``forward`` was overridden on the instance,
    and dropout inside ``nn.MultiheadAttention`` and recurrent layers. Tools that look for exact torch
    types (``torch.jit.script``, quantization's ``fuse_modules``) run before the swap, or after ``restore``.

    Args:
        model: any module; it is changed in place.
        fuse: also let each BatchNorm in an ``nn.Sequential`` do the ReLU, LeakyReLU, SiLU or GELU after it,
            and a Dropout after that, in the same pass. They stay in place and pass their input on, so do not
            call a slice of such a Sequential that ends between them, and restore before layers are taken out.
            Modules with hooks, or used in more than one place, are not fused; hooks that come later are
            shown each layer's own output.
        backend: the backend that the replaced modules use, as in :func:`modeprobe.backend`. By default
            the one in force when they are called.

    Returns:
        A :class:`SwapReport`; ``print`` it, and ``report.undo()`` puts the model back.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``backend`` is not the name of a backend.
        RuntimeError: ``backend`` cannot run on the devices of the model. Nothing was changed.

    Example:
        >>> model = torchvision.models.resnet50()
        >>> report = mp.swap(model)
        >>> print(report)
        53 modules swapped, 0 left as they were
        ...
        >>> mp.restore(model)
        53
    """
    _require_module("swap", model)
    used = _backends_used(model, backend)
    classes = _classes()
    plan: dict[nn.Module, tuple[type[nn.Module], dict[str, Any]]] = {}
    settings = {} if backend is None else {"backend": backend}
    swapped: list[Swapped] = []
    left: list[Left] = []
    paths_of = _paths(model)
    for module, paths in paths_of:
        reason = _why_left(module, classes)
        if reason is not None:
            left.append(Left(paths, _kind(module), reason))
        elif type(module) in classes:
            plan[module] = classes[type(module)], settings
            swapped.append(Swapped(paths, type(module).__name__))
    fused: list[tuple[str, ...]] = []
    if fuse:
        single = {module: paths[0] for module, paths in paths_of if len(paths) == 1}
        for run in _fusible(model, plan, single):
            norm, activation = run[:2]
            now: dict[str, Any] = {"activation": activation_name(activation), "fused_run": run}
            if isinstance(activation, nn.LeakyReLU):
                now["negative_slope"] = activation.negative_slope
            plan[norm] = plan[norm][0], {**settings, **now}
            plan.update({module: (FOLDED[type(module)], {"fused_run": run}) for module in run[1:]})
            fused.append(tuple(single[module] for module in run))
    done: list[nn.Module] = []
    try:
        for module, (cls, attributes) in plan.items():
            done.append(module)
            module.__dict__[_MARK] = _weight_dtype(module)
            module.__class__ = cls
            module.__dict__.update(attributes)
    except BaseException:
        _restore(("", module) for module in done)
        raise
    refs = tuple(weakref.ref(module) for module in plan)
    return SwapReport(tuple(swapped), tuple(left), tuple(fused), used, refs)


def restore(model: nn.Module) -> int:
    """Put back every torch layer that :func:`swap` replaced in ``model``, in place.

    The model is then what it was before: the same module, parameter, buffer and hook objects, and
    torch's own kernels. If it was converted to float16 or bfloat16 since, running statistics become so, too,
    as torch's layers need it. Works on copies and on unpickled models, too. Modules that were built from
    ``modeprobe.nn`` directly are not touched.

    Returns:
        The number of modules put back; 0 for a model that was never swapped.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        RuntimeError: the class of a replaced module was changed since, for example by a parametrization.
            Nothing was changed.
    """
    _require_module("restore", model)
    return _restore(model.named_modules())


def _restore(named: Iterable[tuple[str, nn.Module]]) -> int:
    originals = {cls: original for original, cls in [*_classes().items(), *FOLDED.items()]}
    plan = []
    marked = {id(module): (name, module) for name, module in named if _MARK in module.__dict__}
    for name, module in list(marked.values()):
        for other in getattr(module, "fused_run", ()):
            marked.setdefault(id(other), (f"{name} (fused with it)", other))
    for name, module in marked.values():
        cls = type(module)
        if cls not in originals and cls not in originals.values():
            raise RuntimeError(
                f"restore: module {name!r} was swapped and is now a {cls.__name__}; undo what changed its "
                "class (torch.nn.utils.parametrize.remove_parametrizations for a parametrization), then "
                "restore again"
            )
        plan.append((module, originals.get(cls, cls)))
    for module, original in plan:
        cls = type(module)
        module.__class__ = original
        # Settings that only modeprobe's class knows, `backend` and the like, go with it.
        for key in [key for key in module.__dict__ if hasattr(cls, key) and not hasattr(original, key)]:
            del module.__dict__[key]
        if module.__dict__.pop(_MARK) != _weight_dtype(module):
            _narrow_buffers(module)
    return len(plan)


def _weight_dtype(module: nn.Module) -> torch.dtype | None:
    weight = module._parameters.get("weight")
    return None if weight is None else weight.dtype


def _narrow_buffers(module: nn.Module) -> None:
    """What torch's ``.half()`` does to running statistics and ours does not: its kernels need it so."""
    dtype = _weight_dtype(module)
    for name in ("running_mean", "running_var"):
        buffer = module._buffers.get(name)
        if buffer is not None and dtype in (torch.float16, torch.bfloat16):
            module._buffers[name] = buffer.to(dtype)


def _require_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        came = f"{type(model).__module__}.{type(model).__name__}"
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {came}")


def _classes() -> dict[type[nn.Module], type[nn.Module]]:
    import modeprobe.nn as ours

    return {getattr(nn, name): getattr(ours, name) for name in SWAPPED if hasattr(ours, name)}


def _paths(model: nn.Module) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Every module with all paths that lead to it, in the order of ``named_modules``."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(path)
    return [(module, tuple(paths)) for module, paths in found.values()]


def _backends_used(model: nn.Module, backend: str | None) -> dict[str, str]:
    if backend is not None and backend not in backends.BACKENDS:
        raise ValueError(
            f"swap: backend must be None or one of {', '.join(backends.BACKENDS)}, got {backend!r}"
        )
    tensors = [*model.parameters(), *model.buffers()]
    # A tensor on "meta" will move to a device that is not known yet.
    devices = {tensor.device.type for tensor in tensors} - {"meta"} or ({"cpu"} if not tensors else set())
    used = {}
    for device in sorted(devices):
        if backend is None:
            used[device] = backends.resolve(device)
            continue
        reason = backends.why_not(backend, device)
        if reason is not None:
            raise RuntimeError(f"swap: backend {backend!r} cannot be used on {device!r} tensors: {reason}")
        with backends.backend(backend):
            used[device] = backends.resolve(device)
    return used


def _why_left(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> str | None:
    """Why a module that drops or normalises is not replaced; None for one to replace, and for any other."""
    cls = type(module)
    if cls in classes:
        if "forward" in module.__dict__:
            return "its forward was overridden on the instance (as accelerate's hooks do)"
        return None
    if isinstance(module, torch.jit.ScriptModule):
        if getattr(module, "original_name", None) in SWAPPED:
            return "part of a scripted or traced model; swap before torch.jit.script or trace"
        return None
    if cls in classes.values() or cls in FOLDED.values():
        return "modeprobe's already"
    if isinstance(module, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)):
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            return "lazy; run one forward pass, then swap"
        if parametrize.is_parametrized(module):
            return "parametrized; remove the parametrization, then swap"
        if getattr(nn, cls.__name__, None) is cls:
            return "modeprobe has no layer of this type"
        bases = [base.__name__ for base in cls.__mro__ if getattr(nn, base.__name__, None) is base]
        parent = next((name for name in bases if name != "Module"), "a torch layer")
        return f"a subclass of {parent}, whose forward may differ"
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        return f"its dropout={module.dropout:g} is inside torch's attention kernel"
    if isinstance(module, nn.RNNBase) and module.dropout > 0:
        return f"its dropout={module.dropout:g} is inside torch's recurrent kernel"
    return None


def _fusible(
    model: nn.Module, swapped: Container[nn.Module], single: Container[nn.Module]
) -> Iterator[list[nn.Module]]:
    """Runs of BatchNorm, activation and perhaps Dropout, each used in one place, that one pass can do."""
    for container in model.modules():
        if (
            not isinstance(container, nn.Sequential)
            or type(container).forward is not nn.Sequential.forward
            or "forward" in container.__dict__
        ):
            continue
        layers = list(container)
        for index, norm in enumerate(layers):
            run = [norm, *layers[index + 1 : index + 3]]
            if len(run) < 2 or norm not in swapped or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            if activation_name(run[1]) is None:
                continue
            if type(run[-1]) is not nn.Dropout:
                del run[2:]
            while len(run) > 1 and not all(module in single and _as_it_was_made(module) for module in run):
                del run[-1]
            if len(run) > 1:
                yield run


def _as_it_was_made(module: nn.Module) -> bool:
    return "forward" not in module.__dict__ and not has_hooks(module)


def _kind(module: nn.Module) -> str:
    return getattr(module, "original_name", type(module).__name__)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _join(paths: tuple[str, ...]) -> str:
    return " = ".join(path or "(the model itself)" for path in paths)


def _shorten(paths: list[str], limit: int = 4) -> str:
    rest = len(paths) - limit
    return ", ".join(paths[:limit]) + (f" and {rest} more" if rest > 0 else "")

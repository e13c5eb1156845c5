"""Layers that ``swap(model, fuse=True)`` has folded into the BatchNorm before them.

They stay in the model, so that paths and indices hold and restore can put them back, and pass their input on;
while there are hooks, which see what is between the layers, each layer does its own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.module import _has_any_global_hook

from modeprobe.nn._backend import as_leaf

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def in_one_pass(run: Sequence[nn.Module]) -> bool:
    """Whether the BatchNorm of a run does the others' part now: nobody looks between the layers."""
    return not (_has_any_global_hook() or any(has_hooks(module) for module in run))


class _Folded(nn.Module):
    # BatchNorm, activation and perhaps Dropout; not submodules, so in a plain sequence.
    fused_run: Sequence[Any] = ()

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Proxy):
            return as_leaf(self, input)
        return input if in_one_pass(self.fused_run) else super().forward(input)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), "folded into BatchNorm"]))


class FoldedReLU(_Folded, nn.ReLU):
    """An :class:`torch.nn.ReLU` that the BatchNorm before it has applied."""


class FoldedLeakyReLU(_Folded, nn.LeakyReLU):
    """An :class:`torch.nn.LeakyReLU` that the BatchNorm before it has applied."""


class FoldedSiLU(_Folded, nn.SiLU):
    """An :class:`torch.nn.SiLU` that the BatchNorm before it has applied."""


class FoldedGELU(_Folded, nn.GELU):
    """An :class:`torch.nn.GELU` that the BatchNorm before it has applied."""


class FoldedDropout(_Folded, nn.Dropout):
    """An :class:`torch.nn.Dropout` that the BatchNorm before it has applied, with p and mode of this one."""


FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: FoldedReLU,
    nn.LeakyReLU: FoldedLeakyReLU,
    nn.SiLU: FoldedSiLU,
    nn.GELU: FoldedGELU,
    nn.Dropout: FoldedDropout,
}


def activation_name(module: nn.Module) -> str | None:
    """``activation=`` of BatchNorm that does what ``module`` does; None if there is none."""
    kind = type(module)
    if kind is nn.ReLU:
        return "relu"
    if kind is nn.LeakyReLU:
        return "leaky_relu"
    if kind is nn.SiLU:
        return "silu"
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return None

"""Layers that ``swap(model, fuse=True)`` has folded into the BatchNorm before them.

They stay in the model, so that paths and indices hold and restore can put them back, and pass their input on.
"""

from __future__ import annotations

from torch import Tensor, nn


class _Folded:
    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), "folded into BatchNorm"]))  # type: ignore[misc]


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

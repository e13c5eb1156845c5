"""Dropout modules: torch's own, with modeprobe's kernels."""

from __future__ import annotations

from torch import Tensor, nn

from modeprobe import functional as F
from modeprobe.nn._backend import on_own_backend


class Dropout(nn.Dropout):
    """:class:`torch.nn.Dropout` on :func:`modeprobe.functional.dropout`.

    Args:
        p: drop probability in [0, 1]; may be assigned later, also a tensor with one element.
        inplace: write the result into the input.
        scaling: "inverted" scales kept elements by ``1 / (1 - p)`` in training and leaves evaluation alone;
            "classic" leaves training alone and multiplies by ``1 - p`` in evaluation.

    Raises:
        ValueError: ``p`` is outside [0, 1], or ``scaling`` is neither.

    Shape:
        any, and the same for the output; float16, bfloat16, float32 or float64.
    """

    # A class attribute, so that a torch.nn.Dropout whose class is changed to this one has it.
    scaling = "inverted"
    backend: str | None = None

    def __init__(self, p: float = 0.5, inplace: bool = False, *, scaling: str = "inverted") -> None:
        super().__init__(p, inplace)
        if scaling not in ("inverted", "classic"):
            raise ValueError(f'Dropout: scaling must be "inverted" or "classic", got {scaling!r}')
        if scaling != "inverted":
            self.scaling = scaling

    @on_own_backend
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.p, self.training, self.inplace, scaling=self.scaling)

    def extra_repr(self) -> str:
        base = super().extra_repr()
        return base if self.scaling == "inverted" else f"{base}, scaling={self.scaling!r}"


class Dropout1d(nn.Dropout1d):
    """:class:`torch.nn.Dropout1d` on :func:`modeprobe.functional.dropout1d`."""

    backend: str | None = None

    @on_own_backend
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(nn.Dropout2d):
    """:class:`torch.nn.Dropout2d` on :func:`modeprobe.functional.dropout2d`."""

    backend: str | None = None

    @on_own_backend
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(nn.Dropout3d):
    """:class:`torch.nn.Dropout3d` on :func:`modeprobe.functional.dropout3d`."""

    backend: str | None = None

    @on_own_backend
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(nn.AlphaDropout):
    """:class:`torch.nn.AlphaDropout` on :func:`modeprobe.functional.alpha_dropout`.

    As torch's, the module never writes into its input, whatever ``inplace`` says.
    """

    backend: str | None = None

    @on_own_backend
    def forward(self, input: Tensor) -> Tensor:
        return F.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(nn.FeatureAlphaDropout):
    """:class:`torch.nn.FeatureAlphaDropout` on :func:`modeprobe.functional.feature_alpha_dropout`.

    As torch's, the module never writes into its input, whatever ``inplace`` says.
    """

    backend: str | None = None

    @on_own_backend
    def forward(self, input: Tensor) -> Tensor:
        return F.feature_alpha_dropout(input, self.p, self.training)


class DropPath(nn.Module):
    """Stochastic depth: whole examples are dropped, see :func:`modeprobe.functional.drop_path`.

    Args:
        p: drop probability in [0, 1]; may be assigned later, also a tensor with one element.
        inplace: write the result into the input.

    Raises:
        ValueError: ``p`` is outside [0, 1].

    Shape:
        (N, *), and the same for the output; float16, bfloat16, float32 or float64.
    """

    backend: str | None = None

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"DropPath: p must be in [0, 1], got {p}")
        self.p = p
        self.inplace = inplace

    @on_own_backend
    def forward(self, input: Tensor) -> Tensor:
        return F.drop_path(input, self.p, self.training, self.inplace)

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"

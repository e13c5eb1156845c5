"""BatchNorm modules: torch's own, with modeprobe's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modeprobe import functional as F
from modeprobe.nn._backend import on_own_backend
from modeprobe.nn.policy import StatisticsPolicy
from modeprobe.ops import batch_norm as ops
from modeprobe.reference import accumulate_dtype

_NONFINITE = ("propagate", "skip")


class _BatchNorm(StatisticsPolicy, nn.modules.batchnorm._BatchNorm):
    """What the three dimensions share. Attributes have class defaults, so that a torch.nn module whose class
    is changed to one of these has them."""

    activation: str | None = None
    nonfinite = "propagate"
    # The Dropout that swap(fuse=True) folded in, in a tuple: it must not become a submodule.
    folded_dropout: tuple[nn.Dropout, ...] = ()
    backend: str | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        nonfinite: str = "propagate",
        statistics: str = "ema",
    ) -> None:
        if activation not in ops.ACTIVATIONS:
            names = ", ".join(map(repr, ops.ACTIVATIONS))
            raise ValueError(f"{type(self).__name__}: activation must be one of {names}, got {activation!r}")
        if nonfinite not in _NONFINITE:
            raise ValueError(
                f'{type(self).__name__}: nonfinite must be "propagate" or "skip", got {nonfinite!r}'
            )
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if affine and not bias:
            # torch's own keyword came after torch 2.10.
            self.register_parameter("bias", None)
        if activation is not None:
            self.activation = activation
        if nonfinite != "propagate":
            self.nonfinite = nonfinite
        if nonfinite == "skip" and track_running_stats:
            # Not in the state dict, which stays that of torch's module.
            counter = torch.zeros((), dtype=torch.int64, device=device)
            self.register_buffer("skipped_batches", counter, persistent=False)
        if statistics != "ema":
            self.statistics = statistics

    @on_own_backend
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise ``input``, add ``residual`` if given, apply the activation if there is one."""
        self._check_input_dim(input)
        training = self.training and self.statistics != "frozen"
        tracked = not training or self.track_running_stats
        mean = self.running_mean if tracked else None
        var = self.running_var if tracked else None
        update = training and self.track_running_stats
        counter = self.num_batches_tracked if update else None
        folded = self.folded_dropout
        dropout_p = folded[0].p if folded and folded[0].training else 0.0
        momentum = None if self.statistics == "cumulative" else self.momentum
        pending = update and self.statistics == "pending" and not ops.recomputing()
        if update and self.statistics == "pending":
            # A factor of 1 assigns: these become the batch's own statistics.
            mean, var = input.new_full((2, self.num_features), torch.nan, dtype=accumulate_dtype(input))
            counter, momentum = None, 1.0
        output = F.batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            training or (self.running_mean is None and self.running_var is None),
            0.0 if momentum is None and counter is None else momentum,
            self.eps,
            activation=self.activation,
            residual=residual,
            dropout_p=dropout_p,
            num_batches_tracked=counter,
            skipped_batches=self._buffers.get("skipped_batches") if update else None,
        )
        if pending and mean is not None and var is not None:
            self.hold(mean, var, input.numel() // max(1, input.size(1)))
        return output

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.nonfinite != "propagate":
            text += f", nonfinite={self.nonfinite!r}"
        if self.statistics != "ema":
            text += f", statistics={self.statistics!r}"
        return text


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on :func:`modeprobe.functional.batch_norm`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in torch.
        activation: None, "relu", "leaky_relu", "silu", "gelu" or "gelu_tanh", applied in the same pass.
        nonfinite: "propagate" folds every batch into the running statistics; "skip" leaves out batches with a
            non-finite mean or variance, and counts them in the buffer ``skipped_batches``. The output carries
            NaN either way.
        statistics: what becomes of a training batch's statistics: "ema", "cumulative", "frozen" or "pending"
            (until ``commit()`` or ``discard()``); see :class:`modeprobe.nn.policy.StatisticsPolicy`.

    Raises:
        ValueError: an unknown activation, nonfinite or statistics; in the forward pass, what torch raises.

    Shape:
        (N, C) or (N, C, L), and the same for the output; ``forward(input, residual=None)`` adds a residual of
        that shape before the activation.
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on :func:`modeprobe.functional.batch_norm`; arguments of
    :class:`modeprobe.nn.BatchNorm1d`, input (N, C, H, W), contiguous or channels_last."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on :func:`modeprobe.functional.batch_norm`; arguments of
    :class:`modeprobe.nn.BatchNorm1d`, input (N, C, D, H, W), contiguous or channels_last_3d."""

"""BatchNorm modules: torch's own, with modeprobe's kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.parametrize import is_parametrized

from modeprobe import functional as F
from modeprobe.functional.batch_norm import plain_batch_norm
from modeprobe.nn._backend import on_own_backend
from modeprobe.nn.fused import in_one_pass
from modeprobe.nn.policy import StatisticsPolicy
from modeprobe.ops import batch_norm as ops
from modeprobe.ops.sync_batch_norm import sum_over_processes
from modeprobe.reference import accumulate_dtype

_OPTIONS = ("activation", "negative_slope", "dropout_p", "nonfinite", "float32_buffers")
_HALVES = (torch.float16, torch.bfloat16)


class _BatchNorm(StatisticsPolicy, nn.modules.batchnorm._BatchNorm):
    """What all dimensions share. Options are class attributes, so that a torch.nn module whose class is
    changed to one of these has them."""

    activation: str | None = None
    negative_slope = 0.01
    dropout_p = 0.0
    nonfinite = "propagate"
    float32_buffers = True
    # This layer and those that swap(fuse=True) folded into it; not submodules, so in a plain sequence.
    fused_run: Sequence[Any] = ()
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
        negative_slope: float = 0.01,
        dropout_p: float = 0.0,
        nonfinite: str = "propagate",
        float32_buffers: bool = True,
        statistics: str = "ema",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:
            # torch's own keyword came after torch 2.10.
            self.register_parameter("bias", None)
        self._set_options(activation, negative_slope, dropout_p, nonfinite, float32_buffers)
        if statistics != "ema":
            self.statistics = statistics

    def _set_options(
        self,
        activation: str | None,
        negative_slope: float,
        dropout_p: float,
        nonfinite: str,
        float32_buffers: bool,
    ) -> None:
        name = type(self).__name__
        if activation not in ops.ACTIVATIONS:
            names = ", ".join(map(repr, ops.ACTIVATIONS))
            raise ValueError(f"{name}: activation must be one of {names}, got {activation!r}")
        if not 0.0 <= dropout_p <= 1.0:
            raise ValueError(f"{name}: dropout_p must be in [0, 1], got {dropout_p}")
        if nonfinite not in ("propagate", "skip"):
            raise ValueError(f'{name}: nonfinite must be "propagate" or "skip", got {nonfinite!r}')
        self.activation, self.negative_slope, self.dropout_p = activation, negative_slope, dropout_p
        self.nonfinite, self.float32_buffers = nonfinite, float32_buffers
        counter = self.num_batches_tracked
        if nonfinite == "skip" and counter is not None:
            # Not in the state dict, which stays that of torch's module.
            self.register_buffer("skipped_batches", torch.zeros_like(counter), persistent=False)
        self._widen()

    def _widen(self) -> None:
        if self.float32_buffers:
            for key in ("running_mean", "running_var"):
                buffer = self._buffers[key]
                if buffer is not None and buffer.dtype in _HALVES:
                    self._buffers[key] = buffer.float()

    def reset_running_stats(self) -> None:
        """As torch's; the count of skipped batches and what is pending begin anew, too."""
        super().reset_running_stats()
        for own in (self._buffers.get("skipped_batches"), self._pending):
            if own is not None:
                own.zero_()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # With assign=True the state dict's tensors take the buffers' place, whatever their dtype and device.
        self._widen()
        counter, own = self.num_batches_tracked, self._buffers.get("skipped_batches")
        if counter is not None and own is not None and own.device != counter.device:
            self.skipped_batches = torch.zeros_like(counter) if own.is_meta else own.to(counter.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {key: self._buffers.get(key) for key in ("running_mean", "running_var")}
        result = super()._apply(fn, recurse)
        if self.float32_buffers:
            # A running mean in bfloat16 stands still once a batch moves it by less than 1/256 of its size.
            for key, buffer in before.items():
                after = self._buffers.get(key)
                if buffer is not None and after is not None and after.dtype in _HALVES:
                    wide = buffer if buffer.is_meta and not after.is_meta else buffer.to(after.device)
                    self._buffers[key] = (after if wide.is_meta and not after.is_meta else wide).float()
        return result

    def _uses_batch(self) -> bool:
        """Whether a forward now normalises as in training; where nothing is tracked, nothing is frozen."""
        return self.training and (self._statistics != "frozen" or not self.track_running_stats)

    def _plain(self, input: Tensor) -> Tensor | None:
        """The commonest forward pass in the fewest steps; None where anything is out of the ordinary."""
        if (
            self._statistics != "ema"
            or self.activation is not None
            or self.dropout_p != 0.0
            or self.fused_run
            or not self.track_running_stats
        ):
            return None
        # Without nn.Module.__getattr__, which takes a microsecond each; what is a property is not in there.
        parameters, buffers = self._parameters, self._buffers
        if "skipped_batches" in buffers:
            return None
        try:
            mean, var, counter = (
                buffers["running_mean"],
                buffers["running_var"],
                buffers["num_batches_tracked"],
            )
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError:
            return None
        return plain_batch_norm(
            input, mean, var, weight, bias, self.training, self.momentum, self.eps, counter
        )

    def _batch_norm(
        self,
        input: Tensor,
        residual: Tensor | None,
        function: Callable[..., Tensor],
        count_all: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """`count_all` makes of the values per channel here those in all processes."""
        policy = self._statistics
        training = self._uses_batch()
        update = training and self.track_running_stats
        mean, var = self.running_mean, self.running_var
        without_buffers = mean is None and var is None
        if training and not update:
            mean = var = None
        counter = self.num_batches_tracked if update else None
        momentum = None if policy == "cumulative" else self.momentum
        pending = update and policy == "pending"
        if pending:
            # A factor of 1 assigns: these become the batch's own statistics.
            mean, var = input.new_full((2, self.num_features), torch.nan, dtype=accumulate_dtype(input))
            counter, momentum = input.new_zeros((), dtype=torch.int64), 1.0
        activation, dropout_p = self.activation, self.dropout_p if self.training else 0.0
        run = self.fused_run
        if run and not in_one_pass(run):
            activation, dropout_p = None, 0.0
        elif len(run) == 3 and run[2].training:
            dropout_p = run[2].p
        output = function(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            training or without_buffers,
            0.0 if momentum is None and counter is None else momentum,
            self.eps,
            activation=activation,
            negative_slope=self.negative_slope,
            residual=residual,
            dropout_p=dropout_p,
            num_batches_tracked=counter,
            skipped_batches=self._buffers.get("skipped_batches") if update else None,
        )
        if pending and mean is not None and var is not None and counter is not None:
            n = input.numel() // max(1, input.size(1))
            self.hold(mean, var, n if count_all is None else count_all(n), counter)
        return output

    @on_own_backend
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise ``input``, add ``residual`` if given, then activation and dropout if there are any."""
        self._check_input_dim(input)
        if residual is None and not is_compiling():
            output = self._plain(input)
            if output is not None:
                return output
        return self._batch_norm(input, residual, F.batch_norm)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in _OPTIONS:
            value = getattr(self, name)
            if value != getattr(_BatchNorm, name):
                text += f", {name}={value!r}"
        if self.statistics != "ema":
            text += f", statistics={self.statistics!r}"
        return text


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on :func:`modeprobe.functional.batch_norm`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in torch.
        activation: None, "relu", "leaky_relu", "silu", "gelu" or "gelu_tanh", applied in the same pass.
        negative_slope: of "leaky_relu".
        dropout_p: probability of a dropout after the activation, in training, in the same pass.
        nonfinite: "propagate" folds every batch into the running statistics; "skip" leaves out batches with a
            non-finite mean or variance, and counts them in the buffer ``skipped_batches``. The output carries
            NaN either way.
        float32_buffers: keep the running statistics in float32 when the module becomes float16 or bfloat16,
            which cannot hold a moving average.
        statistics: what becomes of a training batch's statistics: "ema", "cumulative", "frozen" or "pending"
            (until ``commit()`` or ``discard()``); see :class:`modeprobe.nn.policy.StatisticsPolicy`.

    Raises:
        ValueError: an unknown activation, nonfinite or statistics, dropout_p outside [0, 1]; in the forward
            pass, what :func:`modeprobe.functional.batch_norm` raises.

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


class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    """:class:`torch.nn.SyncBatchNorm`: in training, statistics over the batches of all processes.

    One all-gather of (n, mean, M2) forward and one all-reduce backward; no wait for the device. Processes may
    have batches of different sizes, also empty ones. Twice differentiable, with four more messages. Runs on
    any device that the process group serves; without one, or in evaluation, it is
    :class:`modeprobe.nn.BatchNorm1d` for inputs of any dimension.

    Args:
        process_group: the processes that share statistics; by default all.
        others: those of :class:`modeprobe.nn.BatchNorm1d`.

    Shape:
        (N, C, *), and the same for the output.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.process_group = process_group

    @on_own_backend
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """As :meth:`modeprobe.nn.BatchNorm1d.forward`."""
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        distributed = torch.distributed
        if self._uses_batch() and distributed.is_available() and distributed.is_initialized():
            group = self.process_group or distributed.group.WORLD
            if distributed.get_world_size(group) > 1:
                return self._batch_norm(
                    input,
                    residual,
                    lambda *args, **options: F.sync_batch_norm(*args, group=group, **options),
                    lambda n: sum_over_processes(input.new_tensor(n, dtype=torch.int64), group),
                )
        return self._batch_norm(input, residual, F.batch_norm)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Make every BatchNorm layer in ``module`` one of this class, in place, and return the module.

        The module objects stay, as with :func:`modeprobe.swap`, and with them parameters, buffers, hooks,
        modeprobe's options and what was fused into the layer. ``module`` itself may be such a layer.

        Raises:
            ValueError: a layer is lazy and has seen no input yet, or is parametrized. Nothing was changed.
        """
        norms = nn.modules.batchnorm._BatchNorm
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, norms)}
        for name, layer in layers.items():
            reason = None
            if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
                reason = "lazy; run one forward pass first"
            elif is_parametrized(layer):
                reason = "parametrized; convert first, then parametrize"
            if reason is not None:
                raise ValueError(f"convert_sync_batchnorm: {name or 'module'} is {reason}")
        for layer in layers.values():
            layer.__class__ = cls
            layer.process_group = process_group
        return module

"""The BatchNorm layers of a model: which there are, which are frozen, and how to make them normalise with
statistics that are not in their buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

# (layer number, input) -> (mean, biased variance) to normalise with, or None for the layer's own buffers
Provider = Callable[[int, Tensor], "tuple[Tensor, Tensor] | None"]
# (layer number, args, kwargs of its forward) -> its output, or None to leave it to the layer
Instead = Callable[[int, tuple[Any, ...], dict[str, Any]], "Tensor | None"]
# which layers: names, modules, or a predicate of (name, module)
Selection = Iterable[Any] | Callable[[str, nn.Module], bool] | None


@dataclass(eq=False)
class Layer:
    name: str
    module: nn.Module
    channels: int
    frozen: str = ""  # why its statistics must not change; "" if they may

    @property
    def has_buffers(self) -> bool:
        return self.module._buffers.get("running_mean") is not None

    @property
    def running(self) -> tuple[Tensor, Tensor]:
        """The buffers themselves."""
        mean, variance = self.module._buffers["running_mean"], self.module._buffers["running_var"]
        assert mean is not None
        assert variance is not None
        return mean, variance

    @property
    def momentum(self) -> float | None:
        return getattr(self.module, "momentum", 0.0)

    @property
    def eps(self) -> float:
        return float(getattr(self.module, "eps", 1e-5))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile.

    Their forwards may communicate or be compiled without our hooks; the module inside runs the same numbers.
    """
    wrappers = ("DataParallel", "DistributedDataParallel")
    while True:
        if type(model).__name__ in wrappers and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module  # type: ignore[assignment]
        elif type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def is_frozen_class(module: nn.Module) -> bool:
    """A BatchNorm without mode, as torchvision's, timm's and detectron2's FrozenBatchNorm2d."""
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    return (
        not isinstance(module, _BatchNorm)
        and "BatchNorm" in type(module).__name__
        and isinstance(mean, Tensor)
        and isinstance(var, Tensor)
        and mean.dim() == 1
    )


def find_layers(model: nn.Module) -> list[Layer]:
    """Every BatchNorm layer, in the order of `named_modules`, with the reason if it is frozen.

    Frozen is: a class without mode (FrozenBatchNorm2d); the statistics policy "frozen"; a layer in evaluation
    inside a model in training; in a model in evaluation, a layer of which no parameter requires a gradient
    while others of the model do.
    """
    trains = any(parameter.requires_grad for parameter in model.parameters())
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            if any(is_lazy(value) for value in (*module.parameters(False), *module.buffers(False))):
                raise ValueError(
                    f"{name or 'model'} ({type(module).__name__}) is not initialised; run a batch first"
                )
            own = list(module.parameters(recurse=False))
            if getattr(module, "statistics", None) == "frozen":
                reason = 'statistics="frozen"'
            elif model.training and not module.training:
                reason = "in evaluation while the model trains"
            elif not model.training and own and trains and not any(p.requires_grad for p in own):
                reason = "its parameters do not require gradients"
            else:
                reason = ""
            layers.append(Layer(name, module, int(module.num_features), reason))
        elif is_frozen_class(module):
            channels = cast(Tensor, module.running_mean).numel()
            layers.append(Layer(name, module, channels, type(module).__name__))
    return layers


def select(layers: list[Layer], wanted: Selection) -> list[Layer]:
    """The layers to work on: those not frozen, or exactly those `wanted` by name, module or predicate."""
    if wanted is None:
        return [layer for layer in layers if not layer.frozen]
    if callable(wanted):
        return [layer for layer in layers if wanted(layer.name, layer.module)]
    chosen = []
    for item in wanted:
        found = [layer for layer in layers if layer.module is item or layer.name == item]
        if not found:
            raise ValueError(f"layers: {item!r} is no BatchNorm layer of this model")
        chosen += found
    return [layer for layer in layers if any(layer is other for other in chosen)]


@contextmanager
def normalising_with(
    layers: list[Layer], provide: Provider, instead: Instead | None = None
) -> Iterator[None]:
    """While inside, layer i normalises with what `provide(i, input)` gives, its buffers being put aside for
    the length of its own forward; where `instead(i, args, kwargs)` gives an output, that is the layer's
    output. The layers must be in evaluation mode: then a forward writes no buffer, and batches of one value
    per channel are legal."""

    def stand_in(number: int, module: nn.Module) -> Callable[..., Any]:
        forward, buffers = module.forward, module._buffers

        def run(*args: Any, **kwargs: Any) -> Any:
            if instead is not None:
                output = instead(number, args, kwargs)
                if output is not None:
                    return output
            x: Tensor = args[0] if args else kwargs["input"]
            given = provide(number, x)
            if given is None:
                return forward(*args, **kwargs)
            kept = buffers["running_mean"], buffers["running_var"]
            like = next((t for t in (*kept, module._parameters.get("weight")) if t is not None), x)
            try:
                buffers["running_mean"], buffers["running_var"] = given[0].to(like), given[1].to(like)
                return forward(*args, **kwargs)
            finally:
                buffers["running_mean"], buffers["running_var"] = kept

        return run

    own = [vars(layer.module).get("forward") for layer in layers]
    try:
        for number, layer in enumerate(layers):
            vars(layer.module)["forward"] = stand_in(number, layer.module)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                vars(layer.module).pop("forward", None)
            else:
                vars(layer.module)["forward"] = forward


def batch_or_pooled(n: int, mean: Tensor, m2: Tensor, layer: Layer, pooled: Any) -> tuple[Tensor, Tensor]:
    """What a layer normalises with in a batch of `n` values per channel: the batch's own mean and biased
    variance; for a single value, which has no variance, the statistics pooled so far (`pooled()`, with this
    batch in them), or before there are any the layer's buffers where they are usable, or variance 1."""
    if n > 1:
        return mean, m2 / n
    seen = pooled()
    variance = seen.m2 / seen.n.clamp(min=1)
    usable = (seen.n > 1) & (variance > 0)
    spare_mean, spare_variance = mean, torch.ones_like(variance)
    if layer.has_buffers:
        own_mean, own_variance = (buffer.to(mean) for buffer in layer.running)
        sound = own_mean.isfinite() & own_variance.isfinite() & (own_variance > 0)
        spare_mean = torch.where(sound, own_mean, spare_mean)
        spare_variance = torch.where(sound, own_variance, spare_variance)
    return torch.where(usable, seen.mean, spare_mean), torch.where(usable, variance, spare_variance)

"""The same call of a torch function without its effect of the training mode."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from modeprobe.probe.events import argument, is_recurrent, mode_index, recurrent_dropout_index


def silenced(func: Any, name: str, kind: str, args: tuple, kwargs: dict) -> tuple[tuple, dict, bool]:
    """Arguments of the same call as in eval mode, and whether there are such."""
    args_list, kwargs = list(args), dict(kwargs)

    def put(index: int, names: tuple[str, ...], value: Any) -> None:
        for key in names:
            if key in kwargs:
                kwargs[key] = value
                return
        if len(args_list) > index:
            args_list[index] = value
        else:
            kwargs[names[0]] = value

    if is_recurrent(name):
        args_list[recurrent_dropout_index(args) or 0] = 0.0
    elif name == "scaled_dot_product_attention":
        put(4, ("dropout_p",), 0.0)
    elif name == "multi_head_attention_forward":
        put(10, ("dropout_p",), 0.0)
    elif kind in ("dropout", "depth"):
        put(mode_index(name), ("training", "train"), False)
    elif kind == "statistics":
        at = 1 if getattr(func, "__module__", "") == "torch.nn.functional" else 3
        if not isinstance(argument(args, kwargs, at, ("running_mean",), None), Tensor):
            return args, kwargs, False
        put(5, ("use_input_stats",) if name == "instance_norm" else ("training",), False)
    return tuple(args_list), kwargs, True

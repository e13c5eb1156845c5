"""Dropout of elements and of channels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary

from modeprobe import mask
from modeprobe.functional._arguments import (
    check_data,
    inverted,
    key_for,
    overridable,
    probability,
    shared_dims,
    signed_offset,
)
from modeprobe.ops import backend
from modeprobe.ops import dropout as ops


def dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    offset: int = 0,
    mask_shape: Sequence[int] | None = None,
    scaling: str = "inverted",
) -> Tensor:
    """Set each element to zero with probability ``p`` and scale the others by ``1 / (1 - p)``.

    Like :func:`torch.nn.functional.dropout`, under the mask contract: which elements are dropped depends on
    the key, their position and ``p`` only, not on device, dtype or number of threads. Nothing but the key, 16
    bytes, is saved for the backward pass. A dropped NaN or infinity becomes zero.

    Args:
        input: float16, bfloat16, float32 or float64, any shape. Positions count in memory order if the tensor
            is dense (contiguous, channels_last, transposed), else row-major. Of a nested tensor, contiguous
            and with ``layout=torch.jagged``, the values are the input.
        p: drop probability in [0, 1]. A tensor with one element, of any real dtype, on the input's device is
            read by the kernel, so nothing waits for the device and a new value does not recompile; where its
            value is not at hand (on a GPU, in a graph) it may be clamped to [0, 1] instead of checked. ``p``
            gets no gradient.
        training: False returns ``input``, with classic scaling ``(1 - p) * input``.
        inplace: write the result into ``input``.
        key: int64 tensor of shape (2,) on the input's device, see :func:`modeprobe.mask.key`. By default a
            fresh one from torch's generator of that device.
        offset: index of the first element in the mask, in [0, 2^64). Shards of a tensor that share a key pass
            the number of elements before them and get their slice of the whole tensor's mask.
        mask_shape: a shape that broadcasts to the input's: elements that share a place in it share their
            fate. Positions then count row-major in ``mask_shape``. By default every element has its own.
        scaling: "inverted", or "classic": no scaling in training, ``1 - p`` in evaluation.

    Returns:
        A tensor of the input's shape, dtype and, if it is dense, strides; else contiguous. With ``p=0`` or
        without ``training``, ``input`` itself.

    Raises:
        ValueError, TypeError: an argument is not as above, or ``input`` is a DTensor: give ``to_local()``.
        RuntimeError: the selected backend cannot run on this device.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            dropout,
            (input,),
            input,
            p,
            training,
            inplace,
            key=key,
            offset=offset,
            mask_shape=mask_shape,
            scaling=scaling,
        )
    # The commonest call first, and written out: a tensor of 16 elements feels every call of a function.
    if (
        training
        and type(input) is Tensor
        and key is None
        and mask_shape is None
        and not (inplace or offset)
        and type(p) is float
        and 0.0 < p <= 1.0
        and scaling == "inverted"
        and input.dtype in ops.DTYPES
        and not is_compiling()
    ):
        try:
            y = ops.fresh_dropout(input, p)
        except NotImplementedError:  # of a layout that check_data names
            y = None
        if y is not None:
            return y
    p_tensor = None
    if type(p) is not float or not 0.0 <= p <= 1.0:
        p, p_tensor = probability(p, input.device, "dropout")
    scaled = scaling == "inverted" or inverted(scaling, "dropout")
    if _keeps_all(p, p_tensor, training):
        if scaled or training:
            return input
        rest = 1.0 - p if p_tensor is None else (1.0 - p_tensor).to(input.dtype)
        return input.mul_(rest) if inplace else input * rest
    if input.layout is torch.jagged:
        options = {"key": key, "offset": offset, "mask_shape": mask_shape, "scaling": scaling}
        return _jagged(input, p if p_tensor is None else p_tensor, inplace, **options)
    check_data(input, "dropout")
    offset = signed_offset(offset, "dropout")
    if mask_shape is None:
        return _masked(input, "dropout", (offset, scaled), key, p, p_tensor, inplace, "dropout")
    shared = shared_dims(mask_shape, input.shape, "dropout")
    return _masked(
        input, "structured_dropout", (shared, offset, scaled), key, p, p_tensor, inplace, "dropout"
    )


def _jagged(input: Any, p: float | Tensor, inplace: bool, **options: Any) -> Tensor:
    """Dropout of a nested tensor: that of its values."""
    if inplace or options["mask_shape"] is not None or not input.is_contiguous():
        raise ValueError(
            "dropout: a nested tensor must be contiguous, not written in place and without mask_shape, "
            f"got inplace={inplace}, mask_shape={options['mask_shape']}, contiguous={input.is_contiguous()}"
        )
    values = dropout(input.values(), p, **options)
    return torch.nested.nested_tensor_from_jagged(values, input.offsets())


def _keeps_all(p: float, p_tensor: Tensor | None, training: bool) -> bool:
    return not training or (p == 0.0 and p_tensor is None)


def _masked(
    input: Tensor,
    operator: str,
    arguments: tuple,
    key: Tensor | None,
    p: float,
    p_tensor: Tensor | None,
    inplace: bool,
    who: str,
) -> Tensor:
    key = key_for(key, input.device, who)
    run = ops.masked_ if inplace else ops.masked
    return run(input, key, p_tensor, p, arguments, operator, backend.resolve(input.device.type))


def dropout_mask(shape: Sequence[int] | int, p: float | Tensor, key: Tensor, offset: int = 0) -> Tensor:
    """The mask that :func:`dropout` would apply to a contiguous tensor.

    Args:
        shape: the tensor's shape.
        p: drop probability in [0, 1]; a float or a tensor with one element on the key's device.
        key: int64 tensor of shape (2,), see :func:`modeprobe.mask.key`.
        offset: index of the first element, in [0, 2^64).

    Returns:
        bool tensor of ``shape`` on the key's device; True where an element is kept.

    Raises:
        ValueError, TypeError: an argument is not as above.
    """
    mask.check_key(key, "dropout_mask")
    p, p_tensor = probability(p, key.device, "dropout_mask")
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"dropout_mask: shape must not have negative sizes, got {sizes}")
    flat = ops.dropout_mask(key, math.prod(sizes), p, signed_offset(offset, "dropout_mask"), p_tensor)
    return flat.view(sizes)


def _structured(
    input: Tensor,
    p: float | Tensor,
    training: bool,
    inplace: bool,
    key: Tensor | None,
    offset: int,
    first: int | None,
    who: str,
    *,
    alpha: bool = False,
) -> Tensor:
    """Dropout under a mask of the ``first`` dimensions, shared along the others; None: shared by nothing."""
    p, p_tensor = probability(p, input.device, who)
    if _keeps_all(p, p_tensor, training):
        return input
    check_data(input, who)
    if first is not None and input.dim() < first:
        raise RuntimeError(
            f"{who}: input must have at least {first} dimensions, got shape {tuple(input.shape)}"
        )
    shared = [] if first is None else list(range(first, input.dim()))
    offset = signed_offset(offset, who)
    if alpha:
        return _masked(input, "alpha_dropout", (shared, False, offset), key, p, p_tensor, inplace, who)
    return _masked(input, "structured_dropout", (shared, offset, True), key, p, p_tensor, inplace, who)


def _purpose(who: str, spatial: int) -> str:
    """The end of torch's messages about inputs of unexpected dimensions."""
    return (
        f"Note that {who} exists to provide channel-wise dropout on inputs with {spatial} spatial "
        f"dimension{'s' if spatial > 1 else ''}, a channel dimension, and an optional batch dimension "
        f"(i.e. {spatial + 1}D or {spatial + 2}D inputs)."
    )


def _warn_unless(expected: bool, dims: int, who: str, spatial: int) -> None:
    if not expected:
        warnings.warn(
            f"{who}: Received a {dims}-D input to {who}, which is deprecated and will result in an error in "
            "a future release. To retain the behavior and silence this warning, please use dropout instead. "
            + _purpose(who, spatial),
            stacklevel=4,
        )


@overridable
def dropout1d(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Zero whole channels of a (N, C, L) or (C, L) input with probability ``p``, scale the others.

    :func:`torch.nn.functional.dropout1d` under the mask contract: the mask has shape (N, C), and positions
    count row-major in it. A dropped channel is not read. Arguments as in :func:`dropout`.

    Raises:
        RuntimeError: the input has neither 2 nor 3 dimensions.
        ValueError, TypeError: as :func:`dropout`.
    """
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input. "
            + _purpose("dropout1d", 1)
        )
    return _structured(input, p, training, inplace, key, offset, 2 if input.dim() == 3 else 1, "dropout1d")


@overridable
def dropout2d(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Zero whole channels of a (N, C, H, W) input with probability ``p``, scale the others.

    :func:`torch.nn.functional.dropout2d` under the mask contract: the mask has shape (N, C), and positions
    count row-major in it. A dropped channel is not read. As there, a 3-D input counts as (N, C, L). Arguments
    as in :func:`dropout`.

    Raises:
        RuntimeError: the input has fewer than 2 dimensions.
        ValueError, TypeError: as :func:`dropout`.
    """
    dims = input.dim()
    _warn_unless(dims in (3, 4), dims, "dropout2d", 2)
    if dims == 3:
        warnings.warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise "
            "1D dropout behavior is desired - input is interpreted as shape (N, C, L), where C "
            "is the channel dim. This behavior will change in a future release to interpret the "
            "input as one without a batch dimension, i.e. shape (C, H, W). To maintain the 1D "
            "channel-wise dropout behavior, please switch to using dropout1d instead.",
            stacklevel=3,
        )
    return _structured(input, p, training, inplace, key, offset, 2, "dropout2d")


@overridable
def dropout3d(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Zero whole channels of a (N, C, D, H, W) or (C, D, H, W) input with probability ``p``, scale the rest.

    :func:`torch.nn.functional.dropout3d` under the mask contract: the mask has shape (N, C), and positions
    count row-major in it. A dropped channel is not read. Arguments as in :func:`dropout`.

    Raises:
        RuntimeError: the input has no dimensions.
        ValueError, TypeError: as :func:`dropout`.
    """
    _warn_unless(input.dim() in (4, 5), input.dim(), "dropout3d", 3)
    return _structured(input, p, training, inplace, key, offset, 2 if input.dim() == 5 else 1, "dropout3d")


@overridable
def drop_path(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Stochastic depth: zero whole examples, along dimension 0, with probability ``p``, scale the rest.

    Huang et al., "Deep networks with stochastic depth" (2016), with inverted scaling. The mask has shape
    (N,). Arguments as in :func:`dropout`.

    Raises:
        RuntimeError: the input has no dimensions.
        ValueError, TypeError: as :func:`dropout`.
    """
    return _structured(input, p, training, inplace, key, offset, 1, "drop_path")


@overridable
def alpha_dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Dropout that keeps the mean and variance of standardised activations, for networks of SELUs.

    :func:`torch.nn.functional.alpha_dropout` under the mask contract, in one pass: dropped elements take the
    value that SELU saturates at, then all are scaled and shifted (Klambauer et al., "Self-normalizing neural
    networks", 2017). With ``p=1`` the result is zero, as in torch. Arguments as in :func:`dropout`, but
    ``training`` is False by default, as in torch.

    Raises:
        ValueError, TypeError: as :func:`dropout`.
    """
    return _structured(input, p, training, inplace, key, offset, None, "alpha_dropout", alpha=True)


@overridable
def feature_alpha_dropout(
    input: Tensor,
    p: float | Tensor = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    key: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """:func:`alpha_dropout` of whole channels: input (N, C, *), mask (N, C).

    Raises:
        RuntimeError: the input has fewer than 2 dimensions.
        ValueError, TypeError: as :func:`dropout`.
    """
    return _structured(input, p, training, inplace, key, offset, 2, "feature_alpha_dropout", alpha=True)

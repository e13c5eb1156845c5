"""Inputs at the sizes that a model's complaint asks for, by the words of torch and transformers."""

from __future__ import annotations

import linecache
import math
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

BATCH = 2

Inputs = dict[str, Any]

_LONGEST = 1000  # that an input is made along its length: a sound is another input's
_GOT, _EXPECTED = r"(?P<got>\d+)", r"(?P<expected>\d+)"
_SIZES_EXPECTED = (
    # got, expected: by a linear layer, a normalisation, a convolution, a sum (either way round)
    (re.compile(r"cannot be multiplied \(\d+x(?P<got>\d+) and (?P<expected>\d+)x\d+\)"), -1),
    (re.compile(rf"[Ee]xpected size {_GOT} but got size {_EXPECTED}"), 1),
    (re.compile(rf"batch2 tensor to be: \[\d+, {_GOT}\] but got: \[\d+, {_EXPECTED}\]"), -1),
    (re.compile(r"normalized_shape=\[(?P<expected>\d+)\].*got input of size\[.*?(?P<got>\d+)\]"), -1),
    (re.compile(r"to have (?P<expected>\d+) channels, but got (?P<got>\d+) channels"), 1),
    *(
        (
            re.compile(rf"tensor a \({a}\) must match .* tensor b \({b}\) at .*dimension {dimension}"),
            dimension,
        )
        for dimension in (1, 2)
        for a, b in ((_GOT, _EXPECTED), (_EXPECTED, _GOT))
    ),
)
_PICTURE_EXPECTED = re.compile(r"image size \((\d+)\*(\d+)\) doesn't match model \((\d+)\*(\d+)\)")
_TOKENS_EXPECTED = re.compile(r"to have shape `?\(batch_size, (\d+)\)`?, but got shape \D*\d+, (\d+)\]")
_MULTIPLE_EXPECTED = re.compile(r"multiple of (?:`[^`]*` \()?`?(\d+)")
_TOO_SHORT = re.compile(
    r"[Kk]ernel size can't be greater than actual input|[Pp]adding size should be less than"
)
_PLANE_EXPECTED = re.compile(
    r"weight of size \[\d+, (?P<channels>\d+), \d+, \d+\], "
    r"expected input\[1, (?P<got>\d+(?:, \d+)*)\] to have"
)
_INDEX_TOO_LARGE = re.compile(r"index (\d+) is out of bounds for dimension \d+ with size (\d+)")
_INDEX_OUT_OF_LIST = re.compile(r"index (\d+) is out of range")
_VIEWED = re.compile(r"shape '\[(\d+(?:, \d+)*)\]' is invalid for input of size (\d+)")
_CODEBOOKS = re.compile(r"shape '\[-1, (\d+), (\d+)\]' is invalid")
_TOKENS_BY_CODEBOOK = re.compile(
    r"tensor a \((\d+)\) must match the size of tensor b \((\d+)\) at non-singleton dimension 1"
)
_WORD = re.compile(r"\b[a-z]\w+")


def resized(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With the sizes, or one more dimension, that the failure says are missing."""
    yield from _with_expected_sizes(inputs, failure)
    yield from _with_expected_pictures(inputs, failure)
    yield from _with_a_multiple(inputs, failure)
    yield from _with_masks_by_picture(inputs, failure)
    yield from _with_codebooks(inputs, failure)
    yield from _as_viewed(inputs, failure)
    yield from _longer(inputs, failure)
    yield from _with_planes(inputs, failure)
    yield from _with_indices_in_range(inputs, failure)


def read_where_raised(error: Exception) -> Iterator[list[str]]:
    """The names in the model's code that raised, then in its callers: one may be an input that is None."""
    if not isinstance(error, (TypeError, AttributeError)):
        return
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed([frame for frame in frames if "torch" not in Path(frame.filename).parts]):
        first = frame.lineno or 0
        lines = range(first, (getattr(frame, "end_lineno", None) or first) + 1)  # Python 3.10 has no end
        yield _WORD.findall("".join(linecache.getline(frame.filename, line) for line in lines))


def _with_expected_sizes(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With a floating point input of the size complained of, or two more, at the size asked for."""
    for pattern, dimension in _SIZES_EXPECTED:
        found = pattern.search(failure)
        if found is None:
            continue
        got, expected = int(found["got"]), int(found["expected"])
        if dimension > 0 and expected > _LONGEST:
            continue
        for name, value in inputs.items():
            shape = list(value.shape) if isinstance(value, torch.Tensor) and value.is_floating_point() else []
            # Two more in the last dimension: positions that the model takes off first.
            if len(shape) > max(dimension, 1) and shape[dimension] - got in (0, 2 if dimension == -1 else 0):
                shape[dimension] += expected - got
                yield {**inputs, name: torch.randn(shape, generator=torch.Generator().manual_seed(1))}


def _with_expected_pictures(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With all pictures smaller by as much as the refused one is too large: models put some together.

    Or larger by as much as there were too few tokens in them.
    """
    if found := _PICTURE_EXPECTED.search(failure):
        height, width, right_height, right_width = map(int, found.groups())
    elif found := _TOKENS_EXPECTED.search(failure):
        right_height, height = (math.isqrt(int(count)) for count in found.groups())
        right_width, width = right_height, height
    else:
        return
    resized = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.dim() > 3:
            rows = max(1, value.shape[-2] * right_height // height)
            columns = max(1, value.shape[-1] * right_width // width)
            tiled = value.repeat(
                *[1] * (value.dim() - 2), -(-rows // value.shape[-2]), -(-columns // value.shape[-1])
            )
            resized[name] = tiled[..., :rows, :columns].contiguous()
    yield {**inputs, **resized}


def _with_a_multiple(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With the last dimension of a floating point input as long as the next multiple asked for."""
    found = _MULTIPLE_EXPECTED.search(failure)
    for name, value in inputs.items() if found else ():
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        if found and floating and (short := -value.shape[-1] % int(found[1])):
            length = value.shape[-1] + short
            tiled = value.repeat(*[1] * (value.dim() - 1), -(-length // value.shape[-1]))
            yield {**inputs, name: tiled[..., :length].contiguous()}


def _longer(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With sounds and features eight times as long."""
    if not _TOO_SHORT.search(failure):
        return
    longer = {
        name: value.repeat(*[1] * (value.dim() - 1), 8)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() in (2, 3)
    }
    if longer:
        yield {**inputs, **longer}


def _with_planes(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With planes of as many channels as the convolution has, where it took an input for one sample."""
    found = _PLANE_EXPECTED.search(failure)
    if found is None:
        return
    got = [int(size) for size in found["got"].split(", ")]
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and list(value.shape) == got:
            planes = torch.randn(
                BATCH, int(found["channels"]), 8, 8, generator=torch.Generator().manual_seed(1)
            )
            yield {**inputs, name: planes}


def _with_indices_in_range(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With integers that were too large modulo the size, or not more tokens than there are parts."""
    if found := _INDEX_TOO_LARGE.search(failure):
        index, size = int(found[1]), int(found[2])
        for name, value in inputs.items():
            integers = isinstance(value, torch.Tensor) and value.dtype == torch.long
            if integers and size and bool((value == index).any()):
                yield {**inputs, name: value % size}
    elif found := _INDEX_OUT_OF_LIST.search(failure):
        count = int(found[1])
        shorter = {
            name: value[:, :count]
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
            and value.dtype == torch.long
            and value.dim() == 2
            and value.shape[1] > count > 0
        }
        if shorter:
            yield {**inputs, **shorter}


def _with_masks_by_picture(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With masks of pictures that have one more dimension: a value for each token and picture."""
    pictures = inputs.get("pixel_values")
    if pictures is None or pictures.dim() < 5 or "non-existing dimension" not in failure:
        return
    masks = {
        name: value[..., None].expand(*value.shape, pictures.shape[1])
        for name, value in inputs.items()
        if "image" in name and "mask" in name and value.dim() == 2
    }
    if masks:
        yield {**inputs, **masks}


def _as_viewed(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With a mask of the length it is viewed at; with one sample, where there is enough for one alone."""
    found = _VIEWED.search(failure)
    if found is None:
        return
    sizes = [int(size) for size in found[1].split(", ")]
    for name, value in inputs.items():  # a mask of sounds, of another length than they have
        if "mask" in name and value.numel() == int(found[2]) and sizes[0] == len(value):
            yield {**inputs, name: value.new_ones(len(value), math.prod(sizes[1:]))}
    if sizes[0] == BATCH and math.prod(sizes) == BATCH * int(found[2]):
        yield {
            name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }


def _with_codebooks(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With a row of tokens, or a token in the last dimension, for each codebook."""
    if found := _TOKENS_BY_CODEBOOK.search(failure):
        tokens = inputs.get("input_ids")
        if tokens is not None and tokens.shape == (BATCH, int(found[1])):
            yield {**inputs, "input_ids": tokens[..., None].repeat(1, 1, int(found[2]))}
    found = _CODEBOOKS.search(failure)
    if found is None:
        return
    for name, value in inputs.items():
        if name.endswith("input_ids") and value.shape == (BATCH, int(found[2])):
            yield {**inputs, name: value.repeat_interleave(int(found[1]), dim=0)}

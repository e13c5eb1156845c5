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

_SIZES_EXPECTED = (
    # got, expected: by a linear layer, a normalisation, a convolution, a sum (either way round)
    (re.compile(r"cannot be multiplied \(\d+x(?P<got>\d+) and (?P<expected>\d+)x\d+\)"), -1),
    (re.compile(r"normalized_shape=\[(?P<expected>\d+)\].*got input of size\[.*?(?P<got>\d+)\]"), -1),
    (re.compile(r"to have (?P<expected>\d+) channels, but got (?P<got>\d+) channels"), 1),
    (
        re.compile(
            r"tensor a \((?P<got>\d+)\) must match .* tensor b \((?P<expected>\d+)\) at .*dimension 2"
        ),
        2,
    ),
    (
        re.compile(
            r"tensor a \((?P<expected>\d+)\) must match .* tensor b \((?P<got>\d+)\) at .*dimension 2"
        ),
        2,
    ),
)
_PICTURE_EXPECTED = re.compile(r"image size \((\d+)\*(\d+)\) doesn't match model \((\d+)\*(\d+)\)")
_MULTIPLE_EXPECTED = re.compile(r"multiple of `?(\d+)")
_VIEWED = re.compile(r"shape '\[(\d+(?:, \d+)*)\]' is invalid for input of size (\d+)")
_CODEBOOKS = re.compile(r"shape '\[-1, (\d+), (\d+)\]' is invalid")
_WORD = re.compile(r"\b[a-z]\w+")


def resized(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With the sizes, or one more dimension, that the failure says are missing."""
    yield from _with_expected_sizes(inputs, failure)
    yield from _with_expected_pictures(inputs, failure)
    yield from _with_a_multiple(inputs, failure)
    yield from _with_masks_by_picture(inputs, failure)
    yield from _with_codebooks(inputs, failure)
    yield from _with_one_sample(inputs, failure)


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
        for name, value in inputs.items():
            shape = list(value.shape) if isinstance(value, torch.Tensor) and value.is_floating_point() else []
            # Two more in the last dimension: positions that the model takes off first.
            if len(shape) > max(dimension, 1) and shape[dimension] - got in (0, 2 if dimension == -1 else 0):
                shape[dimension] += expected - got
                yield {**inputs, name: torch.randn(shape, generator=torch.Generator().manual_seed(1))}


def _with_expected_pictures(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With all pictures smaller by as much as the refused one is too large: models put some together."""
    found = _PICTURE_EXPECTED.search(failure)
    if found is None:
        return
    height, width, right_height, right_width = map(int, found.groups())
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
            yield {**inputs, name: torch.nn.functional.pad(value, (0, short), mode="circular")}


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


def _with_one_sample(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With one sample, where the model has for one what it views as for all."""
    found = _VIEWED.search(failure)
    if found is None:
        return
    sizes = [int(size) for size in found[1].split(", ")]
    if sizes[0] == BATCH and math.prod(sizes) == BATCH * int(found[2]):
        yield {
            name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }


def _with_codebooks(inputs: Inputs, failure: str) -> Iterator[Inputs]:
    """With a row of tokens for each codebook."""
    found = _CODEBOOKS.search(failure)
    if found is None:
        return
    for name, value in inputs.items():
        if name.endswith("input_ids") and value.shape == (BATCH, int(found[2])):
            yield {**inputs, name: value.repeat_interleave(int(found[1]), dim=0)}

"""Inputs for a tiny model of transformers, from its signature, its documentation and its configuration."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from modeprobe.probe.architectures.processors import processed
from modeprobe.probe.architectures.repairs import BATCH, read_where_raised, resized
from modeprobe.probe.architectures.sizes import PICTURE_SIDES, PLACEHOLDERS

LENGTH = 12
DECODER_LENGTH = 8
AUDIO_LENGTH = 96  # with many powers of two, for what is subsampled

Inputs = dict[str, Any]

# As transformers documents them: "name (`torch.LongTensor` of shape `(batch_size, length)`, *optional*):".
_DOCUMENTED = re.compile(r"^\s*(\w+)\s*\(`?([^`\n]*)`?[^\n]*?of shape\s*`?\(([^)`]*)\)", re.MULTILINE)

_MISSING_PLACEHOLDERS = re.compile(
    r"(image|video|audio).*?do(?:es)? not match.*?features\D*(\d+)", re.IGNORECASE | re.DOTALL
)
_ROWS_FOR_MASK = re.compile(
    r"value tensor of shape \[(\d+).*?\] cannot be broadcast to indexing result of shape"
)
_NO_TOKENS = re.compile(r"no attribute 'embed_tokens'|`input_ids` is expected to be `None`")
_NAMED = re.compile(r"[`'](\w+)[`']")
_NOT_TRIED = re.compile(r"labels|inputs_embeds|head_mask|past_|encoder_outputs")


class InputMaker:
    """Keyword arguments for a model's forward: the likeliest first, and repairs of refused ones."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = model.config
        self.parameters = {
            name: parameter
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
        self.documented = {
            name: (kind, [part.strip() for part in shape.split(",") if part.strip()])
            for name, kind, shape in _DOCUMENTED.findall(model.forward.__doc__ or "")
            if name in self.parameters
        }
        self.generator = torch.Generator().manual_seed(1)
        self.length = LENGTH
        self.vocabulary = min(self.size("vocab_size", 64), 64)

    def candidates(self) -> Iterator[Inputs]:
        text = self._text()
        yield from self._with_media(text)
        yield from self._by_processor()
        yield from self._text_alone(text)
        yield from self._by_documentation()

    def repaired(self, inputs: Inputs, error: Exception) -> Iterator[Inputs]:
        """With the inputs, the placeholders in the text, or the sizes that the failure says are missing."""
        failure = " ".join(str(error).split())
        yield from self._with_placeholders(inputs, failure)
        yield from self._with_a_place_for_each(inputs, failure)
        yield from resized(inputs, failure)
        if _NO_TOKENS.search(failure) and "inputs_embeds" in self.parameters:
            rest = {name: value for name, value in inputs.items() if name != "input_ids"}
            yield {**rest, "inputs_embeds": self.documented_tensor("inputs_embeds")}
        raised, *callers = list(read_where_raised(error)) or [[]]
        callers = [[name for name in named if not _NOT_TRIED.search(name)] for named in callers]
        tried = {"inputs_embeds"} if "input_ids" in inputs else set()
        for named in (_NAMED.findall(failure), raised, *callers):
            missing = [
                name for name in dict.fromkeys(named) if name not in tried and self._takes_a_tensor(name)
            ]
            missing = [name for name in missing if name not in inputs]
            tried.update(missing)
            if missing:
                yield {**inputs, **{name: self.documented_tensor(name) for name in missing}}

    def extended(self, inputs: Inputs) -> Iterator[Inputs]:
        """With an optional input that is documented added: some parts are not called without theirs."""
        for name in self.documented:
            if name not in inputs and not _NOT_TRIED.search(name) and self._takes_a_tensor(name):
                yield {**inputs, name: self.documented_tensor(name)}

    def _takes_a_tensor(self, name: str) -> bool:
        parameter = self.parameters.get(name)
        if parameter is None:
            return False
        return parameter.annotation is parameter.empty or "Tensor" in str(parameter.annotation)

    def _with_placeholders(self, inputs: Inputs, failure: str) -> Iterator[Inputs]:
        missing = _MISSING_PLACEHOLDERS.search(failure)
        text = inputs.get("input_ids")
        if missing is None or text is None or text.dim() != 2:
            return
        mark = PLACEHOLDERS[missing[1].lower()]
        text = text[:, text[0] != mark]  # those that were too few, or too many
        # Some models count elements, most count embeddings.
        for width in (1, self.size("hidden_size", 1)):
            count = -(-int(missing[2]) // (len(text) * width))
            marks = text.new_full((len(text), count), mark)
            found = {**inputs, "input_ids": torch.cat((marks, text), dim=1)}
            if "mm_token_type_ids" in self.parameters:
                kinds = (torch.ones_like(marks), torch.zeros_like(text))
                found["mm_token_type_ids"] = torch.cat(kinds, dim=1)
            yield found

    def _with_a_place_for_each(self, inputs: Inputs, failure: str) -> Iterator[Inputs]:
        """With a longer text, and as many places in its mask as there are rows to put into it."""
        found = _ROWS_FOR_MASK.search(failure)
        text = inputs.get("input_ids")
        if found is None or text is None or int(found[1]) % len(text):
            return
        count = int(found[1]) // len(text)
        marked = torch.cat((text.new_ones(len(text), count), torch.zeros_like(text)), dim=1)
        self.length = marked.shape[1]
        longer = {name for name, value in inputs.items() if getattr(value, "shape", None) == text.shape}
        of_places = {name for name in longer if "mask" in name and name != "attention_mask"}
        yield {
            **inputs,
            **{name: marked if name in of_places else self.documented_tensor(name) for name in longer},
        }
        self.length = LENGTH

    def holders(self, config: Any = None) -> Iterator[Any]:
        """The configuration, then those of its parts, pictures first."""
        config = self.config if config is None else config
        yield config
        parts = {name: part for name, part in vars(config).items() if hasattr(part, "model_type")}
        for name in sorted(parts, key=lambda name: "vision" not in name):
            yield from self.holders(parts[name])

    def size(self, name: str, default: int) -> int:
        for holder in self.holders():
            value = getattr(holder, name, None)
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                return value[0]
            if isinstance(value, int) and value > 0:
                return value
        return default

    def tokens(self, *shape: int) -> torch.Tensor:
        # Above the special tokens, below the ids that stand for images and sounds.
        low, high = min(3, self.vocabulary - 1), max(self.vocabulary - 4, 4)
        return torch.randint(low, high, shape, generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def image_sides(self) -> tuple[int, ...]:
        for holder in self.holders():
            side = next(filter(None, (getattr(holder, name, None) for name in PICTURE_SIDES)), None)
            if side:
                return (side, side) if isinstance(side, int) else tuple(side)[:2]
        return (32, 32)

    def _text(self) -> Inputs:
        parameters = self.parameters
        text: Inputs = {}
        if "input_ids" in parameters:
            text["input_ids"] = self.tokens(BATCH, LENGTH)
            if "bbox" in parameters:
                text["bbox"] = torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)
        if "decoder_input_ids" in parameters and getattr(self.config, "is_encoder_decoder", False):
            text["decoder_input_ids"] = self.tokens(BATCH, DECODER_LENGTH)
        return text

    def _with_media(self, text: Inputs) -> Iterator[Inputs]:
        parameters = self.parameters
        decoder = {name: value for name, value in text.items() if name.startswith("decoder")}
        media = {name: shapes for name, shapes in self._media().items() if name in parameters}
        beside = text if "input_ids" in text else decoder
        for grid in ("image_grid_thw", "grid_thw"):
            if grid in parameters:
                yield from ({**text, **patches} for patches in self._patches(grid))
        if "spatial_shapes" in parameters:
            yield {**text, **self._padded_patches()}
        for name, shapes in media.items():
            for shape in shapes:
                values = {name: self.normal(*shape)}
                yield {**beside, **values}
                yield from ({**beside, **values, **mask} for mask in self._masks(name, shape))
                if beside and "pixel_values" not in name:
                    yield {**decoder, **values}
        if len(media) > 1:
            yield {**text, **{name: self.normal(*shapes[0]) for name, shapes in media.items()}}
        if "past_values" in parameters:
            yield self._series()

    def _text_alone(self, text: Inputs) -> Iterator[Inputs]:
        if text:
            yield text
            length = self.size("chunk_size", 16) * 4
            yield {name: self.tokens(BATCH, length) for name in text}
            yield {**text, "use_cache": False}

    def _by_processor(self) -> Iterator[Inputs]:
        for values in processed(self.config.model_type, self.size, self.image_sides()):
            media = {name: value for name, value in values.items() if name in self.parameters}
            media = {name: value for name, value in media.items() if isinstance(value, torch.Tensor)}
            if not media:
                continue
            for text in self._texts():
                yield {**text, **media}
                if text and "attention_mask" in media:  # of the picture's patches
                    rest = {name: value for name, value in media.items() if name != "attention_mask"}
                    yield {**text, **rest}

    def _texts(self) -> Iterator[Inputs]:
        """Nothing, tokens for the decoder, tokens for both."""
        names = [name for name in ("decoder_input_ids", "input_ids") if name in self.parameters]
        if not names or self.parameters[names[-1]].default is not inspect.Parameter.empty:
            yield {}
        for count in range(1, len(names) + 1):
            yield {name: self.tokens(BATCH, LENGTH) for name in names[:count]}

    def _patches(self, grid: str) -> Iterator[Inputs]:
        """Pictures as rows of patches, flattened or as small pictures, and the grid that they come from."""
        patch, merge = self.size("patch_size", 14), self.size("spatial_merge_size", 2)
        channels = self.size("in_channels", 3)
        side = 2 * merge
        name = "pixel_values" if "pixel_values" in self.parameters else "hidden_states"
        flat = channels * self.size("temporal_patch_size", 1) * patch**2
        shapes = [(flat,), (channels, patch, patch)]
        documented = self.documented.get(name, ("", []))[1][1:]
        if len(documented) > 2:
            shapes.append(tuple(self._dimension(part, name) for part in documented))
        for shape in shapes:
            yield {
                name: self.normal(BATCH * side**2, *shape),
                grid: torch.tensor([[1, side, side]] * BATCH),
            }

    def _padded_patches(self) -> Inputs:
        """Pictures as rows of flattened patches, a row each, and their shapes in patches."""
        patch = self.size("patch_size", 16)
        grid = self.documented_tensor("spatial_shapes")
        count = int(grid[0].prod())
        return {
            "pixel_values": self.normal(BATCH, count, self.size("num_channels", 3) * patch**2),
            "pixel_attention_mask": torch.ones(BATCH, count, dtype=torch.long),
            "spatial_shapes": grid,
        }

    def _masks(self, name: str, shape: tuple[int, ...]) -> Iterator[Inputs]:
        """All ones over the time of a sound, whichever dimension that is."""
        if name.startswith("pixel"):
            return
        for mask in ("input_features_mask", "feature_attention_mask", "padding_mask"):
            if mask in self.parameters:
                for length in dict.fromkeys(shape[1:]):
                    yield {mask: torch.ones(BATCH, length, dtype=torch.long)}

    def _media(self) -> dict[str, list[tuple[int, ...]]]:
        channels = self.size("num_channels", 3)
        sides = self.image_sides()
        frames = self.size("num_frames", 4)
        times, patch = self.size("temporal_patch_size", 0), self.size("patch_size", 14)
        bins, audio = self.size("num_mel_bins", 80), self.size("max_length", 128)
        return {
            "pixel_values": [
                *((BATCH, channels, *side) for side in (sides, (64, 64), (224, 224))),
                (BATCH, frames, channels, *sides),
                (BATCH * frames, channels, *sides),
                *[(BATCH, times, patch, patch, channels)] * bool(times),
            ],
            "pixel_values_videos": [(BATCH, self.size("frames_per_clip", frames), channels, *sides)],
            "input_values": [(BATCH, 4000), (BATCH, 1, 4000), (BATCH, audio, self.size("num_mel_bins", 128))],
            "input_features": [
                (BATCH, bins, AUDIO_LENGTH), (BATCH, AUDIO_LENGTH, bins), (BATCH, bins, 3000),
                (BATCH, AUDIO_LENGTH, self.size("feature_size", 80)), (BATCH, AUDIO_LENGTH, 128),
                (BATCH, 1, 1001, 64),
            ],
        }  # fmt: skip

    def _series(self) -> Inputs:
        """Inputs of a time-series model: the past, and the future where it is asked for."""
        config = self.config
        ahead = getattr(config, "prediction_length", None) or 4
        past = (getattr(config, "context_length", None) or ahead) + max(
            getattr(config, "lags_sequence", None) or [0]
        )
        channels = getattr(config, "num_input_channels", None) or getattr(config, "input_size", None) or 1
        width = (channels,) if channels > 1 or hasattr(config, "num_input_channels") else ()
        features = getattr(config, "num_time_features", 0)
        found = {
            "past_values": self.normal(BATCH, past, *width),
            "past_time_features": self.normal(BATCH, past, features),
            "past_observed_mask": torch.ones(BATCH, past, *width),
            "future_values": self.normal(BATCH, ahead, *width),
            "future_time_features": self.normal(BATCH, ahead, features),
        }
        return {name: value for name, value in found.items() if name in self.parameters}

    def _by_documentation(self) -> Iterator[Inputs]:
        """What has no default or is the main input, at the documented shapes; then with others added."""
        main = getattr(self.model, "main_input_name", None)
        needed = [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is parameter.empty or name == main
        ]
        optional = [name for name in self.documented if name not in needed and not _NOT_TRIED.search(name)]
        masks = [name for name in optional if "mask" in name]
        sets = [needed, [*needed, *masks], *([*needed, name] for name in optional), [*needed, *optional]]
        for self.length in (LENGTH, AUDIO_LENGTH):
            for names in sets:
                if names:
                    yield {name: self.documented_tensor(name) for name in names}

    def documented_tensor(self, name: str) -> torch.Tensor:
        kind, shape = self.documented.get(name, ("", []))
        kind += str(self.parameters[name].annotation)
        sizes = [self._dimension(part, name) for part in shape] or self._guessed_shape(name)
        if "mask" in name and (len(sizes) > 3 or (len(sizes) == 3 and "Float" in kind)):
            return torch.ones(sizes)  # a picture
        if "mask" in name:
            return torch.ones(sizes, dtype=torch.bool if "Bool" in kind else torch.long)
        if name in ("spatial_shapes", "target_sizes", "image_sizes"):
            unit = 1 if name == "image_sizes" else self.size("patch_size", 1)
            return torch.tensor([[side // unit for side in self.image_sides()]] * BATCH)
        if "grid" in name:  # of patches, as (time,) height, width
            rows = [1, 4, 4] if sizes[-1:] == [3] else [4] * sizes[-1]
            return torch.tensor([rows] * BATCH)
        if "token_type" in name:
            return torch.zeros(sizes, dtype=torch.long)
        if name == "position_ids":
            return torch.arange(sizes[-1]).repeat(*sizes[:-1], 1)
        # Some hidden states are annotated as integers.
        integer = "Long" in kind or "Int" in kind or name.endswith(("ids", "idx"))
        if integer and "hidden_state" not in name:
            return self.tokens(*sizes)
        return self.normal(*sizes)

    def _guessed_shape(self, name: str) -> list[int]:
        if name.endswith("ids") or "mask" in name:
            return [BATCH, self.length]
        if "image" in name or "pixel" in name:
            return [BATCH, self.size("num_channels", 3), *self.image_sides()]
        return [BATCH, self.length, self.size("hidden_size", self.size("d_model", 32))]

    def _dimension(self, part: str, name: str) -> int:
        part = part.removeprefix("config.").removeprefix("self.")
        if part.isdigit():
            return int(part)
        if " * " in part:
            return math.prod(self._dimension(factor, name) for factor in part.split(" * "))
        if "batch" in part:
            return BATCH
        if part in ("height", "width"):
            return self.image_sides()[part == "width"]
        if "channel" in part:
            return self.size(part, 3)
        if part in ("feature_size", "feature_dim", "num_mel_bins"):
            return self.size("num_mel_bins", self.size("feature_size", 80))
        if "length" in part or "seq" in part:
            return DECODER_LENGTH if name.startswith("decoder") or "target" in part else self.length
        return self.size(part, 4)

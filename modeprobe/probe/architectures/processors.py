"""Pictures and sounds in the form that a model type's own processor makes of them.

Processors need no files, but some need packages; without those there are no such inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

SAMPLES = 8000  # half a second


def processed(
    model_type: str, size: Callable[[str, int], int], sides: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """What the processors of this type return for two random pictures, and for two random sounds.

    size: the configuration's number of this name, or 0; sides: the height and width of its pictures.
    """
    import transformers
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    generator = torch.Generator().manual_seed(1)
    of_pictures = _of_type_or_whole(IMAGE_PROCESSOR_MAPPING_NAMES, model_type) or {}
    names = of_pictures.values() if isinstance(of_pictures, dict) else of_pictures
    for name in filter(None, names):
        try:
            kind = getattr(transformers, name)
            processor = kind(**_settings(kind, size, sides))
            pictures = torch.randint(0, 256, (2, *sides, 3), generator=generator, dtype=torch.uint8)
            yield dict(processor(list(pictures.numpy()), return_tensors="pt"))
            break
        except Exception:
            continue
    of_sounds = _of_type_or_whole(FEATURE_EXTRACTOR_MAPPING_NAMES, model_type)
    if of_sounds:
        try:
            processor = getattr(transformers, of_sounds)()
            sounds = torch.randn((2, SAMPLES), generator=generator)
            yield dict(
                processor(list(sounds.numpy()), sampling_rate=processor.sampling_rate, return_tensors="pt")
            )
        except Exception:
            return


def _of_type_or_whole(mapping: Any, model_type: str) -> Any:
    """What is mapped to this type, or to the type that its name says it is a part of."""
    words = model_type.split("_")
    names = ("_".join(words[:count]) for count in range(len(words), 0, -1))
    return next((mapping[name] for name in names if mapping.get(name)), None)


def _settings(kind: Any, size: Callable[[str, int], int], sides: tuple[int, ...]) -> dict[str, Any]:
    """The processor's own settings, at the configuration's sizes."""
    usual = kind()
    accepted = getattr(kind, "valid_kwargs", None)
    names = getattr(accepted, "__annotations__", {})
    found: dict[str, Any] = {}
    for name, field in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("max_image_tiles", "max_num_tiles"),
        ("max_num_patches", "num_patches"),
        ("pooling_kernel_size", "pooling_kernel_size"),
    ):
        value = size(field, 0)
        if name in names and value:
            square = _of_sides(getattr(usual, name, None))
            found[name] = {"height": value, "width": value} if square else value
    for name in ("size", "crop_size"):
        if _of_sides(getattr(usual, name, None)):
            found[name] = {"height": sides[0], "width": sides[1]}
    return found


def _of_sides(value: Any) -> bool:
    """Whether a setting is a height and a width."""
    return hasattr(value, "get") and bool(value.get("height"))

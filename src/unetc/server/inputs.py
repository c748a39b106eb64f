"""The inputs of a model that samples, in the words of the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .open_inference import BYTES
from .prompts import PromptReader


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """An input of a sampling model. All are optional."""

    datatype: str
    field: str
    """Field of `ImageRequest`."""
    shape: tuple[int, ...] = (1,)


INPUTS: Mapping[str, Input] = {
    "prompt": Input(datatype=BYTES, field="prompt"),
    "negative_prompt": Input(datatype=BYTES, field="negative_prompt"),
    "label": Input(datatype="INT64", field="label"),
    "guidance_scale": Input(datatype="FP32", field="guidance_scale"),
    "seed": Input(datatype="INT64", field="seed", shape=(-1,)),
    "count": Input(datatype="INT32", field="count"),
    "steps": Input(datatype="INT32", field="steps"),
    "height": Input(datatype="INT32", field="height"),
    "width": Input(datatype="INT32", field="width"),
    "quality": Input(datatype=BYTES, field="quality"),
    "least_quality": Input(datatype=BYTES, field="least_quality"),
    "image": Input(datatype="UINT8", field="image", shape=(-1, -1, -1)),
    "strength": Input(datatype="FP32", field="strength"),
}


def applies(name: str, prompts: PromptReader) -> bool:
    """Check whether an input has a meaning for a model.

    Args:
        name: A key of `INPUTS`.
        prompts: The prompts and classes of the model.
    """
    return {
        "prompt": prompts.free or bool(prompts.prompts) or prompts.classes is not None,
        "negative_prompt": prompts.free,
        "label": prompts.classes is not None,
        "guidance_scale": prompts.guided,
    }.get(name, True)

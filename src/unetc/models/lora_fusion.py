"""Fusion of LoRAs into the UNet and the text encoders of a pipeline, with the code of diffusers and peft.

A LoRA holds two factors for each layer that it changes. Their product is multiplied by the LoRA's scale and by a second
number. That number comes from an alpha per layer (kohya files), from peft's configuration in the header, or is 1 if the
file has neither. This module multiplies it into the factors, so that diffusers and peft receive only tensors of checked
shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import safe_open
from torch import Tensor, nn

from unetc.errors import ModelError

from .lora import Lora, some

_TEXT_ENCODERS = {
    "StableDiffusionPipeline": ("text_encoder",),
    "StableDiffusionXLPipeline": ("text_encoder", "text_encoder_2"),
}

_CONFIGURATION = "lora_adapter_metadata"
"""Header field with peft's configuration: JSON whose keys begin with the part of the pipeline."""

_DOWN, _UP = "lora_A.weight", "lora_B.weight"
"""Names of a layer's factors in peft: [rank, input, ...] and [output, rank, ...]."""


def fuse_into_unet(unet: Any, loras: Sequence[Lora], pipeline: str) -> None:
    """Add LoRAs to the weights of a UNet; its modules do not change.

    Args:
        unet: A `UNet2DConditionModel`.
        loras: LoRAs in the order of fusion.
        pipeline: Class of the UNet's diffusers pipeline.

    Raises:
        ModelError: If a LoRA does not fit the UNet.
    """
    for lora in loras:
        with _naming(lora):
            factors = _read(lora, pipeline, unet.config)
            if own := _fitting(lora, "unet", unet, factors):
                unet.load_lora_adapter(own, prefix="unet", low_cpu_mem_usage=True)
                unet.fuse_lora(lora_scale=lora.scale)
                unet.unload_lora()


def fuse_into_text_encoders(pipeline: Any, loras: Sequence[Lora], unet_config: Mapping[str, Any]) -> None:
    """Add LoRAs to the weights of a pipeline's text encoders.

    Args:
        pipeline: A diffusers pipeline; it needs no UNet.
        loras: LoRAs in the order of fusion.
        unet_config: Configuration of the UNet, which determines the layer numbers in some files.

    Raises:
        ModelError: If a LoRA does not fit the text encoders.
    """
    name = type(pipeline).__name__
    for lora in loras:
        with _naming(lora):
            factors = _read(lora, name, FrozenDict(unet_config))
            for part in _TEXT_ENCODERS[name]:
                encoder = getattr(pipeline, part)
                if own := _fitting(lora, part, encoder, factors):
                    pipeline.load_lora_into_text_encoder(own, None, encoder, prefix=part, low_cpu_mem_usage=True)
            pipeline.fuse_lora(lora_scale=lora.scale)
            pipeline.unload_lora_weights()


@contextmanager
def _naming(lora: Lora) -> Iterator[None]:
    """Turn errors of libraries into a `ModelError` that names the LoRA."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # diffusers and peft raise many unrelated classes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
        raise ModelError(f"cannot fuse LoRA {lora.path}: {reason}. Check that it was made for this model.") from error


def _read(lora: Lora, pipeline: str, unet_config: Any) -> dict[str, dict[str, Tensor]]:
    """Read the factors of each part of a pipeline, under peft's names, scaled by everything but the LoRA's scale.

    Raises:
        ModelError: If the file has tensors for no part of the pipeline, or a number that is not finite.
    """
    with safe_open(lora.path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118, not a dict
        header = file.metadata() or {}
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ModelError(f"LoRA {lora.path} holds NaN or infinity in {some(broken)}.")
    _apply_alphas(tensors)
    configuration = json.loads(header.get(_CONFIGURATION, "{}"))
    tensors, _ = getattr(diffusers, pipeline).lora_state_dict(tensors, unet_config=unet_config)
    parts = ("unet", *_TEXT_ENCODERS[pipeline])
    if strangers := [name for name in tensors if name.partition(".")[0] not in parts]:
        raise ModelError(f"LoRA {lora.path} does not fit a {pipeline}, which has no place for {some(strangers)}.")
    factors = {}
    for part in parts:
        prefix = f"{part}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        factors[part] = _peft_names(part, own) if own else {}
        _apply_configuration(
            factors[part],
            {name.removeprefix(prefix): value for name, value in configuration.items() if name.startswith(prefix)},
        )
    return factors


def _apply_alphas(tensors: dict[str, Tensor]) -> None:
    """Multiply factors by kohya's alpha / rank and remove the alphas, because diffusers loses some per-layer alphas."""
    for name in [name for name in tensors if name.endswith(".alpha")]:
        down = f"{name.removesuffix('alpha')}lora_down.weight"
        if down in tensors:
            tensors[down] = tensors[down] * (tensors.pop(name).item() / len(tensors[down]))


def _apply_configuration(factors: dict[str, Tensor], configuration: Mapping[str, Any]) -> None:
    """Multiply factors by the number that peft would apply to their product."""
    from peft.utils.other import get_pattern_key

    if not configuration:
        return
    patterns = configuration.get("alpha_pattern") or {}
    for name in [name for name in factors if name.endswith(_DOWN)]:
        rank = len(factors[name])
        pattern = get_pattern_key(tuple(patterns), name.removesuffix(f".{_DOWN}"))
        alpha = patterns.get(pattern, configuration["lora_alpha"])
        factors[name] = factors[name] * (alpha / (math.sqrt(rank) if configuration.get("use_rslora") else rank))


def _peft_names(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the names within one part to the form `layer.lora_A.weight`."""
    if part == "unet":
        return dict(convert_unet_state_dict_to_peft(tensors))
    return dict(convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors)))


def _fitting(lora: Lora, part: str, model: nn.Module, factors: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Select the factors of one part, under the names that diffusers reads.

    Raises:
        ModelError: If a factor belongs to no layer of the part, or does not fit the shape of its layer.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    own = factors[part]
    if not hasattr(model, "text_model"):  # newer releases of transformers drop this level of CLIP's text encoders
        own = {name.removeprefix("text_model."): tensor for name, tensor in own.items()}
    paths = [path for path in layers if f"{path}.{_DOWN}" in own and f"{path}.{_UP}" in own]
    if strangers := own.keys() - {f"{path}.{factor}" for path in paths for factor in (_DOWN, _UP)}:
        raise ModelError(
            f"LoRA {lora.path} does not fit: the {part} of this model has no place for {some(sorted(strangers))}."
        )
    for path in paths:
        down, up, weight = own[f"{path}.{_DOWN}"], own[f"{path}.{_UP}"], layers[path].weight
        outputs, *inputs = weight.shape
        if [*down.shape] != [len(down), *inputs] or [*up.shape] != [outputs, len(down), *(1 for _ in inputs[1:])]:
            raise ModelError(
                f"LoRA {lora.path} was made for another model: its factors for {part}.{path} have the shapes "
                f"{[*down.shape]} and {[*up.shape]}, but the layer has {[*weight.shape]}."
            )
    return {f"{part}.{name}": tensor for name, tensor in own.items()}

"""Inputs and calls of the UNets of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unetc.controlnet import PREFIX
from unetc.errors import ModelError

from .inputs import (
    BATCH,
    CLASS_LABELS,
    CONTEXT,
    LOW_RES,
    POOLED,
    SAMPLE,
    TIME_IDS,
    Input,
    Signature,
    text,
    timestep,
    vector,
)


def _multiples(model: Any) -> tuple[int, ...]:
    return tuple(2**halvings for halvings in range(len(model.config.block_out_channels)))


def _unet_2d(model: Any, generator: torch.Generator, multiple: int) -> list[Input]:
    return [*_image(model, generator, multiple), *_class_labels(model, generator)]


def _unet_2d_condition(model: Any, generator: torch.Generator, multiple: int) -> list[Input]:
    config = model.config
    hidden = getattr(config, "encoder_hid_dim_type", None)
    if hidden not in (None, "text_proj"):
        raise ModelError(
            f"cannot capture UNet2DConditionModel with {hidden} conditions (such as IP-Adapter). "
            "Expected encoder_hid_dim_type None or 'text_proj'."
        )
    added = getattr(config, "addition_embed_type", None)
    if added not in (None, "text", "text_time"):
        raise ModelError(
            f"cannot capture UNet2DConditionModel with addition_embed_type {added!r}. "
            "Expected None, 'text' or 'text_time'."
        )
    if getattr(config, "time_cond_proj_dim", None) is not None:
        raise ModelError(
            "cannot capture UNet2DConditionModel with time_cond_proj_dim (guidance as an embedding). Expected None."
        )
    widths = config.cross_attention_dim
    width = config.encoder_hid_dim if hidden else widths if isinstance(widths, int) else widths[0]
    inputs = _image(model, generator, multiple)
    inputs.append(text(CONTEXT, width, generator))
    inputs += _class_labels(model, generator)
    if added == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs.append(vector(POOLED, pooled, generator))
        inputs.append(Input(name=TIME_IDS, example=torch.full((BATCH, 6), 64.0)))
    return inputs


def _super_resolution(model: Any, generator: torch.Generator, multiple: int) -> list[Input]:
    both, *others = _unet_2d_condition(model, generator, multiple)
    assert both.native is not None
    sample, low_res = (
        replace(both, name=name, example=example, native=native)
        for name, example, native in zip(
            (SAMPLE, LOW_RES), both.example.chunk(2, dim=1), both.native.chunk(2, dim=1), strict=True
        )
    )
    return [sample, *others, low_res]


def _image(model: Any, generator: torch.Generator, multiple: int) -> list[Input]:
    """Make a noisy sample whose height and width differ, and one timestep per sample.

    Each side is an odd multiple of the number at every level that is halved. A UNet of diffusers enlarges to the sizes
    of its skips if a side is odd, and to twice the size otherwise. Only the first is right at every size.
    """
    config = model.config
    size = config.sample_size or 32
    native_height, native_width = (size, size) if isinstance(size, int) else size
    stride = _multiples(model)[-1]
    height = -(-native_height // stride) * stride + (multiple if multiple < stride else 0)
    sample = torch.randn(BATCH, config.in_channels, height, height + stride, generator=generator)
    native = torch.randn(BATCH, config.in_channels, native_height, native_width, generator=generator)
    return [Input(name=SAMPLE, example=sample, dynamic=(2, 3), native=native), timestep()]


def _class_labels(model: Any, generator: torch.Generator) -> list[Input]:
    config = model.config
    kind = getattr(config, "class_embed_type", None)
    if kind is None:
        count = getattr(config, "num_class_embeds", None)
        return [Input(name=CLASS_LABELS, example=torch.tensor([0, count - 1]))] if count else []
    if kind == "timestep":
        return [Input(name=CLASS_LABELS, example=torch.tensor([1.0, 2.0]))]
    if kind == "identity":
        width = model.time_embedding.linear_2.out_features
    elif kind in ("projection", "simple_projection"):
        width = config.projection_class_embeddings_input_dim
    else:
        raise ModelError(
            f"cannot capture {type(model).__name__} with class_embed_type {kind!r}. "
            "Expected None, 'timestep', 'identity', 'projection' or 'simple_projection'."
        )
    return [vector(CLASS_LABELS, width, generator)]


def _call_unet(model: Any, named: dict[str, Any]) -> Tensor:
    added = {name: named.pop(name) for name in (POOLED, TIME_IDS) if name in named}
    if added:
        named["added_cond_kwargs"] = added
    if residuals := [named.pop(name) for name in tuple(named) if name.startswith(PREFIX)]:
        *named["down_block_additional_residuals"], named["mid_block_additional_residual"] = residuals
    output: Tensor = model(**named, return_dict=False)[0]
    return output


UNETS: Mapping[str, Signature] = {
    "UNet2DModel": Signature(multiples=_multiples, inputs=_unet_2d, call=_call_unet),
    "UNet2DConditionModel": Signature(multiples=_multiples, inputs=_unet_2d_condition, call=_call_unet),
    "SuperResolutionUNet": Signature(multiples=_multiples, inputs=_super_resolution, call=_call_unet),
}
"""Supported classes of UNets by name."""

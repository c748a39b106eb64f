"""Inputs and calls of the transformers of diffusers, each as a denoiser of images.

The graph includes the work that their pipelines do around the call. FLUX packs latents into tokens, numbers the tokens
and divides the timestep by 1000. Hunyuan-DiT rotates queries and keys by a patch's position in the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor

from unetc.artifacts.call_input import SAMPLE
from unetc.call import CLASS_LABELS, CONTEXT, TIMESTEP
from unetc.errors import ModelError

from .inputs import BATCH, Input, Signature, text, timestep, vector

POOLED_PROJECTIONS, GUIDANCE = "pooled_projections", "guidance"
CONTEXT_MASK, RESOLUTION, ASPECT_RATIO = "encoder_attention_mask", "resolution", "aspect_ratio"
TEXT_MASK, CONTEXT_T5, TEXT_MASK_T5 = "text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5"
IMAGE_META_SIZE, STYLE = "image_meta_size", "style"

_FLUX_PACK = 2
"""Height and width, in latent pixels, of the patch that FLUX packs into a token."""

_HUNYUAN_EXTENT = 64
"""Height and width, in latent pixels, that the positions of Hunyuan-DiT span at every image size."""


def _patch(model: Any) -> tuple[int, ...]:
    return (int(model.config.patch_size),)


def _flux_patch(model: Any) -> tuple[int, ...]:
    return (_FLUX_PACK,)


def _sd3_largest(model: Any) -> int:
    """Compute the largest side for which SD 3 has positions."""
    return int(model.config.pos_embed_max_size * model.config.patch_size)


def _dit(model: Any, generator: torch.Generator, multiple: int) -> list[Input]:
    _refuse_processors(model, "AttnProcessor2_0")
    labels = torch.tensor([0, model.config.num_embeds_ada_norm])  # the last label stands for no class
    return [_square(model, generator), timestep(), Input(name=CLASS_LABELS, example=labels)]


def _pixart(model: Any, generator: torch.Generator, multiple: int) -> list[Input]:
    _refuse_processors(model, "AttnProcessor2_0")
    inputs = [*_image(model, generator, multiple), text(CONTEXT, _caption_width(model), generator)]
    inputs.append(Input(name=CONTEXT_MASK, example=_mask(inputs[-1]), dynamic=(1,)))
    if model.use_additional_conditions:
        inputs.append(Input(name=RESOLUTION, example=torch.tensor([[512.0, 512.0], [512.0, 768.0]])))
        inputs.append(Input(name=ASPECT_RATIO, example=torch.tensor([[1.0], [1.5]])))
    return inputs


def _caption_width(model: Any) -> int:
    config = model.config
    return int(config.cross_attention_dim if config.caption_channels is None else config.caption_channels)


def _mask(tokens: Input) -> Tensor:
    """Make a mask that keeps the first tokens, a different number for each sample."""
    count = tokens.example.shape[1]
    return (torch.arange(count) < torch.tensor([[count], [count - 2]])).long()


def _sd3(model: Any, generator: torch.Generator, multiple: int) -> list[Input]:
    _refuse_processors(model, "JointAttnProcessor2_0")
    return [
        *_image(model, generator, multiple),
        text(CONTEXT, model.config.joint_attention_dim, generator),
        vector(POOLED_PROJECTIONS, model.config.pooled_projection_dim, generator),
    ]


def _flux(model: Any, generator: torch.Generator, multiple: int) -> list[Input]:
    _refuse_processors(model, "FluxAttnProcessor")
    config = model.config
    if config.patch_size != 1 or model.out_channels != config.in_channels:
        raise ModelError(
            f"cannot capture a FluxTransformer2DModel with patch_size {config.patch_size}, {config.in_channels} "
            f"channels in and {model.out_channels} out (Fill, Canny). "
            "Expected patch_size 1 and as many channels out as in."
        )
    sample = torch.randn(BATCH, config.in_channels // _FLUX_PACK**2, 4 * multiple, 6 * multiple, generator=generator)
    inputs = [
        Input(name=SAMPLE, example=sample, dynamic=(2, 3)),
        timestep(),
        text(CONTEXT, config.joint_attention_dim, generator),
        vector(POOLED_PROJECTIONS, config.pooled_projection_dim, generator),
    ]
    if config.guidance_embeds:
        inputs.append(Input(name=GUIDANCE, example=torch.tensor([3.5, 4.0])))
    return inputs


def _hunyuan(model: Any, generator: torch.Generator, multiple: int) -> list[Input]:
    _refuse_processors(model, "HunyuanAttnProcessor2_0")
    config = model.config
    first, second = config.text_len, config.text_len_t5

    def tokens(name: str, count: int, width: int) -> Input:
        return Input(name=name, example=torch.randn(BATCH, count, width, generator=generator))

    inputs = [
        _square(model, generator),
        timestep(),
        (context := tokens(CONTEXT, first, config.cross_attention_dim)),
        Input(name=TEXT_MASK, example=_mask(context)),
        (context_t5 := tokens(CONTEXT_T5, second, config.cross_attention_dim_t5)),
        Input(name=TEXT_MASK_T5, example=_mask(context_t5)),
    ]
    if config.use_style_cond_and_image_meta_size:
        inputs.append(Input(name=IMAGE_META_SIZE, example=torch.full((BATCH, 6), 64.0)))
        inputs.append(Input(name=STYLE, example=torch.zeros(BATCH, dtype=torch.long)))
    return inputs


def _image(model: Any, generator: torch.Generator, multiple: int) -> list[Input]:
    """Make a noisy sample whose height and width differ, and one timestep per sample."""
    config = model.config
    size = config.sample_size
    sample = torch.randn(BATCH, config.in_channels, size, size, generator=generator)
    # Smaller than the trained size, because some models crop their positional embeddings.
    smaller = sample[:, :, : size - multiple, : size - 2 * multiple].contiguous()
    return [Input(name=SAMPLE, example=smaller, dynamic=(2, 3), native=sample), timestep()]


def _square(model: Any, generator: torch.Generator) -> Input:
    """Make a noisy sample of the only size that a model's positions support."""
    size = model.config.sample_size
    return Input(name=SAMPLE, example=torch.randn(BATCH, model.config.in_channels, size, size, generator=generator))


def _refuse_processors(model: Any, default: str) -> None:
    """Refuse attention processors other than the default of the class."""
    for path, module in model.named_modules():
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor).__name__ != default:
            raise ModelError(
                f"cannot capture a {type(model).__name__} with the attention processor {type(processor).__name__} "
                f"({path}). Expected {default}: call set_attn_processor or unfuse_qkv_projections."
            )


def _call(model: Any, named: dict[str, Any]) -> Tensor:
    return _predict(model, named.pop(SAMPLE), **named)


def _call_pixart(model: Any, named: dict[str, Any]) -> Tensor:
    added = {name: named.pop(name, None) for name in (RESOLUTION, ASPECT_RATIO)}
    return _predict(model, named.pop(SAMPLE), added_cond_kwargs=added, **named)


def _call_flux(model: Any, named: dict[str, Any]) -> Tensor:
    sample: Tensor = named.pop(SAMPLE)
    batch, channels, height, width = sample.shape
    rows, columns, pack = height // _FLUX_PACK, width // _FLUX_PACK, _FLUX_PACK
    tokens = sample.reshape(batch, channels, rows, pack, columns, pack).permute(0, 2, 4, 1, 3, 5)
    down, right = (torch.arange(count, dtype=torch.float32) for count in (rows, columns))
    places = torch.stack(
        (torch.zeros(rows, columns), down[:, None].expand(rows, columns), right[None].expand(rows, columns)), dim=-1
    )
    predicted = _predict(
        model,
        tokens.reshape(batch, rows * columns, channels * pack**2),
        timestep=named.pop(TIMESTEP) / 1000,
        img_ids=places.reshape(rows * columns, 3),
        txt_ids=torch.zeros(named[CONTEXT].shape[1], 3),
        **named,
    )
    unpacked = predicted.reshape(batch, rows, columns, channels, pack, pack).permute(0, 3, 1, 4, 2, 5)
    return unpacked.reshape(batch, channels, height, width)


def _call_hunyuan(model: Any, named: dict[str, Any]) -> Tensor:
    patches, extent = (size // model.config.patch_size for size in (model.config.sample_size, _HUNYUAN_EXTENT))
    width = model.inner_dim // model.num_heads
    rotation = get_2d_rotary_pos_embed(width, ((0, 0), (extent, extent)), (patches, patches), output_type="pt")
    return _predict(model, named.pop(SAMPLE), image_rotary_emb=rotation, **named)


def _predict(model: Any, hidden_states: Tensor, **named: Any) -> Tensor:
    output: Tensor = model(hidden_states, **named, return_dict=False)[0]
    return output


TRANSFORMERS: Mapping[str, Signature] = {
    "DiTTransformer2DModel": Signature(multiples=_patch, inputs=_dit, call=_call),
    "PixArtTransformer2DModel": Signature(multiples=_patch, inputs=_pixart, call=_call_pixart),
    "SD3Transformer2DModel": Signature(multiples=_patch, largest=_sd3_largest, inputs=_sd3, call=_call),
    "FluxTransformer2DModel": Signature(multiples=_flux_patch, inputs=_flux, call=_call_flux),
    "HunyuanDiT2DModel": Signature(multiples=_patch, inputs=_hunyuan, call=_call_hunyuan),
}
"""Supported classes of transformers by name."""

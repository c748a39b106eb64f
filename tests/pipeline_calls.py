"""Calls of denoisers as the pipelines of diffusers make them, written without unetc."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers as untyped_diffusers
import torch
from torch import Tensor

from tests.models import Tiny
from unetc.backend import Array

diffusers: Any = untyped_diffusers


def call_plainly(model: Any, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Any:
    """Pass inputs by name."""
    return model(sample, timestep=timestep, **conditions).sample


def call_pixart(
    model: Any, sample: Tensor, timestep: Tensor, resolution: Tensor, aspect_ratio: Tensor, **text: Tensor
) -> Any:
    """Call PixArt-alpha as its pipeline does."""
    added = {"resolution": resolution, "aspect_ratio": aspect_ratio}
    return model(sample, timestep=timestep, added_cond_kwargs=added, **text).sample


def call_flux(model: Any, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **conditions: Tensor) -> Any:
    """Call FLUX as its pipeline does, which packs the pixels of a sample into tokens."""
    pipeline = diffusers.FluxPipeline
    batch, channels, height, width = sample.shape
    packed = pipeline._pack_latents(sample, batch, channels, height, width)
    predicted = model(
        packed,
        timestep=timestep / 1000,
        encoder_hidden_states=encoder_hidden_states,
        img_ids=pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, sample.device, sample.dtype),
        txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3),
        **conditions,
    ).sample
    return pipeline._unpack_latents(predicted, 8 * height, 8 * width, vae_scale_factor=8)


def call_hunyuan(model: Any, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Any:
    """Call Hunyuan-DiT as its pipeline does, which computes rotations of the positions."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    grid = sample.shape[2] // 2, sample.shape[3] // 2
    region = get_resize_crop_region_for_grid(grid, 512 // 8 // 2)
    rotation = get_2d_rotary_pos_embed(model.inner_dim // model.num_heads, region, grid, output_type="pt")
    return model(sample, timestep=timestep, image_rotary_emb=rotation, **conditions).sample


CALLS: Mapping[str, Callable[..., Any]] = {"pixart": call_pixart, "flux": call_flux, "hunyuan": call_hunyuan}
"""Calls of diffusers' pipelines that do more than pass inputs by name."""


@torch.no_grad()
def predict(tiny: Tiny, inputs: Mapping[str, Array]) -> Array:
    """Run a denoiser as the pipelines of diffusers do."""
    call = CALLS.get(tiny.architecture, call_plainly)
    output: Array = call(tiny.denoiser, **{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()
    return output

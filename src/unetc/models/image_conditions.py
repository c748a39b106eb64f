"""Images as conditions: encoded by a VAE, as the pipelines of diffusers do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unetc.call import EXTRA_CHANNELS
from unetc.conditions import Conditions, Values

from .images import Images
from .pipelines import ImageUse

DRAWN = (
    "the damage was measured on drawn images: discs of many sizes. With --images it is measured on others, such as "
    "photographs"
)


def add_images(
    conditions: Conditions, images: Images, vae: Any, use: ImageUse, size: tuple[int, int], image_scale: float
) -> Conditions:
    """Add images to conditions.

    Args:
        conditions: Encoded prompts, one per row.
        images: One image per row.
        vae: The autoencoder of the pipeline.
        use: How the pipeline passes images to its denoiser.
        size: Height and width of the images in pixels.
        image_scale: Scale of the guidance by the image.

    Returns:
        The conditions with `extra_channels`. For editing, guided conditions also get middle ones.
    """
    assert conditions.rows is not None
    pictures = images.read(conditions.rows, *size)
    notes = conditions.notes if images.folder else (*conditions.notes, DRAWN)
    if use is ImageUse.INPAINT:
        extra = encode_for_inpainting(vae, pictures, images.masks(conditions.rows, *size), images.seed)
        return replace(
            conditions,
            own=_with(conditions.own, extra),
            negative=_with(conditions.negative, extra),
            notes=notes,
        )
    extra = encode_for_editing(vae, pictures)
    return edit(replace(conditions, notes=notes), extra, image_scale)


def edit(conditions: Conditions, extra: NDArray[np.float32], image_scale: float) -> Conditions:
    """Add latents of images that are to be edited.

    Args:
        conditions: Encoded prompts, one per row.
        extra: Latents of the images, [row, channel, height, width].
        image_scale: Scale of the guidance by the image. As in diffusers, a scale below 1 turns all guidance off.
    """
    if not conditions.guided or image_scale < 1:
        return replace(conditions, own=_with(conditions.own, extra), negative={})
    return replace(
        conditions,
        own=_with(conditions.own, extra),
        middle=_with(conditions.negative, extra),
        negative=_with(conditions.negative, np.zeros_like(extra)),
        middle_scale=image_scale,
    )


def encode_for_editing(vae: Any, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Encode images as InstructPix2Pix does: the most likely latents, not scaled.

    Args:
        vae: The autoencoder of the pipeline.
        images: [row, 3, height, width], in -1 to 1.

    Returns:
        [row, channel, height, width] of the latents.
    """
    return np.concatenate([_array(_encode(vae, image)) for image in images])


def encode_for_inpainting(
    vae: Any, images: NDArray[np.float32], masks: NDArray[np.float32], seed: int
) -> NDArray[np.float32]:
    """Encode masks and masked images as the pipelines for inpainting do.

    The latents of an image are drawn from the distribution that the VAE predicts; image k has a separate generator.

    Args:
        vae: The autoencoder of the pipeline.
        images: [row, 3, height, width], in -1 to 1.
        masks: [row, 1, height, width], 1 where the image is to be painted.
        seed: Seed of the generators.

    Returns:
        [row, 1 + channel, height, width] of the latents: the mask, then the latents of the masked image.
    """
    rows = []
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        generator = torch.Generator().manual_seed(seed_of(seed, index))
        latents = vae.config.scaling_factor * _encode(vae, image * (mask < 0.5), generator)
        small = torch.nn.functional.interpolate(torch.from_numpy(mask)[None], size=latents.shape[2:])
        rows.append(_array(torch.cat([small, latents], dim=1)))
    return np.concatenate(rows)


def seed_of(seed: int, index: int) -> int:
    """Return the seed of the generator of one image."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


@torch.no_grad()
def _encode(vae: Any, image: NDArray[np.float32], generator: torch.Generator | None = None) -> Tensor:
    """Encode one image; latents are drawn with a generator, or the most likely ones without."""
    encoded = vae.encode(torch.from_numpy(np.ascontiguousarray(image))[None])
    latents: Tensor
    if hasattr(encoded, "latents"):
        latents = encoded.latents
    else:
        latents = encoded.latent_dist.mode() if generator is None else encoded.latent_dist.sample(generator)
    return latents


def _array(latents: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = latents.float().numpy()
    return array


def _with(values: Values, extra: NDArray[np.float32]) -> Values:
    return {**values, EXTRA_CHANNELS: extra} if values else values

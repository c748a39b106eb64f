"""The pipelines of diffusers that unetc reads: a row each.

Only classes with a row are opened. A row holds everything that depends on the class alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from unetc.errors import ModelError


class ImageUse(StrEnum):
    """How a pipeline passes images to its denoiser, as channels after the sample's."""

    INPAINT = "inpaint"
    """A mask and the latents of the masked image; a denoiser that takes latents alone has no extra channels."""
    EDIT = "edit"
    """Latents of the image; guidance starts without text and image, and passes the image without the text."""

    def extra_channels(self, latent_channels: int) -> tuple[int, ...]:
        """List the possible numbers of extra channels."""
        return (latent_channels,) if self is ImageUse.EDIT else (0, 1 + latent_channels)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineKind:
    """A class of pipeline."""

    denoiser: str
    """Class of the denoiser."""
    text: bool = False
    """Whether the denoiser is conditioned on text; its samples are then latents, which a VAE decodes."""
    guidance_scale: float = 1.0
    """Default scale of classifier-free guidance in diffusers; 1 without guidance."""
    images: ImageUse | None = None
    """How images reach the denoiser; None if they do not."""
    image_guidance_scale: float = 1.0
    """Default scale of the guidance by the image in diffusers; 1 without it."""
    two_encoders: bool = False
    """Whether prompts are encoded as for SDXL: two text encoders, a pooled state, and numbers for the size."""

    scored: bool = False
    """Whether the pipeline has the setting `requires_aesthetics_score`: the last size number is then a score."""

    def input_channels(self, latent_channels: int) -> tuple[int, ...]:
        """List the possible numbers of input channels of the denoiser."""
        extra = (0,) if self.images is None else self.images.extra_channels(latent_channels)
        return tuple(latent_channels + count for count in extra)

    @property
    def text_parts(self) -> Mapping[str, tuple[str, ...]]:
        """Tokenizers and text encoders by their names in model_index.json, each with the classes that it may have."""
        if not self.text:
            return {}
        return {**_FIRST_ENCODER, **(_SECOND_ENCODER if self.two_encoders else {})}


_TOKENIZERS = "CLIPTokenizer", "CLIPTokenizerFast"
_FIRST_ENCODER: Mapping[str, tuple[str, ...]] = {"tokenizer": _TOKENIZERS, "text_encoder": ("CLIPTextModel",)}
_SECOND_ENCODER: Mapping[str, tuple[str, ...]] = {
    "tokenizer_2": _TOKENIZERS,
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}

PIPELINES: Mapping[str, PipelineKind] = MappingProxyType(
    {
        "DDPMPipeline": PipelineKind(denoiser="UNet2DModel"),
        "DDIMPipeline": PipelineKind(denoiser="UNet2DModel"),
        "StableDiffusionPipeline": PipelineKind(denoiser="UNet2DConditionModel", text=True, guidance_scale=7.5),
        "StableDiffusionInpaintPipeline": PipelineKind(
            denoiser="UNet2DConditionModel", text=True, guidance_scale=7.5, images=ImageUse.INPAINT
        ),
        "StableDiffusionInstructPix2PixPipeline": PipelineKind(
            denoiser="UNet2DConditionModel",
            text=True,
            guidance_scale=7.5,
            images=ImageUse.EDIT,
            image_guidance_scale=1.5,
        ),
        "LatentConsistencyModelPipeline": PipelineKind(denoiser="UNet2DConditionModel", text=True, guidance_scale=8.5),
        "StableDiffusionXLPipeline": PipelineKind(
            denoiser="UNet2DConditionModel", text=True, guidance_scale=5.0, two_encoders=True
        ),
        "StableDiffusionXLImg2ImgPipeline": PipelineKind(
            denoiser="UNet2DConditionModel", text=True, guidance_scale=5.0, two_encoders=True, scored=True
        ),
        "StableDiffusionXLInpaintPipeline": PipelineKind(
            denoiser="UNet2DConditionModel",
            text=True,
            guidance_scale=7.5,
            images=ImageUse.INPAINT,
            two_encoders=True,
            scored=True,
        ),
    }
)
"""Supported pipelines by class name."""

TEXT_PIPELINES = tuple(name for name, kind in PIPELINES.items() if kind.text)
"""Pipelines whose denoiser is conditioned on text; they take LoRAs and ControlNets."""


def sample_channels(pipeline: str, config: Mapping[str, Any], variance_type: str, latent_channels: int | None) -> int:
    """Return the number of channels of a sample; a denoiser may take extra channels after them.

    Args:
        pipeline: Class of the pipeline, with a row in `PIPELINES`.
        config: Configuration of the denoiser.
        variance_type: The scheduler's setting of this name.
        latent_channels: Channels of the VAE's latents; None without a VAE.

    Raises:
        ModelError: If the pipeline does not give the denoiser the channels that it takes, or their numbers do not fit.
    """
    kind = PIPELINES[pipeline]
    try:
        taken, predicted = denoiser_channels(kind.denoiser, config)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"the denoiser has in_channels {config.get('in_channels')} and out_channels {config.get('out_channels')}. "
            "Expected whole numbers."
        ) from error
    channels = taken if kind.images is None else predicted
    if latent_channels is not None and channels != latent_channels:
        raise ModelError(_wrong_channels(pipeline, taken, latent_channels))
    if kind.images is not None and taken not in kind.input_channels(channels):
        raise ModelError(_wrong_channels(pipeline, taken, channels))
    allowed = (channels, 2 * channels) if variance_type.startswith("learned") else (channels,)
    if predicted not in allowed:
        raise ModelError(
            f"the denoiser predicts {predicted} channels for samples of {channels}. Expected "
            f"{' or '.join(map(str, allowed))}, because its scheduler has variance_type {variance_type}."
        )
    return channels


def denoiser_channels(denoiser: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """Read the numbers of channels that a UNet takes and predicts, with the defaults of diffusers.

    Args:
        denoiser: Class of the UNet.
        config: Its configuration.

    Raises:
        TypeError: If one of them is no number.
        ValueError: If one of them is text that is no number.
    """
    default = 4 if denoiser == "UNet2DConditionModel" else 3
    return int(config.get("in_channels", default)), int(config.get("out_channels", default))


def _wrong_channels(pipeline: str, taken: int, latent_channels: int) -> str:
    """Describe the mistake, and name the pipelines whose denoiser takes this number of channels."""
    kind = PIPELINES[pipeline]
    given = {
        name: row.input_channels(latent_channels)
        for name, row in PIPELINES.items()
        if row.text and row.two_encoders == kind.two_encoders
    }
    others = [name for name, counts in given.items() if taken in counts and name != pipeline]
    advice = (
        f"A {' or '.join(others)} gives it {taken}: if the model is one, correct _class_name in model_index.json."
        if others
        else "Check that UNet, VAE and the pipeline's class belong together."
    )
    return (
        f"the denoiser takes {taken} channels, but a {pipeline} with latents of {latent_channels} gives it "
        f"{' or '.join(map(str, given[pipeline]))}. {advice}"
    )

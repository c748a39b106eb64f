"""The pipelines of diffusers that unetc reads: a row each.

Only classes with a row are opened. A row holds everything that depends on the class alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineKind:
    """A class of pipeline."""

    denoiser: str
    """Class of the denoiser."""
    text: bool = False
    """Whether the denoiser is conditioned on text; its samples are then latents, which a VAE decodes."""
    guidance_scale: float = 1.0
    """Default scale of classifier-free guidance in diffusers; 1 without guidance."""
    two_encoders: bool = False
    """Whether prompts are encoded as for SDXL: two text encoders, a pooled state, and numbers for the size."""

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
        "StableDiffusionXLPipeline": PipelineKind(
            denoiser="UNet2DConditionModel", text=True, guidance_scale=5.0, two_encoders=True
        ),
    }
)
"""Supported pipelines by class name."""

TEXT_PIPELINES = tuple(name for name, kind in PIPELINES.items() if kind.text)
"""Pipelines whose denoiser is conditioned on text; they take LoRAs and ControlNets."""

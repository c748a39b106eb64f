"""The interface of a pretrained model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from unetc.artifacts.profile import ModelReference
from unetc.conditions import Conditions

if TYPE_CHECKING:
    from torch import nn

    from .latent_decoder import LatentDecoder


class Model(Protocol):
    """A pretrained model; its weights are loaded only on request."""

    @property
    def reference(self) -> ModelReference:
        """Identity of the model."""

    @property
    def denoiser_config(self) -> dict[str, Any]:
        """Configuration of the denoiser, in the form that diffusers pipelines read."""

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Configuration of a diffusers scheduler, of any class."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[channel, height, width] for which the denoiser was trained; a latent shape if there is a decoder."""

    @property
    def guidance_scale(self) -> float:
        """Default scale of classifier-free guidance; 1 for a model without guidance."""

    @property
    def decoder_scale(self) -> int:
        """Image pixels per sample pixel, along each side; 1 if samples are images."""

    def prompts(self) -> tuple[str, ...]:
        """Read the prompts used to measure the model; empty for an unconditional model."""

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> Conditions:
        """Turn prompts into conditions."""

    def load_decoder(self) -> LatentDecoder | None:
        """Load the decoder from samples to images; None if samples are images."""

    def load_denoiser(self) -> nn.Module:
        """Load the denoiser in evaluation mode."""

"""The interface of a pretrained model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from unetc.artifacts.profile import ModelReference
from unetc.call import CallSignature
from unetc.conditions import Conditions

from .images import Images

if TYPE_CHECKING:
    from torch import nn

    from .latent_decoder import LatentDecoder
    from .latent_encoder import LatentEncoder
    from .text import TextEncoders


class Model(Protocol):
    """A pretrained model; its weights are loaded only on request."""

    @property
    def reference(self) -> ModelReference:
        """Identity of the model."""

    @property
    def denoiser_config(self) -> dict[str, Any]:
        """Configuration of the denoiser, in the form that diffusers pipelines read."""

    @property
    def calls(self) -> CallSignature:
        """The calls of the denoiser: its inputs and their shapes."""

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
        """Read the prompts used to measure the model, or list class labels; empty for an unconditional model."""

    def encode(self, prompts: Sequence[str], guidance_scale: float, *, images: Images | None = None) -> Conditions:
        """Turn prompts, or labels of classes, into conditions; a model that takes images gets one per row."""

    def load_decoder(self) -> LatentDecoder | None:
        """Load the decoder from samples to images; None if samples are images."""

    def load_encoder(self) -> LatentEncoder | None:
        """Load the encoder from images to samples; None if samples are images."""

    def load_text(self) -> TextEncoders | None:
        """Load the text encoders; None for a model that takes no prompts.

        Raises:
            ModelError: If prompts alone are not enough, or the text encoders cannot be exported.
        """

    def load_denoiser(self) -> nn.Module:
        """Load the denoiser in evaluation mode."""

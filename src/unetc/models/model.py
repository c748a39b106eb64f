"""What unetc needs to know of a pretrained model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from unetc.artifacts.profile import ModelReference
from unetc.conditions import Conditions

if TYPE_CHECKING:
    from torch import nn


class Model(Protocol):
    """A pretrained model; its weights are loaded only when asked for."""

    @property
    def reference(self) -> ModelReference:
        """Which model it is."""

    @property
    def denoiser_config(self) -> dict[str, Any]:
        """Configuration of the denoiser, as pipelines of diffusers read it."""

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Configuration of a diffusers scheduler, of any class."""

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[channel, height, width] the denoiser was trained for; latents where there is a decoder."""

    @property
    def guidance_scale(self) -> float:
        """The usual scale of classifier-free guidance; 1 where there is none."""

    @property
    def decoder_scale(self) -> int:
        """Number of pixels of the image per pixel of a sample, along each side; 1 if samples are images."""

    def prompts(self) -> tuple[str, ...]:
        """Read the prompts to measure the model on; none if it takes none."""

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> Conditions:
        """Turn prompts into conditions."""

    def load_decoder(self) -> nn.Module | None:
        """Load what turns samples into images; None if samples are images."""

    def load_denoiser(self) -> nn.Module:
        """Load the denoiser in evaluation mode."""

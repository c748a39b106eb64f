"""The encoder of a latent model, from images to samples."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .folder import plain
from .vae import Latents


class LatentEncoder(nn.Module):
    """Encodes images as the model's pipeline for image to image does, without the noise of the distribution.

    Source:
        `prepare_latents` in StableDiffusionImg2ImgPipeline and StableDiffusionXLImg2ImgPipeline of diffusers 0.42.1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, autoencoder: Any, latents: Latents) -> None:
        """Wrap an autoencoder.

        Args:
            autoencoder: An autoencoder of diffusers, of a class in `AUTOENCODERS`.
            latents: The latents that the denoiser was trained on.
        """
        super().__init__()
        self.autoencoder = autoencoder
        self.latents = latents
        for key, values in (("mean", latents.mean), ("std", latents.std)):
            self.register_buffer(key, None if values is None else torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Encode images, [batch, 3, height, width] in -1 to 1."""
        encoded = self.autoencoder.encode(image, return_dict=False)[0]
        latents: Tensor = encoded.mode() if hasattr(encoded, "mode") and not isinstance(encoded, Tensor) else encoded
        if self.latents.mean is None:
            return latents * self.latents.scaling_factor
        return (latents - self.mean) * self.latents.scaling_factor / self.std

    def sha256(self) -> str:
        """Hash everything that determines the samples: class, configuration, statistics and weights."""
        settings = sorted(plain(self.autoencoder.config).items())
        digest = hashlib.sha256(repr((type(self.autoencoder).__name__, settings, self.latents)).encode())
        for name, value in self.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()

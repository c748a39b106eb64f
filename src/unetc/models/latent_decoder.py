"""The decoder of a latent model, from samples to images."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .folder import plain
from .vae import Latents


class LatentDecoder(nn.Module):
    """Decodes samples as the model's pipeline does: [batch, channel, height, width] to [batch, 3, ...] in -1 to 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, autoencoder: Any, latents: Latents) -> None:
        """Wrap an autoencoder.

        Args:
            autoencoder: An autoencoder of diffusers, of a class in `AUTOENCODERS`.
            latents: The input that it expects.
        """
        super().__init__()
        self.autoencoder = autoencoder
        self.latents = latents
        for key, values in (("mean", latents.mean), ("std", latents.std)):
            self.register_buffer(key, None if values is None else torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, sample: Tensor) -> Tensor:
        """Decode latents."""
        if self.latents.mean is None:
            latents = sample / self.latents.scaling_factor
        else:
            latents = sample * self.std / self.latents.scaling_factor + self.mean
        image: Tensor = self.autoencoder.decode(latents, return_dict=False)[0]
        return image

    def sha256(self) -> str:
        """Hash everything that determines the images: class, configuration, statistics and weights."""
        settings = sorted(plain(self.autoencoder.config).items())
        digest = hashlib.sha256(repr((type(self.autoencoder).__name__, settings, self.latents)).encode())
        for name, value in self.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest()

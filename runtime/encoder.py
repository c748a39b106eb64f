"""The encoder of a bundle, which turns images into latents."""

from __future__ import annotations

import numpy as np

from unetc.arguments import float_array
from unetc.artifacts.manifest import IMAGE_CHANNELS
from unetc.backend import Array, Backend, SerialisedGraph
from unetc.errors import ShapeMismatch
from unetc.tensors import save_tensors

from .engine_pool import LoadedLater, let_go

PIXELS = "floats in -1 to 1; bytes become such floats when they are divided by 127.5 and reduced by 1"
"""Description of the elements of images."""

IMAGE = "image"
"""Name of the graph's input."""


class Encoder:
    """The encoder of a latent model; it is loaded when it is first called."""

    def __init__(self, graph: bytes, scale: int, channels: int, backend: Backend, *, lets_go: bool = False) -> None:
        """Keep an ONNX graph that contains its weights.

        Args:
            graph: Graph from images to latents.
            scale: Image pixels per latent pixel, along each side.
            channels: Channels of a latent.
            backend: Backend that runs the graph.
            lets_go: Whether to release it after every call, to save memory.
        """
        serialised = SerialisedGraph(graph=graph, weights=frozenset())
        self._device = backend.device
        self._program = LoadedLater(lambda: backend.open_weights(save_tensors({})).load(serialised))
        self._lets_go = lets_go
        self._channels = channels
        self.scale = scale

    def __call__(self, images: Array) -> Array:
        """Encode images one at a time, because activations are large at full size.

        Args:
            images: [batch, 3, height, width], mostly in -1 to 1.

        Returns:
            Latents, [batch, channel, height / scale, width / scale]: the mode of the encoder's distribution.

        Raises:
            SessionError: If the images are not floats.
            ShapeMismatch: If the images have other channels, or sides that are not multiples of the scale.
        """
        images = float_array("images", images, expected=PIXELS)
        sides = images.shape[2:]
        if images.ndim != 4 or images.shape[1] != IMAGE_CHANNELS or any(n < 1 or n % self.scale for n in sides):
            raise ShapeMismatch(
                f"images have shape {images.shape}. Expected [batch, {IMAGE_CHANNELS}, height, width], with sides that "
                f"are multiples of {self.scale}."
            )
        batch, _, height, width = images.shape
        latents = np.empty((batch, self._channels, height // self.scale, width // self.scale), dtype=np.float32)
        with self._device.stream():
            latent = self._device.empty(latents[:1].shape)
            for i in range(batch):
                image = np.ascontiguousarray(images[i : i + 1])
                self._program({IMAGE: self._device.put(image)}, latent)
                latents[i : i + 1] = self._device.to_array(latent)
        if self._lets_go:
            let_go(self._program, self._device)
        return latents

"""Turn latents into images with the decoder of a bundle."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import save

from unetc.backend import Array, Backend, SerialisedGraph

from .engine_pool import tried

_CHANNELS = 3


class Decoder:
    """A loaded decoder."""

    def __init__(self, graph: bytes, scale: int, backend: Backend) -> None:
        """Load an ONNX graph with its weights inside.

        Args:
            graph: Latents in, images out.
            scale: Pixels per latent pixel along each side.
            backend: Where to run it.
        """
        loader = backend.open_weights(save({}))
        self._device = backend.device
        self._program = tried(loader.load(SerialisedGraph(graph=graph, weights=frozenset())))
        self._scale = scale

    def __call__(self, sampled: Array) -> Array:
        """Decode latents [batch, channel, height, width], one after the other: activations are large at full size."""
        batch, _, height, width = sampled.shape
        images = np.empty((batch, _CHANNELS, height * self._scale, width * self._scale), dtype=np.float32)
        with self._device.stream():
            image = self._device.empty(images[:1].shape)
            for i in range(batch):
                self._program({"sample": self._device.put(np.ascontiguousarray(sampled[i : i + 1]))}, image)
                images[i : i + 1] = self._device.to_array(image)
        return images

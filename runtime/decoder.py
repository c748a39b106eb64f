"""The decoder of a bundle, which turns latents into images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unetc.arguments import float_array
from unetc.artifacts.call_input import SAMPLE
from unetc.artifacts.manifest import IMAGE_CHANNELS
from unetc.backend import Array, Backend, SerialisedGraph
from unetc.errors import ShapeMismatch
from unetc.tensors import save_tensors

from .engine_pool import let_go, tried


class Decoder:
    """A loaded decoder."""

    def __init__(self, graph: bytes, scale: int, backend: Backend, shape: Sequence[int] | None = None) -> None:
        """Load an ONNX graph that contains its weights.

        Args:
            graph: Graph from latents to images.
            scale: Image pixels per latent pixel, along each side.
            backend: Backend that runs the graph.
            shape: Usual shape of one latent, [channel, height, width]; None if it is not known.
        """
        call = {} if shape is None else {SAMPLE: (1, *shape)}
        loader = backend.open_weights(save_tensors({}))
        self._device = backend.device
        self._program = tried(loader.load(SerialisedGraph(graph=graph, weights=frozenset(), call=call)))
        self._channels = None if shape is None else shape[0]
        self.scale = scale

    def __call__(self, sampled: Array) -> Array:
        """Decode latents one at a time, because activations are large at full size.

        With low memory the engine of the decoder is on a GPU during the call alone.

        Args:
            sampled: Latents, [batch, channel, height, width].

        Returns:
            Images, [batch, 3, height * scale, width * scale].

        Raises:
            SessionError: If the latents are not floats.
            ShapeMismatch: If the latents have other axes or channels.
        """
        sampled = float_array("latents", sampled)
        channels = self._channels or "channel"
        if sampled.ndim != 4 or min(sampled.shape[1:]) < 1 or self._channels not in (None, sampled.shape[1]):
            raise ShapeMismatch(f"latents have shape {sampled.shape}. Expected [batch, {channels}, height, width].")
        batch, _, height, width = sampled.shape
        images = np.empty((batch, IMAGE_CHANNELS, height * self.scale, width * self.scale), dtype=np.float32)
        with self._device.stream():
            image = self._device.empty(images[:1].shape)
            for i in range(batch):
                self._program({SAMPLE: self._device.put(np.ascontiguousarray(sampled[i : i + 1]))}, image)
                images[i : i + 1] = self._device.to_array(image)
        let_go(self._program, self._device)
        return images

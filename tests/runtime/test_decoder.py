"""Latents are decoded one by one, in the stream of their device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest

from unetc.backend import Array, SerialisedGraph
from unetc.device import Host
from unetc.errors import SessionError, ShapeMismatch
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.decoder import Decoder
from unetc.runtime.encoder import Encoder
from unetc.runtime.engine_pool import LoadedLater, StreamingLoader


class Streamed(Host):
    """A host device that records whether it is inside its stream."""

    inside = False

    @contextmanager
    def stream(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def to_array(self, tensor: Array) -> Array:
        assert self.inside
        return super().to_array(tensor)


class Doubling:
    """A backend whose decoders repeat every pixel and every channel."""

    def __init__(self) -> None:
        self.device = Streamed()
        self.batches: list[int] = []

    def open_weights(self, weights: bytes) -> Doubling:
        return self

    def load(self, graph: SerialisedGraph) -> Doubling:
        self.call = graph.call
        return self

    def __call__(self, inputs: Mapping[str, Array], output: Array) -> Mapping[str, Array]:
        assert self.device.inside
        self.batches.append(len(inputs["sample"]))
        output[...] = inputs["sample"].repeat(2, axis=2).repeat(2, axis=3)
        return {}


def test_latents_are_decoded_one_by_one_in_the_stream_of_their_device() -> None:
    backend = Doubling()
    latents = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    images = Decoder(b"", 2, backend, (3, 2, 2))(latents)
    assert backend.call == {"sample": (1, 3, 2, 2)}
    np.testing.assert_array_equal(images, latents.repeat(2, axis=2).repeat(2, axis=3))
    assert backend.batches == [1, 1]
    assert not backend.device.inside


def test_latents_of_other_floats_are_converted() -> None:
    decoder = Decoder(b"", 2, Doubling(), (3, 2, 2))
    latents = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    for kind in (np.float64, np.float16):
        np.testing.assert_array_equal(decoder(latents.astype(kind)), decoder(latents))


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (3, 2, 2), (1, 3, 0, 2)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    decoder = Decoder(b"", 2, Doubling(), (3, 2, 2))
    with pytest.raises(ShapeMismatch, match=r"Expected \[batch, 3, height, width\]"):
        decoder(np.zeros(shape, np.float32))


@pytest.mark.parametrize("height", [0, 3])
def test_images_without_pixels_or_of_odd_sides_are_refused(height: int) -> None:
    encoder = Encoder(b"", 2, 4, open_backend("null", threads=1))
    with pytest.raises(ShapeMismatch, match="with sides that are multiples of 2"):
        encoder(np.zeros((1, 3, height, 4), np.float32))


def test_an_encoder_takes_no_bytes() -> None:
    encoder = Encoder(b"", 2, 4, open_backend("null", threads=1))
    with pytest.raises(SessionError, match=r"images: got elements of type uint8\. Expected floats in -1 to 1"):
        encoder(np.zeros((1, 3, 4, 4), np.uint8))  # type: ignore[arg-type]


class Streaming(Doubling):
    """A backend that loads decoders for the time of a call."""

    def open_weights(self, weights: bytes) -> StreamingLoader:  # type: ignore[override]
        return StreamingLoader(self)  # type: ignore[arg-type]


def test_a_decoder_that_is_loaded_later_is_released_after_every_call() -> None:
    decoder = Decoder(b"", 2, Streaming())
    assert isinstance(decoder._program, LoadedLater)
    for _ in range(2):
        decoder(np.zeros((1, 3, 2, 2), np.float32))
        assert decoder._program._program is None


@pytest.mark.parametrize("lets_go", [False, True])
def test_an_encoder_is_released_after_every_call_to_save_memory(lets_go: bool) -> None:
    encoder = Encoder(b"", 2, 4, open_backend("null", threads=1), lets_go=lets_go)
    for _ in range(2):
        encoder(np.zeros((2, 3, 4, 6), np.float32))
        assert (encoder._program._program is None) == lets_go

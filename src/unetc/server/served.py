"""Served models: an opened bundle with its quality levels, its batcher and its prompts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from unetc.device import Array
from unetc.errors import SessionError, ShapeMismatch
from unetc.progress import OnProgress, Progress, ignore
from unetc.runtime.batching.batcher import Batcher
from unetc.runtime.batching.levels import largest_calls, limits_for, open_levels
from unetc.runtime.batching.request import FULL
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session, backend_for

from . import images as pictures
from .errors import NotReady
from .image_request import ImageRequest, Level
from .metrics import Metrics
from .prompts import PromptReader
from .settings import ServerSettings

_TIMES_PIXELS, _TIMES_SIDE = 16, 8
"""Most pixels of an image / the model's own, and longest side / the model's longest."""
_PIXELS = 2048 * 2048
"""Most pixels of an image where the settings do not say, unless the model's own size is larger."""
_CHANNELS = 1, 3
"""Channels of images that files can hold: grey and colour."""


class Served:
    """One opened bundle: its levels, its batcher and its prompts."""

    def __init__(self, name: str, bundle: Bundle) -> None:
        """Describe a bundle; `load` loads its engines."""
        self.name = name
        self.bundle = bundle
        self.levels: dict[str, Level] = {FULL: Level(name=FULL, time_ratio=1.0, damage=None)}
        """By name, the full model first."""
        for level in bundle.manifest.levels:
            measured = level.measured
            self.levels[level.name] = Level(name=level.name, time_ratio=measured.time_ratio, damage=measured.damage)
        self.default = self.levels[bundle.manifest.levels[0].name]
        """The level of requests that name none: the one that the bundle samples with elsewhere too."""
        self.sessions: Mapping[str, Session] = {}
        """One per level, over shared engines; empty until they are loaded. The batcher drives their device."""
        self.prompts = PromptReader(bundle, None)
        self._batcher: Batcher | None = None

    @property
    def batcher(self) -> Batcher:
        """The thread that drives the engines.

        Raises:
            NotReady: If they are not loaded yet.
        """
        if self._batcher is None:
            raise NotReady("the engines are being loaded. Try again in a few seconds.")
        return self._batcher

    @property
    def loaded(self) -> bool:
        """Whether the engines are loaded."""
        return self._batcher is not None

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of steps that can be sampled, increasing."""
        return self.bundle.scheduler.counts

    @property
    def scale(self) -> int:
        """Image pixels per sample pixel, along each side."""
        decoder = self.bundle.manifest.decoder
        return 1 if decoder is None else decoder.scale

    @property
    def size(self) -> tuple[int, int]:
        """The model's own height and width in pixels."""
        _, height, width = self.bundle.manifest.sample_shape
        return height * self.scale, width * self.scale

    def problem_of_size(self, height: int, width: int, most_pixels: int | None) -> str | None:
        """Describe why images of a size are too large for the model, before memory is asked for.

        Args:
            height: Height in pixels.
            width: Width in pixels.
            most_pixels: Most pixels of an image; None to derive the limit from the model's own size.

        Returns:
            A sentence for an error message; None if they are not too large.
        """
        own_height, own_width = self.size
        own = f"the model's own size is {own_width} x {own_height}"
        limit = most_pixels
        if limit is None:
            limit = min(_TIMES_PIXELS * own_height * own_width, max(_PIXELS, own_height * own_width))
        if height * width > limit:
            return f"images of {width} x {height} exceed the limit of {limit} pixels; {own}."
        longest = _TIMES_SIDE * max(own_height, own_width)
        if max(height, width) > longest:
            return f"images of {width} x {height} exceed the limit of {longest} pixels per side; {own}."
        return None

    def load(self, settings: ServerSettings, metrics: Metrics, on_progress: OnProgress = ignore) -> None:
        """Load the engines, start their thread and make a call of each.

        Raises:
            UnetcError: If an engine cannot be loaded, or fails.
        """
        manifest = self.bundle.manifest
        backend = backend_for(manifest, target=settings.target, threads=settings.threads, memory=settings.memory)
        on_progress(Progress(stage=f"loading {self.name}", done=0, total=2))
        self.sessions = open_levels(self.bundle, backend)
        text = self.sessions[FULL].text
        if text is not None:
            text.encode(("",))  # a missing or damaged tokenizer ends the server now, and not the first request
        self.prompts = PromptReader(self.bundle, text)
        batcher = Batcher(
            self.sessions,
            limits=limits_for(self.bundle, self.sessions, queue=settings.queue),
            largest=largest_calls(self.bundle, self.sessions),
            on_call=lambda call: metrics.call(self.name, call),
        )
        self._batcher = batcher
        on_progress(Progress(stage=f"loading {self.name}", done=1, total=2))
        batcher.warm_up().result()
        metrics.show_load(self.name, lambda: batcher.waiting, lambda: batcher.load().running)
        on_progress(Progress(stage=f"loading {self.name}", done=2, total=2))

    def to_samples(self, request: ImageRequest, height: int, width: int, most_pixels: int | None) -> Array | None:
        """Turn the image of a request into samples to start from, [1, channel, height, width].

        Raises:
            RequestError: If the image cannot be read, or the bundle cannot encode images.
            SessionError: If the encoder fails.
        """
        if request.image is None or isinstance(request.image, np.ndarray):
            return request.image
        session = self.sessions[FULL]
        channels = session.image_shape[0]
        name = request.names.get("image", "image")
        if channels not in _CHANNELS:
            raise request.problem("image", f"this model makes images of {channels} channels. Omit {{}}.")
        limit = max(_PIXELS, height * width) if most_pixels is None else most_pixels
        image = pictures.decode(request.image, name, most_pixels=limit)
        try:
            return session.encode(pictures.to_samples(image, channels, height, width, stretch=request.stretch))
        except SessionError as error:
            manifest = self.bundle.manifest
            without_encoder = manifest.decoder is not None and manifest.encoder is None
            if not (without_encoder or isinstance(error, ShapeMismatch)):
                raise
            raise request.problem("image", f"{{}}: {error}") from error

"""The model that samples: Triton's Python backend calls it, and it calls the engines, one after the other.

Requests of one call are answered in turn. The engines' calls of several instances meet in Triton's dynamic batcher.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.manifest import FULL
from unetc.device import Array
from unetc.errors import ModelError, RequestError, SessionError, ShapeMismatch, UnetcError
from unetc.memory import taking_memory
from unetc.report.pictures import to_pixels
from unetc.runtime.batching.ladder import AUTO, find_level
from unetc.runtime.batching.levels import open_levels
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session
from unetc.server.prompts import PromptReader, Wanted

from .asked import Asked, taken
from .backend import TritonBackend, Utilities

IMAGES, SEED, SAMPLES = "images", "seed", "samples"
"""Outputs of the model."""
BUNDLE = "bundle"
"""Folder of the loop's bundle, in the folder of the model's version."""

logger = logging.getLogger(__name__)


class SamplingModel:
    """All quality levels of a bundle."""

    def __init__(self, bundle: Bundle, utilities: Utilities) -> None:
        """Open a session per quality level; no engine is called yet.

        Args:
            bundle: A bundle whose graphs are the names of models.
            utilities: The module `triton_python_backend_utils`.

        Raises:
            CorruptArtifactError: If the bundle is not one that was exported for Triton.
        """
        self._utilities = utilities
        self._sessions = open_levels(bundle, TritonBackend(utilities))
        self._default = bundle.manifest.levels[0].name
        self._prompts = PromptReader(bundle, self._sessions[FULL].text)
        self._names = taken(self._prompts)
        self._steps = bundle.scheduler.counts

    @classmethod
    def open(cls, folder: Path, utilities: Utilities) -> SamplingModel:
        """Open the model in the folder of its version.

        Raises:
            ArtifactError: If its bundle cannot be read.
            CorruptArtifactError: If it has changed since the export.
        """
        return cls(Bundle.open(folder / BUNDLE), utilities)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests in turn; one that is wrong or fails gets an error and does not disturb the others."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        utilities = self._utilities
        try:
            with taking_memory():
                outputs = self._outputs(Asked.read(request, utilities, self._names))
                wanted = {*request.requested_output_names()}
                tensors = [utilities.Tensor(name, array) for name, array in outputs.items() if name in wanted]
        except UnetcError as error:
            wrong = isinstance(error, (RequestError, ModelError, ShapeMismatch))
            code = utilities.TritonError.INVALID_ARG if wrong else utilities.TritonError.INTERNAL
            return utilities.InferenceResponse(output_tensors=[], error=utilities.TritonError(str(error), code))
        except Exception:
            logger.exception("a request failed")
            message, code = "the model failed; Triton's log has the reason.", utilities.TritonError.INTERNAL
            return utilities.InferenceResponse(output_tensors=[], error=utilities.TritonError(message, code))
        return utilities.InferenceResponse(output_tensors=tensors)

    def _outputs(self, asked: Asked) -> dict[str, NDArray[Any]]:
        samples = self._sample(asked)
        seeds = asked.seeds if len(asked.seeds) > 1 else asked.seeds * asked.count
        return {IMAGES: images_of(samples), SEED: np.array(seeds, np.int64), SAMPLES: samples}

    def _sample(self, asked: Asked) -> Array:
        """Make the images of a request, [image, channel, height, width].

        Raises:
            RequestError: If a value does not fit the bundle.
        """
        session = self._session(asked)
        wanted = Wanted(
            prompt=asked.prompt,
            negative_prompt=asked.negative_prompt,
            label=asked.label,
            guidance_scale=asked.guidance_scale,
            indices=asked.indices,
            size=session.image_shape[1:],
        )
        conditions = self._prompts.read(wanted)
        for note in () if conditions is None else conditions.notes:
            logger.warning("%s.", note)
        if len(asked.seeds) == 1:
            return session.sample(asked.count, seed=asked.seeds[0], steps=asked.steps, conditions=conditions)
        rows = [None if conditions is None else conditions.take([k]) for k in range(len(asked.seeds))]
        alone = zip(asked.seeds, rows, strict=True)
        return np.concatenate([session.sample(1, seed=seed, steps=asked.steps, conditions=row) for seed, row in alone])

    def _session(self, asked: Asked) -> Session:
        """Find the level, and check the number of steps."""
        if asked.steps is not None and asked.steps not in self._steps:
            listed = ", ".join(map(str, self._steps))
            raise RequestError(f"steps is {asked.steps}. This model has tables for {listed} steps.", "steps")
        if asked.quality == AUTO:
            return self._sessions[self._default]
        try:
            return self._sessions[find_level(tuple(self._sessions), asked.quality)]
        except SessionError as error:
            raise RequestError(str(error), "quality") from error


def images_of(samples: Array) -> NDArray[Any]:
    """Turn samples into the output for images, [image, height, width, channel].

    Returns:
        Bytes from 0 to 255 for grey and colour; latents, which no bytes can hold, stay float32.
    """
    if samples.shape[1] not in (1, 3):
        return np.ascontiguousarray(np.moveaxis(samples, 1, -1))
    count, channels, height, width = samples.shape
    return to_pixels(samples).reshape(count, height, width, channels)

"""Sample many images in calls that engines take."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np

from unetc.device import Array
from unetc.progress import OnProgress, Progress

if TYPE_CHECKING:
    from unetc.conditions import Conditions
    from unetc.runtime.session import Step


class Draw(Protocol):
    """Samples one batch, as `Session.sample` does."""

    def __call__(
        self,
        batch: int,
        *,
        first_index: int,
        on_step: Callable[[Step], None],
        conditions: Conditions | None = None,
    ) -> Array:
        """Sample from noise; without conditions, with those of the bundle."""
        ...


class DrawFromImage(Protocol):
    """Samples one batch from images, as `Session.sample` does."""

    def __call__(
        self,
        *,
        image: Array,
        strength: float,
        first_index: int,
        on_step: Callable[[Step], None],
        conditions: Conditions | None = None,
    ) -> Array:
        """Sample from images with noise."""
        ...


def with_conditions(draw: Draw, rows: Conditions) -> Draw:
    """Give every sample conditions: sample k gets row k, modulo their number.

    Args:
        draw: Samples one batch, as `Session.sample` does.
        rows: The conditions.
    """

    def drawn(
        batch: int, *, first_index: int, on_step: Callable[[Step], None], conditions: Conditions | None = None
    ) -> Array:
        own = rows.take(range(first_index, first_index + batch)) if conditions is None else conditions
        return draw(batch, first_index=first_index, on_step=on_step, conditions=own)

    return drawn


def with_image(draw: DrawFromImage, image: Array, strength: float) -> Draw:
    """Start every sample from an image.

    Args:
        draw: Samples one batch, as `Session.sample` does.
        image: One sample to start from, [1, channel, height, width].
        strength: Share of the steps that are made.
    """

    def drawn(
        batch: int, *, first_index: int, on_step: Callable[[Step], None], conditions: Conditions | None = None
    ) -> Array:
        rows = np.repeat(image, batch, axis=0)
        return draw(image=rows, strength=strength, first_index=first_index, on_step=on_step, conditions=conditions)

    return drawn


def sample_in_calls(draw: Draw, samples: int, most: int, on_progress: OnProgress) -> Array:
    """Sample in calls of at most `most` samples; sample k of a seed does not depend on its call.

    Args:
        draw: Samples one batch.
        samples: Number of samples.
        most: Number of samples in one call, at most.
        on_progress: Called after each step; all calls together are the whole.

    Returns:
        Samples [samples, channel, height, width], float32.
    """
    firsts = range(0, samples, most)

    def report(call: int, step: Step) -> None:
        done = call * step.steps + step.index + 1
        on_progress(Progress(stage="sampling", done=done, total=len(firsts) * step.steps))

    batches = [
        draw(min(most, samples - first), first_index=first, on_step=partial(report, call))
        for call, first in enumerate(firsts)
    ]
    return np.concatenate(batches)

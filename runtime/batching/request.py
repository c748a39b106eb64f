"""Requests to the batcher, and their results."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from unetc.arguments import plain_fields
from unetc.artifacts.manifest import FULL as FULL
from unetc.conditions import Conditions
from unetc.device import Array
from unetc.errors import SessionError


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """Images to sample with one seed."""

    level: str = FULL
    """Name of a quality level."""
    steps: int | None = None
    """Number of steps; the bundle's default if None."""
    seed: int = 0
    """Seed of the noise; image k of a seed is the same whatever shares its calls."""
    count: int = 1
    """Number of images."""
    first_index: int = 0
    """Index of the first image within the seed."""
    conditions: Conditions | None = None
    """One row per image; the bundle's own if None."""
    height: int | None = None
    """Height of the images in pixels; the model's own if None."""
    width: int | None = None
    """Width of the images in pixels; the model's own if None."""
    image: Array | None = None
    """Samples to start from, [count, channel, height, width]; None starts from noise."""
    strength: float = 1.0
    """Share of the steps that are made when starting from an image, in (0, 1]."""
    seconds: float | None = None
    """Time limit; the batcher gives up between two steps after it. None for no limit."""
    since: float | None = None
    """Time on the monotonic clock from which the limit counts, if not from submission."""
    group: object = None
    """Requests with the same group get seats as one request would; None for a request alone."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            SessionError: If one has another type.
        """
        plain_fields(self, SessionError)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """Finished images of a request."""

    images: Array
    """[count, channel, height, width], mostly between -1 and 1."""
    level: str
    """Quality level that made them."""
    steps: int
    """Engine calls per image."""
    non_finite_steps: int
    """Steps that the full model repeated."""
    waited: float
    """Seconds between submission and the first step."""
    took: float
    """Seconds between submission and the last image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """State of a request after a step of its slowest image."""

    done: int
    """Steps that all images have made."""
    steps: int
    """Steps that they make in total."""
    phase: int | None
    """Phase of the plan in which the slowest image is; None for the full model."""
    engine: int
    """Engine of its last step; 0 for the full model."""


@dataclass(slots=True, kw_only=True, eq=False)
class Ticket:
    """A submitted request, for the client's side; every method may be called from any thread."""

    request: SampleRequest
    future: Future[SampleResult] = field(default_factory=Future)
    """Result; fails with a `UnetcError`, such as `DeadlineExceeded`, or is cancelled."""
    progress: Progress | None = None
    """Progress after the latest step; None before the first one."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set to give up; the place in the batch is free after the step that is running."""
    _position: Callable[[], int | None] = lambda: None
    _preview: Callable[[int | None], Future[Array | None]] = lambda images: Future()
    _wake: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Give up the request; the future is cancelled, unless it is done."""
        self.cancelled.set()
        self.future.cancel()
        self._wake()

    def position(self) -> int | None:
        """Count the requests that are served before this one; 0 while it runs, None when it is finished."""
        return self._position()

    def preview(self, images: int | None = None) -> Future[Array | None]:
        """Decode samples as they are now, [image, channel, height, width]; None until these images have begun.

        Args:
            images: Number of images, from the first; all by default.
        """
        return self._preview(images)

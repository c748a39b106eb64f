"""Time work on a device without waiting for it: by CUDA events, or by the host's clock on devices without them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from unetc.backend import Program
from unetc.device import Device, Tensor

WARMUP_ROUNDS = 2
"""Untimed rounds; the first one loads engines and captures CUDA graphs."""


class Clock(Protocol):
    """Marks moments in the work of a device."""

    def mark(self) -> Any:
        """Mark the moment when the device has finished all work queued so far."""

    def between_ms(self, start: Any, end: Any) -> float:
        """Return the milliseconds between two marks, waiting for the later one."""


class EventClock:
    """Records CUDA events on the current stream of torch."""

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the milliseconds between two events."""
        end.synchronize()
        return float(start.elapsed_time(end))


class HostClock:
    """Reads the host's clock once a device has finished its work."""

    def __init__(self, device: Device) -> None:
        """Watch a device."""
        self._device = device

    def mark(self) -> float:
        """Wait for the device and read the clock."""
        self._device.synchronize()
        return time.perf_counter()

    def between_ms(self, start: float, end: float) -> float:
        """Return the milliseconds between two readings."""
        return 1e3 * (end - start)


def clock_of(target: str, device: Device) -> Clock:
    """Choose the clock of a target: events if engines run in torch's stream, unlike onnxruntime's separate one."""
    return EventClock() if target.startswith(("torch:cuda", "tensorrt")) else HostClock(device)


class Timed:
    """A program that marks when its calls begin and end."""

    def __init__(self, program: Program, clock: Clock) -> None:
        """Wrap a program."""
        self._program = program
        self._clock = clock
        self._calls: list[tuple[Any, Any]] = []

    def __call__(self, inputs: Mapping[str, Tensor], output: Tensor) -> Mapping[str, Tensor]:
        """Run the program."""
        start = self._clock.mark()
        emitted = self._program(inputs, output)
        self._calls.append((start, self._clock.mark()))
        return emitted

    def take_ms(self) -> float:
        """Add up the time of all calls so far, and forget them."""
        calls, self._calls = self._calls, []
        return sum(self._clock.between_ms(*call) for call in calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """The effort spent on measuring."""

    seconds: float
    """Approximate time for each comparison."""
    least: int
    """Minimum number of rounds, however long they take."""
    most: int = 400

    def rounds(self, round_ms: float) -> int:
        """Choose the number of rounds."""
        return int(np.clip(1e3 * self.seconds / round_ms, self.least, self.most))


def timed_ms(calls: Sequence[Callable[[], object]], clock: Clock, effort: Effort) -> NDArray[np.float64]:
    """Time calls alternately: A B C, A B C, ...

    Args:
        calls: Timed calls. The host runs ahead of a GPU, so launching a call adds nothing to its time.
        clock: Clock that marks when calls begin and end.
        effort: Time to spend and number of rounds.

    Returns:
        Milliseconds, `[round, call]`.
    """
    for _ in range(WARMUP_ROUNDS):
        start = clock.mark()
        for call in calls:
            call()
        round_ms = clock.between_ms(start, clock.mark())
    marks = []
    for _ in range(effort.rounds(round_ms)):
        for call in calls:
            start = clock.mark()
            call()
            marks.append((start, clock.mark()))
    return np.array([clock.between_ms(*both) for both in marks]).reshape(-1, len(calls))

"""Time work on a device without waiting for it: by CUDA events, or by the host's clock where a device has none."""

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
"""Rounds that are not timed: in the first one engines are loaded and CUDA graphs captured."""


class Clock(Protocol):
    """Notes moments in the work of a device."""

    def mark(self) -> Any:
        """Note the moment at which everything asked of the device so far is done."""

    def between_ms(self, start: Any, end: Any) -> float:
        """Tell the milliseconds between two moments; waits for the later one."""


class EventClock:
    """Notes CUDA events on the current stream of torch."""

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Read two events."""
        end.synchronize()
        return float(start.elapsed_time(end))


class HostClock:
    """Reads the host's clock when a device has done its work."""

    def __init__(self, device: Device) -> None:
        """Watch a device."""
        self._device = device

    def mark(self) -> float:
        """Wait, and read the clock."""
        self._device.synchronize()
        return time.perf_counter()

    def between_ms(self, start: float, end: float) -> float:
        """Subtract."""
        return 1e3 * (end - start)


def clock_of(target: str, device: Device) -> Clock:
    """Choose the clock of a target: events where engines run in torch's stream; onnxruntime has one of its own."""
    return EventClock() if target.startswith(("torch:cuda", "tensorrt")) else HostClock(device)


class Timed:
    """A program that notes when its calls begin and end."""

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
    """How long to measure."""

    seconds: float
    """About so long, for each comparison."""
    least: int
    """Fewest rounds, however long they take."""
    most: int = 400

    def rounds(self, round_ms: float) -> int:
        """Choose the number of rounds."""
        return int(np.clip(1e3 * self.seconds / round_ms, self.least, self.most))


def timed_ms(calls: Sequence[Callable[[], object]], clock: Clock, effort: Effort) -> NDArray[np.float64]:
    """Time calls in turns: A B C, A B C, ...

    Args:
        calls: What is timed. The host runs ahead of a GPU, so launching a call takes none of its time.
        clock: Notes when calls begin and end.
        effort: How long to measure.

    Returns:
        [round, call] milliseconds.
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

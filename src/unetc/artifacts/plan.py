"""Plan: which engines exist and which one runs at which noise level."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from unetc.artifacts.profile import ModelReference, Treatment
from unetc.artifacts.record import Artifact, Record, finite, require

STEP = "step"
"""Name of the component that is the denoiser call itself."""


class Assignment(Record, frozen=True, kw_only=True):
    """One engine as the planner sees it: a treatment for every component; those not named are kept."""

    treatments: dict[str, Treatment]

    def __post_init__(self) -> None:
        """Check that only treatments that change something are named."""
        require(Treatment.KEEP not in self.treatments.values(), "an assignment names only components it does not keep")


class Phase(Record, frozen=True, kw_only=True):
    """A range of noise levels, in log-SNR, low inclusive and high exclusive, served by one cycle of engines."""

    low: float
    high: float
    cycle: tuple[int, ...]
    """Engines in the order they take turns: one engine, or a refresh followed by those that hold what it computed."""

    def __post_init__(self) -> None:
        """Check the range."""
        require(finite(self.low, self.high), f"the ends of a phase must be finite, got {self.low} to {self.high}")
        require(self.low < self.high, f"a phase must not be empty, got {self.low} to {self.high}")
        require(bool(self.cycle), "a phase needs an engine")


class Prediction(Record, frozen=True, kw_only=True):
    """What the planner expects, from the profile's single ablations."""

    time_ratio: float
    """Planned / full time of the denoiser calls."""
    relative_l2: float
    """Single damages at their upper 95 % bounds: summed over a phase's bins, then added in squares over components."""


class Plan(Artifact, frozen=True, kw_only=True):
    """Engines and the schedule that maps noise level to engine. Engine 0 is always the full model."""

    unetc: str
    model: ModelReference
    profile_sha256: str
    budget: float
    """Share of the full model's time that must be saved, in [0, 1)."""
    max_engines: int
    """Most engines the plan may use beside the full model."""
    engines: tuple[Assignment, ...]
    phases: tuple[Phase, ...]
    prediction: Prediction

    def __post_init__(self) -> None:
        """Check that phases tile the noise levels and name engines that exist."""
        require(bool(self.engines) and not self.engines[0].treatments, "engine 0 must be the full model")
        require(bool(self.phases), "a plan needs a phase")
        require(0 <= self.budget < 1, f"a budget lies in [0, 1), got {self.budget}")
        require(finite(self.prediction.time_ratio, self.prediction.relative_l2), "a prediction must be finite")
        for left, right in pairwise(self.phases):
            require(left.high == right.low, "phases must follow each other without a gap")
        for phase in self.phases:
            require(all(0 <= e < len(self.engines) for e in phase.cycle), "a phase names an unknown engine")

    def schedule(self, log_snr: Sequence[float]) -> tuple[int, ...]:
        """Choose the engine of every step.

        Args:
            log_snr: Noise level of every step, in the order of sampling (rising).

        Returns:
            One engine index per step. Inside a phase the engines of its cycle take turns.
        """
        chosen: list[int] = []
        previous, turn = -1, 0
        for level in log_snr:
            phase = sum(1 for later in self.phases[1:] if level >= later.low)
            turn = turn + 1 if phase == previous else 0
            previous = phase
            chosen.append(self.phases[phase].cycle[turn % len(self.phases[phase].cycle)])
        return tuple(chosen)

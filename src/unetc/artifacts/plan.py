"""Plan: the engines, and the noise levels at which each of them runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from unetc.treatments import Treatment

from .profile import GUIDANCE, STEP, ModelReference
from .record import Artifact, Record, finite, require


class Assignment(Record, frozen=True, kw_only=True):
    """One engine as the planner sees it: a treatment per component; components not named are kept."""

    treatments: dict[str, Treatment]
    emits: tuple[str, ...] = ()
    """Components whose branches it outputs for later engines to reuse."""

    def __post_init__(self) -> None:
        """Check that no treatment is `keep`, and that every emitted component is computed."""
        require(Treatment.KEEP not in self.treatments.values(), "an assignment must not list components that it keeps")
        require(not self.treatments.keys() & set(self.emits), "an engine can only emit components that it computes")
        alone = not self.halves or set(self.emits) <= {STEP}
        require(alone, f"an engine that treats {GUIDANCE} computes half of the rows, so it can emit {STEP} alone")

    @property
    def reused(self) -> frozenset[str]:
        """Components whose branches it takes from earlier steps."""
        return frozenset(name for name, treatment in self.treatments.items() if treatment.reuses)

    @property
    def halves(self) -> bool:
        """Whether a guided call computes the rows of the samples' own conditions alone."""
        return GUIDANCE in self.treatments and STEP not in self.treatments

    @property
    def in_graph(self) -> dict[str, Treatment]:
        """Treatments that the engine's graph is specialised for: all but the one of guidance."""
        return {name: treatment for name, treatment in self.treatments.items() if name != GUIDANCE}


class Phase(Record, frozen=True, kw_only=True):
    """A range of noise levels in log-SNR, low inclusive and high exclusive, served by one cycle of engines."""

    low: float
    high: float
    cycle: tuple[int, ...]
    """Engines in running order: one engine, or a refresh followed by engines that reuse its branches."""

    def __post_init__(self) -> None:
        """Check the range."""
        require(finite(self.low, self.high), f"the ends of a phase must be finite, got {self.low} to {self.high}")
        require(self.low < self.high, f"a phase must not be empty, got {self.low} to {self.high}")
        require(bool(self.cycle), "a phase needs an engine")


class Prediction(Record, frozen=True, kw_only=True):
    """Time, damage and memory that the planner predicts from the profile's single ablations."""

    time_ratio: float
    """Planned time / full model's time of the denoiser calls."""
    relative_l2: float
    """Upper 95 % bounds of the single damages: summed over a phase's bins, then added in squares over components."""
    memory: float
    """Bytes of weights if each engine has its own copy / bytes of the full model's weights; an upper bound."""


class Plan(Artifact, frozen=True, kw_only=True):
    """Engines and the schedule that maps noise levels to engines. Engine 0 always computes everything."""

    unetc: str
    model: ModelReference
    profile_sha256: str
    budget: float
    """Share of the full model's time that must be saved, in [0, 1)."""
    max_engines: int
    """Most engines the plan may use in addition to the full model."""
    engines: tuple[Assignment, ...]
    phases: tuple[Phase, ...]
    prediction: Prediction

    def __post_init__(self) -> None:
        """Check that phases tile the noise levels and name engines that exist."""
        require(bool(self.engines) and not self.engines[0].treatments, "engine 0 must compute everything")
        require(bool(self.phases), "a plan needs a phase")
        require(0 <= self.budget < 1, f"a budget must lie in [0, 1), got {self.budget}")
        expected = self.prediction
        require(finite(expected.time_ratio, expected.relative_l2, expected.memory), "a prediction must be finite")
        held = frozenset().union(*(engine.reused for engine in self.engines))
        require(held <= set(self.engines[0].emits), "engine 0 must emit every branch that another engine reuses")
        for left, right in pairwise(self.phases):
            require(left.high == right.low, "phases must follow each other without a gap")
        for phase in self.phases:
            require(all(0 <= e < len(self.engines) for e in phase.cycle), "a phase names an unknown engine")

    def schedule(self, log_snr: Sequence[float]) -> tuple[int, ...]:
        """Choose the engine of every step.

        Args:
            log_snr: Noise level of every step, in the order of sampling (rising).

        Returns:
            One engine index per step.
        """
        position, engines = Position(), []
        for level in log_snr:
            engine, position = self.advance(position, level)
            engines.append(engine)
        return tuple(engines)

    def advance(self, position: Position, log_snr: float) -> tuple[int, Position]:
        """Choose the engine of the next step.

        Inside a phase the engines of its cycle alternate. If an engine needs a branch that no earlier step emitted,
        engine 0 runs in its place.

        Args:
            position: Where the trajectory is.
            log_snr: Noise level of the next step, not below the last one.

        Returns:
            The engine's index, and the position after it.
        """
        phase = sum(1 for later in self.phases[1:] if log_snr >= later.low)
        turn = position.turn + 1 if phase == position.phase else 0
        cycle = self.phases[phase].cycle
        engine = cycle[turn % len(cycle)]
        if not self.engines[engine].reused <= position.emitted:
            engine = 0
        return engine, Position(phase, turn, position.emitted.union(self.engines[engine].emits))


def full_plan(plan: Plan) -> Plan:
    """Make the plan of the same model that runs the full model at every noise level."""
    return msgspec.structs.replace(
        plan,
        budget=0.0,
        engines=(Assignment(treatments={}),),
        phases=(Phase(low=plan.phases[0].low, high=plan.phases[-1].high, cycle=(0,)),),
        prediction=Prediction(time_ratio=1.0, relative_l2=0.0, memory=1.0),
    )


@dataclass(frozen=True, slots=True)
class Position:
    """Where one trajectory is in a plan."""

    phase: int = -1
    """Phase of the last step; -1 before the first one."""
    turn: int = -1
    """Index of the last step within its phase."""
    emitted: frozenset[str] = frozenset()
    """Components whose branch an earlier step emitted."""

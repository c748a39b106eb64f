"""Plan: which engines exist and which one runs at which noise level."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .profile import ModelReference, Treatment
from .record import Artifact, Record, finite, require


class Assignment(Record, frozen=True, kw_only=True):
    """One engine as the planner sees it: a treatment for every component; those not named are kept."""

    treatments: dict[str, Treatment]
    emits: tuple[str, ...] = ()
    """Components that it computes and hands to the engines that hold or forecast them."""

    def __post_init__(self) -> None:
        """Check that only treatments that change something are named, and that what is emitted is computed."""
        require(Treatment.KEEP not in self.treatments.values(), "an assignment names only components it does not keep")
        require(not self.treatments.keys() & set(self.emits), "an engine cannot emit what it does not compute")

    @property
    def reused(self) -> frozenset[str]:
        """Components that it takes from earlier steps."""
        return frozenset(name for name, treatment in self.treatments.items() if treatment.reuses)


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
    memory: float
    """Weights that all engines hold together, each its own copy / those of the full model alone; an upper bound."""


class Plan(Artifact, frozen=True, kw_only=True):
    """Engines and the schedule that maps noise level to engine. Engine 0 always computes everything."""

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
        require(bool(self.engines) and not self.engines[0].treatments, "engine 0 must compute everything")
        require(bool(self.phases), "a plan needs a phase")
        require(0 <= self.budget < 1, f"a budget lies in [0, 1), got {self.budget}")
        expected = self.prediction
        require(finite(expected.time_ratio, expected.relative_l2, expected.memory), "a prediction must be finite")
        held = frozenset().union(*(engine.reused for engine in self.engines))
        require(held <= set(self.engines[0].emits), "engine 0 must emit whatever another engine holds or forecasts")
        for left, right in pairwise(self.phases):
            require(left.high == right.low, "phases must follow each other without a gap")
        for phase in self.phases:
            require(all(0 <= e < len(self.engines) for e in phase.cycle), "a phase names an unknown engine")

    def schedule(self, log_snr: Sequence[float]) -> tuple[int, ...]:
        """Choose the engine of every step.

        Args:
            log_snr: Noise level of every step, in the order of sampling (rising).

        Returns:
            One engine index per step. Inside a phase the engines of its cycle take turns. Where an engine would need
            what no earlier step has emitted, engine 0 runs instead.
        """
        turns = Turns(self)
        return tuple(turns.take(level) for level in log_snr)


Turn = tuple[int, int, frozenset[str]]
"""Phase, number of steps in it, and what has been emitted, for `Turns` alone."""


class Turns:
    """Whose turn it is: the engines of a plan along one trajectory, chosen one step at a time."""

    def __init__(self, plan: Plan) -> None:
        """Begin a trajectory."""
        self.phase = -1
        """Of the last step."""
        self._plan = plan
        self._turn = -1
        self._available: frozenset[str] = frozenset()

    def take(self, log_snr: float) -> int:
        """Choose the engine of the next step, which is at a noise level that is not below that of the step before."""
        phase = sum(1 for later in self._plan.phases[1:] if log_snr >= later.low)
        self._turn = self._turn + 1 if phase == self.phase else 0
        self.phase = phase
        cycle = self._plan.phases[phase].cycle
        engine = cycle[self._turn % len(cycle)]
        if not self._plan.engines[engine].reused <= self._available:
            engine = 0
        self._available = self._available.union(self._plan.engines[engine].emits)
        return engine

    def remember(self) -> Turn:
        """Tell where the trajectory is."""
        return self.phase, self._turn, self._available

    def go_back(self, turn: Turn) -> None:
        """Be again where the trajectory was."""
        self.phase, self._turn, self._available = turn

    def forget(self) -> None:
        """Take it that nothing was emitted yet."""
        self._available = frozenset()

"""The branches that earlier steps of one rollout computed, and the rollout's position in its plan.

An engine *emits* the branch of a component; later engines hold or forecast it. Which engine may run depends on the
branches that are there, so both live in one object and go back together. The tensors stay on the device: only the
backend that emitted them looks into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from unetc.artifacts.plan import Plan, Position
from unetc.artifacts.profile import GUIDANCE
from unetc.device import HOST, Device, Tensor
from unetc.treatments import COMPUTED, EARLIER, EXTRAPOLATION, HELD, Treatment

Branches = Mapping[str, tuple[tuple[float, Tensor], ...]]
"""By component index, or `guidance`: timestep and branch of its last two computed timesteps, newest first."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State of a branch cache after a step."""

    position: Position = field(default_factory=Position)
    branches: Branches = field(default_factory=dict)

    def emptied(self) -> Snapshot:
        """Make a snapshot of the same step without any branch."""
        return Snapshot(Position(self.position.phase, self.position.turn))


class BranchCache:
    """Branches and position of one rollout."""

    def __init__(self, plan: Plan | None = None, device: Device = HOST) -> None:
        """Start with no branch, before the first step.

        Args:
            plan: Which engine runs when; None if the caller chooses.
            device: Where the inputs of engines are made.
        """
        self._plan = plan
        self._device = device
        self._state = Snapshot()
        self._factors: dict[tuple[float, int], Tensor] = {}
        """Extrapolation factors on the device, by value and rows; steps of one distance share a factor."""

    @property
    def phase(self) -> int | None:
        """Phase of the last step; None without a plan."""
        return None if self._plan is None else self._state.position.phase

    def next_engine(self, log_snr: float) -> int:
        """Choose the engine of the next step, whose noise level is not below the last one; 0 without a plan."""
        if self._plan is None:
            return 0
        engine, position = self._plan.advance(self._state.position, log_snr)
        self._state = Snapshot(position, self._state.branches)
        return engine

    def store(self, emitted: Mapping[str, Tensor], timestep: float) -> None:
        """Store the branches that an engine emitted at a step."""
        branches = dict(self._state.branches)
        for name, value in emitted.items():
            index = name.removeprefix(COMPUTED)
            earlier = [one for one in branches.get(index, ()) if one[0] != timestep]  # Heun calls twice at a timestep
            branches[index] = ((timestep, value), *earlier[:1])
        self._state = Snapshot(self._state.position, branches)

    def inputs(self, timestep: float, rows: int) -> dict[str, Tensor]:
        """Make the inputs of engines that reuse branches at a step.

        A component that was computed only once is held: its extrapolation factor is 0.

        Args:
            timestep: The scheduler's value.
            rows: Rows of the call, each with its factor; 1 for a factor that is broadcast.
        """
        inputs: dict[str, Tensor] = {}
        for index in self._state.branches:
            if index == GUIDANCE:  # no engine reads it
                continue
            held, earlier, factor = self._recall(index, timestep)
            key = factor, rows
            if key not in self._factors:
                self._factors[key] = self._device.full((rows,), factor)
            inputs |= {HELD + index: held, EARLIER + index: earlier, EXTRAPOLATION + index: self._factors[key]}
        return inputs

    @property
    def knows_guidance(self) -> bool:
        """Whether a step computed both halves of a guided call."""
        return GUIDANCE in self._state.branches

    def guidance(self, treatment: Treatment, timestep: float) -> Tensor | None:
        """Recall the difference between the halves of a guided call; None if the treatment drops it.

        Args:
            treatment: Treatment of guidance.
            timestep: The scheduler's value.
        """
        recall = treatment.row.recall
        if recall is None:
            return None
        held, earlier, factor = self._recall(GUIDANCE, timestep)
        return recall({HELD: held, EARLIER: earlier, EXTRAPOLATION: factor}.__getitem__)

    def _recall(self, index: str, timestep: float) -> tuple[Tensor, Tensor, float]:
        """Return the last branch of a component, the one before it, and the extrapolation factor at a timestep."""
        history = self._state.branches[index]
        (last, held), (before, earlier) = history[0], history[-1]
        return held, earlier, (timestep - last) / (last - before) if last != before else 0.0

    def snapshot(self) -> Snapshot:
        """Return the state after the last step; later steps do not change it."""
        return self._state

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to an earlier state."""
        self._state = snapshot

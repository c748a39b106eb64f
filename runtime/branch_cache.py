"""The branches that earlier steps of one rollout computed, and the rollout's position in its plan.

An engine *emits* the branch of a component; later engines hold or forecast it. Which engine may run depends on the
branches that are there, so both live in one object and go back together. The tensors stay on the device: only the
backend that emitted them looks into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from unetc.artifacts.plan import Plan, Position
from unetc.artifacts.profile import GUIDANCE
from unetc.device import HOST, Device, Tensor
from unetc.sampler.prediction_type import PredictionType
from unetc.treatments import COMPUTED, EARLIER, EXTRAPOLATION, HELD, Treatment

History = tuple[tuple[float, Tensor], ...]
"""Timestep and tensor of the last two timesteps at which it was computed, newest first."""
Branches = Mapping[str, History]
"""Branches by component index, and the difference of guidance under `guidance`."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State of a branch cache after a step."""

    position: Position = field(default_factory=Position)
    branches: Branches = field(default_factory=dict)
    denoised: History = ()
    """Denoised samples, [row, channel, height, width]; after their channels, a predicted variance as it is."""

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
        self._state = Snapshot(position, self._state.branches, self._state.denoised)
        return engine

    def store(self, emitted: Mapping[str, Tensor], timestep: float) -> None:
        """Store the branches that an engine emitted at a step."""
        if not emitted:
            return
        branches = dict(self._state.branches)
        for name, value in emitted.items():
            index = name.removeprefix(COMPUTED)
            branches[index] = _with(branches.get(index, ()), timestep, value)
        self._state = Snapshot(self._state.position, branches, self._state.denoised)

    def store_denoised(
        self, kind: PredictionType, sample: Tensor, prediction: Tensor, timestep: float, log_snr: float
    ) -> None:
        """Store the denoised sample of a step.

        Args:
            kind: Type of the prediction.
            sample: Input of the denoiser, [row, channel, height, width].
            prediction: Its prediction, before guidance; it may have more channels, for a variance.
            timestep: The scheduler's value.
            log_snr: The noise level there.
        """
        of_sample, of_prediction = kind.denoised_weights(log_snr)
        channels = sample.shape[1]
        denoised = self._joined(of_sample * sample + of_prediction * prediction[:, :channels], prediction[:, channels:])
        self._state = replace(self._state, denoised=_with(self._state.denoised, timestep, denoised))

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

    def denoised_inputs(self, kind: PredictionType, sample: Tensor, log_snr: float) -> dict[str, Tensor]:
        """Make the predictions that imply the earlier denoised samples at the current sample.

        A predicted variance is held.

        Args:
            kind: Type of the prediction.
            sample: Input of the denoiser, [row, channel, height, width].
            log_snr: The current noise level.

        Returns:
            The inputs `HELD` and `EARLIER` of the step, by prefix; empty if there is no earlier denoised sample.
        """
        if not (history := self._state.denoised):
            return {}
        of_sample, of_prediction = kind.denoised_weights(log_snr)
        channels, variance = sample.shape[1], history[0][1][:, sample.shape[1] :]
        shift = sample * (of_sample / of_prediction)

        def implied(denoised: Tensor) -> Tensor:
            return self._joined(denoised[:, :channels] * (1 / of_prediction) - shift, variance)

        held = implied(history[0][1])
        return {HELD: held, EARLIER: implied(history[1][1]) if len(history) > 1 else held}

    def _joined(self, sample: Tensor, variance: Tensor) -> Tensor:
        """Join the channels of a sample and of a variance, if there is one."""
        (rows, channels, *size), further = sample.shape, variance.shape[1]
        if not further:
            return sample
        joined = self._device.empty((rows, channels + further, *size))
        joined[:, :channels] = sample
        joined[:, channels:] = variance
        return joined

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


def _with(history: History, timestep: float, value: Tensor) -> History:
    """Put a new tensor in front of a history; Heun's method calls twice at a timestep, and the second call counts."""
    return ((timestep, value), *[one for one in history if one[0] != timestep][:1])

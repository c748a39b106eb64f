"""One image on its way: a rollout that shares its engine calls with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from unetc.artifacts.call_input import SAMPLE
from unetc.backend import Program
from unetc.device import Device, Tensor
from unetc.runtime.loop import Start
from unetc.runtime.rollout import EngineCall, Rollout, not_finite
from unetc.runtime.rows import Rows, Taken
from unetc.runtime.session import Session
from unetc.runtime.trajectory import Trajectory


class Member:
    """One image of a request. Its rows stay together in a call: negative, middle and own conditions in turn."""

    def __init__(self, session: Session, start: Start, *, full_model: bool) -> None:
        """Begin on the device.

        Args:
            session: The engines.
            start: A start of one sample.
            full_model: Whether the full model makes every step.
        """
        device = session.device
        batch, _, height, width = start.noise.shape
        self.steps = start.table.steps
        self.step = start.first
        self.non_finite_steps = 0
        self._start = start
        self._whole = start.rows
        """Rows of a call with both halves of guidance."""
        self._device = device
        self._trajectory = Trajectory.start(start.table, start.noise, device, image=start.image, first=start.first)
        self._conditions = start.conditions.on(device)
        self._constant = self._conditions.constant(batch, height, width)
        self._rollout: Rollout = session.rollout(full_model=full_model)
        self.call: EngineCall
        """The next call."""
        self._sample: Tensor
        """Input of the denoiser in the call that is being made, [row, channel, height, width]."""
        self._choose()

    @cached_property
    def form(self) -> tuple[object, ...]:
        """Shapes of the rows; members of one form can share a call."""
        shapes = sorted((name, tuple(value.shape[1:])) for name, value in self._constant.items())
        return (tuple(self._start.noise.shape[1:]), *shapes)

    @property
    def rows(self) -> int:
        """Rows of the next call."""
        return self.call.rows(self._whole)

    @property
    def part(self) -> float:
        """Rows of the next call / rows of a call with both halves of guidance."""
        return self.rows / self._whole

    @property
    def made(self) -> int:
        """Number of steps that are made."""
        return self.step - self._start.first

    @property
    def share(self) -> float:
        """Share of its steps that are made."""
        return self.made / (self.steps - self._start.first)

    @property
    def finished(self) -> bool:
        """Whether all steps are made."""
        return self.step == self.steps

    @property
    def engine(self) -> int:
        """Engine of the next call, or of the last one when finished; 0 for the full model."""
        return self.call.engine

    @property
    def phase(self) -> int | None:
        """Phase of the next call, or of the last one when finished; None for the full model."""
        return self._rollout.phase

    @property
    def sample(self) -> Tensor:
        """The current sample, [1, channel, height, width]."""
        return self._trajectory.sample

    @property
    def prediction_shape(self) -> tuple[int, ...]:
        """Shape of a row of the prediction."""
        return (self._start.predicted_channels, *self._start.noise.shape[2:])

    def inputs(self) -> dict[str, Tensor | Rows]:
        """Build the inputs of the next call."""
        inputs = self._plain_inputs()
        self._sample = inputs[SAMPLE]
        return self._rollout.inputs(self.call, inputs, self._whole)

    def advance(self, prediction: Tensor, emitted: Mapping[str, Rows]) -> None:
        """Make a step from a prediction, [row, channel, height, width], that has no NaN and no infinity."""
        self._advance(self._rollout.complete(self.call, self._sample, prediction, emitted))

    def repeat(self, program: Program) -> None:
        """Make a step with the full model alone, because its prediction was not finite.

        Args:
            program: The program that was called, which may have stood in for the full model.

        Raises:
            NonFiniteError: If the full model's prediction is not finite either.
        """
        prediction = self._device.empty((self._whole, *self.prediction_shape))
        self._rollout.run_again(replace(self.call, program=program), self._plain_inputs(), prediction)
        if not self._device.is_finite(prediction):
            raise not_finite(self.call, "and the full model")
        self.non_finite_steps += 1
        self._advance(prediction)

    def _plain_inputs(self) -> dict[str, Tensor]:
        """Build the inputs of the next call, without cached branches."""
        table = self._start.table
        seen = self._trajectory.seen(table, self.step)
        return self._conditions.varying(seen, table.timesteps.item(self.step)) | self._constant

    def _advance(self, prediction: Tensor) -> None:
        start = self._start
        guided = self._conditions.guide(prediction, start.noise.shape[1])
        self._trajectory = self._trajectory.advance(
            start.table, self.step, guided, seed=start.seed, indices=start.indices
        )
        self.step += 1
        if not self.finished:
            self._choose()

    def _choose(self) -> None:
        table = self._start.table
        timestep, log_snr = table.timesteps.item(self.step), table.log_snr.item(self.step)
        self.call = self._rollout.choose(timestep, log_snr, paired=self._conditions.paired)


def join(members: Sequence[Member], padding: int, device: Device) -> Mapping[str, Tensor]:
    """Join the inputs of a call of some members.

    Args:
        members: Members that share the call.
        padding: Rows to add, copies of the last member's first row.
        device: Device of the inputs.
    """
    if len(members) == 1 and not padding:
        return Taken(members[0].inputs(), device)
    return Joined(members, padding, device)


class Joined(Mapping[str, Tensor]):
    """Inputs of a call of several rows, made by `join`; only those that the engine reads are joined."""

    def __init__(self, members: Sequence[Member], padding: int, device: Device) -> None:
        """Collect the inputs.

        Args:
            members: Members that share the call.
            padding: Rows to add, copies of the last member's first row.
            device: Device of the inputs.
        """
        self._parts = [member.inputs() for member in members]
        self._padding = padding
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        """Join an input of all members."""
        parts = [part[name] for part in self._parts]
        if not self._padding and (whole := _whole(parts)) is not None:
            return whole
        device = self._device
        tensors = [part.take(device) if isinstance(part, Rows) else part for part in parts]
        tensors += [device.rows(tensors[-1], 0, 1)] * self._padding
        return device.concatenate(tensors)

    def __contains__(self, name: object) -> bool:
        """Check whether all members have an input."""
        return all(name in part for part in self._parts)

    def __iter__(self) -> Iterator[str]:
        """List the inputs that all members have."""
        return (name for name in self._parts[0] if name in self)

    def __len__(self) -> int:
        """Count the inputs that all members have."""
        return sum(1 for _ in self)


def _whole(parts: Sequence[Tensor | Rows]) -> Tensor | None:
    """Return the tensor of which the parts are all rows in order, as when the members of a call stay together."""
    first = parts[0]
    if not isinstance(first, Rows) or first.start != 0:
        return None
    stop = 0
    for part in parts:
        if not isinstance(part, Rows) or part.tensor is not first.tensor or part.start != stop:
            return None
        stop = part.stop
    return first.tensor if stop == first.of else None

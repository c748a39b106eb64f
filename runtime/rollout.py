"""One trajectory through loaded engines: whose turn it is, what they hold, and who makes a step that one has spoilt."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unetc.artifacts.plan import Turn, Turns
from unetc.backend import Program
from unetc.conditions import Conditions
from unetc.device import Device, Tensor
from unetc.errors import NonFiniteError, StaleEngineError

from .branch_cache import Held
from .engine_pool import EnginePool

logger = logging.getLogger(__name__)

FULL_ENGINE = 0
"""The engine of a plan that computes everything, and emits what the others reuse."""


class NonFiniteSteps:
    """Counts the steps that the full model had to make again; sessions are sampled from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    def add(self) -> None:
        """Count one more."""
        with self._lock:
            self.count += 1


@dataclass(frozen=True, slots=True)
class EngineCall:
    """One engine call of a trajectory."""

    engine: int
    """Index in the plan; 0 for the full model."""
    timestep: float
    program: Program
    turn: Turn | None
    """After this call; None where the full model makes all of them."""


class Rollout:
    """One trajectory through loaded engines: whose turn it is, and what they have emitted so far."""

    def __init__(
        self,
        programs: Sequence[Program],
        full: Program,
        *,
        exact: Program | None = None,
        predicted_channels: int,
        turns: Turns | None,
        device: Device,
        non_finite_steps: NonFiniteSteps,
        pool: EnginePool | None = None,
    ) -> None:
        """Begin a trajectory.

        Args:
            programs: The engines.
            full: The full model.
            exact: The full model in float32, which makes a step again that an engine has spoilt; None if `full` is.
            predicted_channels: Width of what they predict.
            turns: Which one runs when; always the full model when None.
            device: Where their tensors are.
            non_finite_steps: Counts the steps made again.
            pool: Loads the engines; None if they are loaded.
        """
        self._programs = programs
        self._full = full
        self._exact = exact or full
        self._predicted_channels = predicted_channels
        self._turns = turns
        self._device = device
        self._non_finite_steps = non_finite_steps
        self._pool = pool
        self._held = Held(device=device)

    def predict(self, sample: Tensor, timestep: float, log_snr: float, conditions: Conditions) -> Tensor:
        """Predict what a scheduler elsewhere asks for.

        Args:
            sample: What the denoiser sees, [batch, channel, height, width], on the device.
            timestep: The scheduler's value.
            log_snr: The noise level there, not below that of the call before.
            conditions: What the samples are conditioned on, on the device.

        Returns:
            The prediction, guided; it has further channels where the denoiser predicts a variance too.

        Raises:
            NonFiniteError: If the full model produces NaN or infinity.
        """
        inputs = conditions.widen(sample, timestep)
        prediction = self._device.empty((len(inputs["sample"]), self._predicted_channels, *sample.shape[2:]))
        call = self.run(inputs, prediction, timestep, log_snr)
        if not self._device.is_finite(prediction):
            self.run_again(call, inputs, prediction)
            if not self._device.is_finite(prediction):
                raise not_finite(call, "and the full model")
        return conditions.guide(prediction, sample.shape[1])

    def run(self, inputs: Mapping[str, Tensor], prediction: Tensor, timestep: float, log_snr: float) -> EngineCall:
        """Run the engine whose turn it is.

        Args:
            inputs: Of a call, but for what is held.
            prediction: To be written, [row, channel, height, width].
            timestep: The scheduler's value.
            log_snr: The noise level there, not below that of the call before.
        """
        engine = self._turns.take(log_snr) if self._turns else FULL_ENGINE
        if self._pool is not None:
            self._pool.enter(self, self._turns.phase if self._turns else None)
        program = self._programs[engine] if self._turns else self._full
        self._held.remember(program({**inputs, **self._held.inputs(timestep)}, prediction), timestep)
        return EngineCall(engine, timestep, program, self._turns.remember() if self._turns else None)

    def run_again(self, call: EngineCall, inputs: Mapping[str, Tensor], prediction: Tensor) -> EngineCall:
        """Run the full model, in float32, in place of an engine that gave NaN or infinity.

        All that is held may be spoilt as well, so it is forgotten: engine 0 computes it anew when it is needed. So is
        what was run after that engine.

        Args:
            call: The call of the engine.
            inputs: As they were given to it.
            prediction: To be written, [row, channel, height, width].

        Raises:
            NonFiniteError: If that engine was the full model in float32.
        """
        if call.program is self._exact:
            raise not_finite(call)
        logger.warning(
            "engine %d produced NaN or infinity at timestep %g; the full model takes its turn.",
            call.engine,
            call.timestep,
        )
        self._non_finite_steps.add()
        self._held = Held(device=self._device)
        turn = None
        if self._turns and call.turn:
            self._turns.go_back(call.turn)
            self._turns.forget()
            turn = self._turns.remember()
        program = self._exact
        try:
            program(inputs, prediction)
        except StaleEngineError as error:
            logger.warning("the full model takes its turn in the precision that overflowed: %s", error)
            program = self._full
            program(inputs, prediction)
        return EngineCall(FULL_ENGINE, call.timestep, program, turn)


def not_finite(call: EngineCall, *others: str) -> NonFiniteError:
    """Say who could not go on with a trajectory."""
    who = " ".join([f"engine {call.engine}", *others])
    return NonFiniteError(
        f"{who} produced NaN or infinity at timestep {call.timestep:g}. Check the noise and the conditions that were "
        "given, and that the weights are finite."
    )

"""One trajectory through loaded engines: engine selection, cached branches, and fallback after a non-finite step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unetc.artifacts.call_input import SAMPLE
from unetc.artifacts.plan import Plan
from unetc.artifacts.profile import STEP
from unetc.backend import Program
from unetc.conditions import Conditions
from unetc.device import Device, Tensor
from unetc.errors import NonFiniteError, SessionError, StaleEngineError
from unetc.sampler.prediction_type import PredictionType

from .branch_cache import BranchCache, Snapshot
from .engine_pool import EnginePool

logger = logging.getLogger(__name__)

FULL_ENGINE = 0
"""Index of the engine that computes everything, and emits the branches that others reuse."""


class NonFiniteSteps:
    """Counts the steps that the full model made again, over all threads of a session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    def add(self) -> None:
        """Count one more."""
        with self._lock:
            self.count += 1


@dataclass(frozen=True, slots=True)
class EngineCall:
    """One engine call of a rollout."""

    engine: int
    """Index in the plan; 0 for the full model."""
    timestep: float
    log_snr: float
    program: Program
    after: Snapshot
    """The branch cache after this call, without its branches: a call that fails may have made them non-finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Denoised:
    """Engines of a plan that reuses the denoised sample."""

    kind: PredictionType
    emitters: frozenset[int]
    """Engines that compute the step for others."""
    readers: frozenset[int]
    """Engines that reuse the denoised sample."""

    @classmethod
    def of(cls, plan: Plan, kind: PredictionType | None) -> _Denoised | None:
        """Find the engines of a plan; None if it does not reuse the denoised sample."""
        engines = dict(enumerate(plan.engines))
        readers = frozenset(
            i for i, own in engines.items() if STEP in own.treatments and own.treatments[STEP].row.of_x0
        )
        if not readers:
            return None
        if kind is None:
            raise SessionError(
                "the plan reuses the denoised sample, but the scheduler table has no prediction type to compute it "
                "from. Analyse the model and build the bundle again."
            )
        return cls(kind=kind, emitters=frozenset(i for i, own in engines.items() if STEP in own.emits), readers=readers)


class Rollout:
    """One trajectory through loaded engines."""

    def __init__(
        self,
        programs: Sequence[Program],
        full: Program,
        *,
        exact: Program | None = None,
        predicted_channels: int,
        plan: Plan | None,
        device: Device,
        non_finite_steps: NonFiniteSteps,
        pool: EnginePool | None = None,
        prediction_type: PredictionType | None = None,
    ) -> None:
        """Begin a trajectory.

        Args:
            programs: The engines of the plan.
            full: The full model.
            exact: The full model in float32, which repeats non-finite steps; None if `full` computes in float32.
            predicted_channels: Channels of the denoiser's prediction.
            plan: Which engine runs when; None runs the full model at every step.
            device: Where the tensors are.
            non_finite_steps: Counts repeated steps.
            pool: Loads engines when they are needed; None if all are loaded.
            prediction_type: How the denoised sample follows from a prediction, for plans that reuse it.

        Raises:
            SessionError: If the plan reuses the denoised sample, and the type of the prediction is not known.
        """
        self._programs = (full,) if plan is None else programs
        self._full = full
        self._exact = exact or full
        self._predicted_channels = predicted_channels
        self._device = device
        self._non_finite_steps = non_finite_steps
        self._pool = pool
        self._cache = BranchCache(plan, device)
        self._denoised = None if plan is None else _Denoised.of(plan, prediction_type)

    def predict(self, sample: Tensor, timestep: float, log_snr: float, conditions: Conditions) -> Tensor:
        """Predict for a scheduler that runs elsewhere.

        Args:
            sample: Input of the denoiser, [batch, channel, height, width], on the device.
            timestep: The scheduler's value.
            log_snr: The noise level there, not below the last call's.
            conditions: Conditions of the samples, on the device.

        Returns:
            The guided prediction; it has more channels than the sample if the denoiser also predicts a variance.

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
        """Run the engine of the next step.

        Args:
            inputs: Inputs of the call, without cached branches.
            prediction: Output, [row, channel, height, width].
            timestep: The scheduler's value.
            log_snr: The noise level there, not below the last call's.
        """
        call = self.choose(timestep, log_snr)
        sample = inputs[SAMPLE]
        emitted = call.program({**inputs, **self.reused(call, sample, len(prediction))}, prediction)
        self.store(call, emitted, sample, prediction)
        return call

    def choose(self, timestep: float, log_snr: float) -> EngineCall:
        """Choose the engine of the next step; the caller runs it and stores the branches that it emits.

        Args:
            timestep: The scheduler's value.
            log_snr: The noise level there, not below the last call's.
        """
        engine = self._cache.next_engine(log_snr)
        if self._pool is not None:
            self._pool.enter(self, self._cache.phase)
        return EngineCall(engine, timestep, log_snr, self._programs[engine], self._cache.snapshot().emptied())

    def reused(self, call: EngineCall, sample: Tensor, rows: int) -> dict[str, Tensor]:
        """Make the inputs of a call that come from cached branches.

        Args:
            call: The call.
            sample: Input of the denoiser, [row, channel, height, width].
            rows: Rows of the call.
        """
        inputs = self._cache.inputs(call.timestep, rows)
        if (own := self._denoised) is not None and call.engine in own.readers:
            implied = self._cache.denoised_inputs(own.kind, sample, call.log_snr)
            # an engine that reuses the step reads no other component, so it does not matter which of them the step is
            inputs |= {name: implied[prefix] for name in inputs for prefix in implied if name.startswith(prefix)}
        return inputs

    def store(self, call: EngineCall, emitted: Mapping[str, Tensor], sample: Tensor, prediction: Tensor) -> None:
        """Store the branches that a call has emitted.

        Args:
            call: The call.
            emitted: The branches.
            sample: Input of the denoiser, [row, channel, height, width].
            prediction: Its prediction before guidance, [row, channel, height, width].
        """
        self._cache.store(emitted, call.timestep)
        if (own := self._denoised) is not None and call.engine in own.emitters:
            self._cache.store_denoised(own.kind, sample, prediction, call.timestep, call.log_snr)

    @property
    def phase(self) -> int | None:
        """Phase of the last chosen step; None without a plan."""
        return self._cache.phase

    def run_again(self, failed: EngineCall, inputs: Mapping[str, Tensor], prediction: Tensor) -> EngineCall:
        """Repeat a non-finite step with the full model in float32.

        Cached branches may be non-finite too, so they are dropped, and engine 0 computes them again when they are
        needed. Calls made after the failed one are undone.

        Args:
            failed: The call that produced NaN or infinity.
            inputs: Its inputs.
            prediction: Output, [row, channel, height, width].

        Raises:
            NonFiniteError: If the failed engine was the full model in float32.
        """
        if failed.program is self._exact:
            raise not_finite(failed)
        logger.warning(
            "engine %d produced NaN or infinity at timestep %g; the full model takes its turn.",
            failed.engine,
            failed.timestep,
        )
        self._non_finite_steps.add()
        self._cache.restore(failed.after)
        program = self._exact
        try:
            program(inputs, prediction)
        except StaleEngineError as error:
            logger.warning("the full model takes its turn in the precision that overflowed: %s", error)
            program = self._full
            program(inputs, prediction)
        return EngineCall(FULL_ENGINE, failed.timestep, failed.log_snr, program, failed.after)


def not_finite(call: EngineCall, *others: str) -> NonFiniteError:
    """Make the error for a trajectory that cannot go on."""
    who = " ".join([f"engine {call.engine}", *others])
    return NonFiniteError(
        f"{who} produced NaN or infinity at timestep {call.timestep:g}. Check that the noise, the conditions and the "
        "weights are finite."
    )

"""Forecast with one more earlier value: a straight line, and a damped share of the curvature of the last three."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np

from unetc.artifacts.plan import Plan
from unetc.artifacts.profile import STEP, Component
from unetc.backend import Array
from unetc.device import HOST, Device, Tensor
from unetc.runtime import rollout
from unetc.runtime.branch_cache import BranchCache
from unetc.sampler.prediction_type import PredictionType
from unetc.treatments import COMPUTED, EARLIER, HELD, Treatment

TAYLOR = "Taylor"
"""A damping that is not one number: the polynomial of TaylorSeer, arXiv:2503.06923, with its second derivative."""
Damping = float | str
"""Share of the curvature: 0 is the line, 1 the parabola; or `TAYLOR`."""


def forecast_weights(times: Sequence[float], time: float, damping: Damping) -> tuple[float, ...]:
    """Compute the weights of earlier values in a forecast.

    Args:
        times: Timesteps of the values, newest first; of one value or two, the forecast is the runtime's.
        time: Timestep of the forecast.
        damping: Share of the curvature.

    Returns:
        One weight per value; they sum to one.
    """
    if len(times) < 2:
        return (1.0,)
    last, before = times[0], times[1]
    reach = (time - last) / (last - before)
    if len(times) < 3:
        return 1 + reach, -reach
    factor = (time - last) * ((time - last) if isinstance(damping, str) else damping * (time - before))
    of_last = factor / (last - before) / (last - times[2])
    of_oldest = factor / (before - times[2]) / (last - times[2])
    return 1 + reach + of_last, -reach - of_last - of_oldest, of_oldest


class SecondOrderCache(BranchCache):
    """A branch cache that keeps three values, and hands a second-order forecast to every engine that forecasts.

    An engine computes held + factor · (held - earlier). It gets the forecast as both, so it computes just that.
    """

    def __init__(self, plan: Plan | None, device: Device, *, step: int, indices: Mapping[str, int], damping: Damping):
        """Start with no branch.

        Args:
            plan: Which engine runs when.
            device: Where the tensors are.
            step: Index of the component `step`.
            indices: Index of every component by its name.
            damping: Share of the curvature.
        """
        super().__init__(plan, device)
        self._damping, self._step = damping, str(step)
        self._treated: tuple[dict[str, Treatment], ...] = ()
        if plan is not None:
            self._treated = tuple(
                {str(indices[name]): own for name, own in engine.in_graph.items()} for engine in plan.engines
            )
        self._now: dict[str, Treatment] = {}
        self._values: dict[str, list[tuple[float, Array]]] = {}
        self._samples: list[tuple[float, Array]] = []
        self._timestep = 0.0

    def next_engine(self, log_snr: float) -> int:
        """Choose the engine of the next step, and remember its treatments."""
        engine = super().next_engine(log_snr)
        self._now = self._treated[engine] if self._treated else {}
        return engine

    def store(self, emitted: Mapping[str, Tensor], timestep: float) -> None:
        """Store the branches of a step."""
        super().store(emitted, timestep)
        for name, value in emitted.items():
            history = self._values.setdefault(name.removeprefix(COMPUTED), [])
            _add(history, timestep, self._device.to_array(value))

    def store_denoised(
        self, kind: PredictionType, sample: Tensor, prediction: Tensor, timestep: float, log_snr: float
    ) -> None:
        """Store the denoised sample of a step."""
        super().store_denoised(kind, sample, prediction, timestep, log_snr)
        _add(self._samples, timestep, self._state.denoised[0][1])

    def inputs(self, timestep: float, rows: int) -> dict[str, Tensor]:
        """Make the inputs of engines that reuse branches at a step."""
        self._timestep = timestep
        inputs = super().inputs(timestep, rows)
        for index, treatment in self._now.items():
            if treatment is Treatment.FORECAST:
                inputs[HELD + index] = inputs[EARLIER + index] = self._forecast(self._values[index])
        return inputs

    def denoised_inputs(self, kind: PredictionType, sample: Tensor, log_snr: float) -> dict[str, Tensor]:
        """Make the predictions that imply the earlier denoised samples at the current sample."""
        implied = super().denoised_inputs(kind, sample, log_snr)
        if not implied or self._now.get(self._step) is not Treatment.FORECAST_X0:
            return implied
        _, of_prediction = kind.denoised_weights(log_snr)
        change = self._forecast(self._samples) - self._samples[0][1]
        forecast = implied[HELD] + change * np.float32(1 / of_prediction)
        return {HELD: forecast, EARLIER: forecast}

    def _forecast(self, history: Sequence[tuple[float, Array]]) -> Array:
        times, values = zip(*history, strict=True)
        weights = np.array(forecast_weights(times, self._timestep, self._damping), dtype=np.float32)
        forecast: Array = np.tensordot(weights, np.stack(values), axes=1)
        return forecast


def _add(history: list[tuple[float, Array]], timestep: float, value: Array) -> None:
    """Put a value in front; one of the same timestep is replaced."""
    history[:] = [(timestep, value), *[one for one in history if one[0] != timestep][:2]]


@contextmanager
def second_order(components: Sequence[Component], damping: Damping) -> Iterator[None]:
    """Let rollouts that begin meanwhile forecast with three values.

    Args:
        components: The model's components.
        damping: Share of the curvature.
    """
    indices = {component.name: component.index for component in components}

    def cache(plan: Plan | None = None, device: Device = HOST) -> BranchCache:
        return SecondOrderCache(plan, device, step=indices[STEP], indices=indices, damping=damping)

    with patch.object(rollout, "BranchCache", cache):
        yield

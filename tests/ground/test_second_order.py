"""The second-order forecast of benchmarks is the polynomial that it says, and without curvature the runtime's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from second_order import TAYLOR, Damping, SecondOrderCache, forecast_weights

from tests.plans import plan_of
from unetc.artifacts import Assignment, Phase
from unetc.backend import Array
from unetc.device import HOST
from unetc.runtime.branch_cache import BranchCache
from unetc.sampler.prediction_type import PredictionType
from unetc.treatments import COMPUTED, HELD, Treatment

TIMES = st.lists(st.integers(0, 60), min_size=4, max_size=4, unique=True).map(lambda times: sorted(times))
"""Timesteps of a forecast and of the values before it: sampling goes down."""
PLAN = plan_of(
    [
        Assignment(treatments={}, emits=("branch", "step")),
        Assignment(treatments={"branch": Treatment.FORECAST}, emits=()),
        Assignment(treatments={"step": Treatment.FORECAST_X0}, emits=()),
    ],
    [Phase(low=-5.0, high=5.0, cycle=(0, 0, 0, 1, 2))],
)
INDICES = {"branch": 0, "step": 1}
LEVELS = (-3.0, -2.2, -1.5, -0.7, 0.4)
TIMESTEPS = (900.0, 800.0, 650.0, 600.0, 480.0)


def value_of(times: Sequence[float], time: float, damping: Damping, coefficients: Sequence[float]) -> float:
    """Forecast a polynomial of the timestep."""
    values = [float(np.polyval(coefficients, one)) for one in times]
    return float(np.dot(forecast_weights(times, time, damping), values))


@given(TIMES, st.floats(-1, 2), st.tuples(*[st.floats(-1, 1)] * 3))
def test_the_curvature_that_is_missing_is_the_share_left_out(
    times: list[int], damping: float, coefficients: tuple[float, float, float]
) -> None:
    time, *earlier = times
    exact = float(np.polyval(coefficients, time))
    missing = (1 - damping) * coefficients[0] * (time - earlier[0]) * (time - earlier[1])
    assert value_of(earlier, time, damping, coefficients) == pytest.approx(exact - missing, rel=1e-6, abs=1e-5)


def test_the_form_of_taylorseer() -> None:
    # spacing 4, three steps ahead: F + k/N (Fa - Fb) + (k/N)^2 / 2 (Fa - 2 Fb + Fc)
    reach = 3 / 4
    expected = 1 + reach + reach**2 / 2, -reach - reach**2, reach**2 / 2
    assert forecast_weights((500, 504, 508), 497, TAYLOR) == pytest.approx(expected)


def computed(cache: BranchCache, steps: int) -> BranchCache:
    """Compute the first steps, each with another branch and prediction."""
    generator = np.random.default_rng(0)
    for step in range(steps):
        cache.next_engine(LEVELS[step])
        branch, sample, prediction = generator.standard_normal((3, 2, 1, 4, 4), dtype=np.float32)
        cache.store({f"{COMPUTED}0": branch}, TIMESTEPS[step])
        cache.store_denoised(PredictionType.EPSILON, sample, prediction, TIMESTEPS[step], LEVELS[step])
    return cache


def forecasts(cache: BranchCache) -> tuple[Array, Array]:
    """Let the engines of steps 3 and 4 forecast the branch and the prediction."""
    recall = Treatment.FORECAST.row.recall
    assert recall is not None
    cache.next_engine(LEVELS[3])
    inputs = cache.inputs(TIMESTEPS[3], rows=1)
    branch = recall(lambda prefix: inputs[f"{prefix}0"])
    cache.next_engine(LEVELS[4])
    sample = np.full((2, 1, 4, 4), 0.5, dtype=np.float32)
    inputs = cache.inputs(TIMESTEPS[4], rows=1)
    implied = cache.denoised_inputs(PredictionType.EPSILON, sample, LEVELS[4])
    return branch, recall(lambda prefix: implied.get(prefix, inputs[f"{prefix}0"]))


def second_order_cache(damping: Damping) -> BranchCache:
    return SecondOrderCache(PLAN, HOST, step=1, indices=INDICES, damping=damping)


def test_without_curvature_it_is_the_runtimes_forecast() -> None:
    expected = forecasts(computed(BranchCache(PLAN), 3))
    for own, runtimes in zip(forecasts(computed(second_order_cache(0.0), 3)), expected, strict=True):
        np.testing.assert_allclose(own, runtimes, rtol=1e-5, atol=1e-5)
    for own, runtimes in zip(forecasts(computed(second_order_cache(1.0), 3)), expected, strict=True):
        assert float(np.abs(own - runtimes).max()) > 1e-2


def test_engines_that_do_not_forecast_get_what_the_runtime_gives() -> None:
    cache = computed(second_order_cache(1.0), 2)
    cache.next_engine(LEVELS[2])
    held = cache.inputs(TIMESTEPS[3], rows=1)[f"{HELD}0"]
    runtimes = computed(BranchCache(PLAN), 2).inputs(TIMESTEPS[3], rows=1)[f"{HELD}0"]
    np.testing.assert_array_equal(held, runtimes)

"""A branch cache knows which engine may run from the branches that it holds, and goes back with both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.plans import plan_of
from unetc.artifacts import Assignment, Phase
from unetc.backend import Array
from unetc.runtime.branch_cache import BranchCache
from unetc.sampler.prediction_type import PredictionType
from unetc.treatments import COMPUTED, EARLIER, EXTRAPOLATION, HELD, Treatment

LEVELS = [-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
PLAN = plan_of(
    [
        Assignment(treatments={}, emits=("a", "b")),
        Assignment(treatments={"a": Treatment.HOLD}, emits=("b",)),
        Assignment(treatments={"b": Treatment.FORECAST}),
    ],
    [Phase(low=-5.0, high=-1.5, cycle=(1, 0)), Phase(low=-1.5, high=5.0, cycle=(0, 1, 2))],
)
"""Its first phase begins with an engine that reuses, before anything was computed."""


def step(cache: BranchCache, index: int) -> tuple[int, dict[str, object]]:
    """Make one step; each engine emits the plan's components, and a branch is the number of its step."""
    engine = cache.next_engine(LEVELS[index])
    inputs = {
        name: value.item() if isinstance(value, np.ndarray) else value
        for name, value in cache.inputs(-index, rows=1).items()
    }
    names = PLAN.engines[engine].emits
    cache.store({COMPUTED + str("ab".index(name)): index for name in names}, -index)
    return engine, inputs


def run(cache: BranchCache, steps: Sequence[int]) -> list[tuple[int, dict[str, object]]]:
    return [step(cache, index) for index in steps]


def test_the_engines_are_those_of_the_schedule() -> None:
    engines = [engine for engine, _ in run(BranchCache(PLAN), range(len(LEVELS)))]
    assert tuple(engines) == PLAN.schedule(LEVELS)


def test_no_engine_runs_before_the_branches_that_it_reuses() -> None:
    for engine, inputs in run(BranchCache(PLAN), range(len(LEVELS))):
        needed = {"a": HELD + "0", "b": HELD + "1"}
        assert {needed[name] for name in PLAN.engines[engine].reused} <= inputs.keys()


def test_a_branch_that_was_computed_once_is_held() -> None:
    cache = BranchCache()
    cache.store({COMPUTED + "0": "branch"}, 900.0)
    assert cache.inputs(700.0, rows=1) == {
        HELD + "0": "branch",
        EARLIER + "0": "branch",
        EXTRAPOLATION + "0": np.zeros(1),
    }


@pytest.mark.parametrize("kind", PredictionType)
@pytest.mark.parametrize("learned", [False, True])
def test_an_implied_prediction_gives_the_earlier_denoised_sample(kind: PredictionType, learned: bool) -> None:
    rng, cache = np.random.default_rng(0), BranchCache()
    samples = rng.standard_normal((3, 2, 3, 4, 4), dtype=np.float32)
    predictions = rng.standard_normal((3, 2, 6 if learned else 3, 4, 4), dtype=np.float32)
    levels = (-2.0, -1.0, 1.5)
    for step, level in enumerate(levels[:2]):
        cache.store_denoised(kind, samples[step], predictions[step], 900.0 - 100 * step, level)
    inputs = cache.denoised_inputs(kind, samples[2], levels[2])

    def denoised(step: int, prediction: Array) -> Array:
        p, q = kind.denoised_weights(levels[step])
        return p * samples[step] + q * prediction[:, :3]

    for prefix, step in ((HELD, 1), (EARLIER, 0)):
        np.testing.assert_allclose(denoised(2, inputs[prefix]), denoised(step, predictions[step]), atol=1e-5)
        np.testing.assert_array_equal(inputs[prefix][:, 3:], predictions[1][:, 3:])  # the variance is held
        assert inputs[prefix].dtype == np.float32


def test_a_second_call_at_a_timestep_replaces_the_denoised_sample() -> None:
    cache, sample = BranchCache(), np.ones((1, 1, 1, 1), np.float32)
    for timestep, value in ((900.0, 1.0), (800.0, 2.0), (800.0, 3.0)):
        cache.store_denoised(PredictionType.FLOW, sample, value * sample, timestep, 0.0)
    inputs = cache.denoised_inputs(PredictionType.FLOW, sample, 0.0)
    assert inputs[HELD].item() == pytest.approx(3.0)
    assert inputs[EARLIER].item() == pytest.approx(1.0)


@given(made=st.integers(0, 5), undone=st.integers(1, 3))
def test_what_happens_after_a_restore_is_what_would_have_happened(made: int, undone: int) -> None:
    cache, straight = BranchCache(PLAN), BranchCache(PLAN)
    run(cache, range(made))
    before = cache.snapshot()
    run(cache, range(made, made + undone))
    cache.restore(before)
    run(straight, range(made))
    assert cache.phase == straight.phase
    assert run(cache, range(made, len(LEVELS))) == run(straight, range(made, len(LEVELS)))


@given(made=st.integers(1, 6))
def test_an_emptied_snapshot_lets_no_engine_reuse(made: int) -> None:
    cache = BranchCache(PLAN)
    run(cache, range(made))
    phase = cache.phase
    cache.restore(cache.snapshot().emptied())
    assert cache.phase == phase
    assert cache.inputs(-made, rows=1) == {}
    assert cache.denoised_inputs(PredictionType.V, np.zeros((1, 1, 1, 1), np.float32), 0.0) == {}
    engine, _ = step(cache, made)
    assert not PLAN.engines[engine].reused

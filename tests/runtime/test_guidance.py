"""A session that treats guidance computes half of the rows, and falls back to all of them where it must."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.models import relative_error
from tests.plans import plan_of
from unetc.artifacts import Phase
from unetc.artifacts.plan import Assignment
from unetc.artifacts.profile import GUIDANCE, STEP
from unetc.backend import Array
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.conditions import Conditions
from unetc.runtime.session import Session
from unetc.sampler.table import SchedulerTables, update
from unetc.treatments import Treatment

SHAPE, STEPS, SCALE, BATCH = (1, 4, 4), 8, 6.0, 3
DROP, HOLD, FORECAST = Treatment.DROP, Treatment.HOLD, Treatment.FORECAST


@functools.cache
def scheduler() -> SchedulerTables:
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    return extract_all(make_scheduler("dpmsolver++", config), "dpmsolver++", [STEPS])


def predict(sample: np.ndarray, timestep: float, text: np.ndarray) -> np.ndarray:
    """A denoiser of numpy, in the precision of its inputs."""
    return 0.7 * sample + np.sin(sample * text + timestep / 300) * text


class Engine:
    """The denoiser as a program; it emits the step, and may fail at some of its calls."""

    def __init__(self, *, emits: bool = True, fails: Sequence[int] = ()) -> None:
        self.rows: list[int] = []
        self.emits = emits
        self.fails = fails

    def __call__(self, inputs: Mapping[str, Any], output: Array) -> Mapping[str, object]:
        self.rows.append(len(output))
        text = inputs["text"].reshape(-1, 1, 1, 1)
        output[:] = predict(inputs["sample"], float(inputs["timestep"][0]), text)
        if len(self.rows) - 1 in self.fails:
            output[-1] = np.nan
        return {"computed.7": output.copy()} if self.emits else {}

    __hash__ = object.__hash__


def hold_step(inputs: Mapping[str, Any], output: Array) -> Mapping[str, object]:
    output[:] = inputs["held.7"]
    return {}


ENGINES = (
    Assignment(treatments={}, emits=(GUIDANCE, STEP)),
    Assignment(treatments={GUIDANCE: DROP}, emits=(STEP,)),
    Assignment(treatments={GUIDANCE: HOLD}, emits=(STEP,)),
    Assignment(treatments={GUIDANCE: FORECAST}, emits=(STEP,)),
    Assignment(treatments={STEP: HOLD}),
)


def session_of(cycle: tuple[int, ...], engine: Engine, full: Engine | None = None) -> Session:
    return Session(
        plan=plan_of(ENGINES, [Phase(low=-20.0, high=20.0, cycle=cycle)]),
        full=full or Engine(emits=False),
        programs=[engine, engine, engine, engine, hold_step],
        scheduler=scheduler(),
        sample_shape=SHAPE,
        steps=STEPS,
    )


def conditions(*, guided: bool = True, middle: bool = False) -> Conditions:
    rng = np.random.default_rng(5)
    own, negative, between = ({"text": rng.standard_normal((BATCH, 1)).astype(np.float32)} for _ in range(3))
    return Conditions(
        own=own, negative=negative if guided else {}, middle=between if middle else {}, scale=SCALE if guided else 1.0
    )


def reference(schedule: Sequence[int], noise: Array, given: Conditions) -> np.ndarray:
    """Sample in float64: both halves are computed, and the difference between them is replaced."""
    table = scheduler().table(STEPS)
    own, negative = (side["text"].astype(float).reshape(-1, 1, 1, 1) for side in (given.own, given.negative))
    samples, predictions = [noise.astype(float) * table.initial_scale], []
    history: list[tuple[float, np.ndarray]] = []
    last = np.zeros_like(noise, dtype=float), np.zeros_like(noise, dtype=float)
    for step, engine in enumerate(schedule):
        timestep = table.timesteps.item(step)
        seen = samples[0] * table.input_scale.item(step)
        halves = predict(seen, timestep, negative), predict(seen, timestep, own)
        treatment = ENGINES[engine].treatments.get(GUIDANCE)
        if engine == 4:
            halves = last
        elif treatment is None:
            history = [(timestep, halves[1] - halves[0]), *history[:1]]
        elif treatment is DROP:
            halves = halves[1], halves[1]
        else:
            (t1, latest), (t0, earlier) = history[0], history[-1]
            factor = (timestep - t1) / (t1 - t0) if treatment is FORECAST and t1 != t0 else 0.0
            halves = halves[1] - latest - factor * (latest - earlier), halves[1]
        last = halves
        predictions = [halves[0] + SCALE * (halves[1] - halves[0]), *predictions][: table.window]
        following = update(table, step, tuple(samples), tuple(predictions), None)
        samples = [following, *samples][: table.window]
    return samples[0]


@pytest.mark.parametrize("cycle", [(0, 1), (0, 2, 2), (0, 0, 3, 3), (0, 3, 4, 2, 4, 1)])
def test_samples_equal_those_of_a_loop_in_float64(cycle: tuple[int, ...]) -> None:
    engine = Engine()
    session, given = session_of(cycle, engine), conditions()
    noise = np.random.default_rng(1).standard_normal((BATCH, *SHAPE)).astype(np.float32)
    sampled = session.sample(noise=noise, conditions=given, latents=True)
    schedule = [cycle[step % len(cycle)] for step in range(STEPS)]
    assert session.schedule(STEPS) == tuple(schedule)
    assert relative_error(sampled, reference(schedule, noise, given)) < 1e-5
    assert engine.rows == [BATCH if ENGINES[one].halves else 2 * BATCH for one in schedule if one != 4]


def test_samples_without_guidance_have_one_row_each_at_every_step() -> None:
    engine = Engine()
    session = session_of((0, 3, 1), engine)
    given = conditions(guided=False)
    sampled = session.sample(BATCH, seed=2, conditions=given, latents=True)
    np.testing.assert_allclose(sampled, session.sample(BATCH, seed=2, conditions=given, full_model=True), atol=1e-6)
    assert {*engine.rows} == {BATCH}


def test_guidance_of_three_parts_computes_all_rows() -> None:
    engine = Engine()
    session = session_of((0, 3, 1), engine)
    given = conditions(middle=True)
    sampled = session.sample(BATCH, seed=2, conditions=given, latents=True)
    np.testing.assert_allclose(sampled, session.sample(BATCH, seed=2, conditions=given, full_model=True), atol=1e-5)
    assert {*engine.rows} == {3 * BATCH}


def test_a_half_call_that_is_not_finite_is_made_again_with_all_rows() -> None:
    engine, full = Engine(fails=[2]), Engine(emits=False)
    session = session_of((0, 3, 2), engine, full)
    sampled = session.sample(BATCH, seed=2, conditions=conditions(), latents=True)
    assert np.isfinite(sampled).all()
    assert session.non_finite_steps == 1
    assert full.rows == [2 * BATCH]
    # the difference may have been non-finite too, so the next step that would recall one computes both halves
    assert engine.rows == [2 * BATCH, BATCH, BATCH, 2 * BATCH, BATCH, BATCH, 2 * BATCH, BATCH]


def test_after_a_start_in_the_middle_both_halves_are_computed_first() -> None:
    engine = Engine()
    session = session_of((3,), engine)
    session.sample(BATCH, seed=2, conditions=conditions(), latents=True)
    assert engine.rows == [2 * BATCH, *[BATCH] * (STEPS - 1)]

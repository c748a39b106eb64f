"""Schedules that start at the noise level of another one: they are diffusers' own update along chosen timesteps."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from tests.every_day import every_nth
from unetc.compiler.schedulers.along import begin_along, spaces_levels, walks_along
from unetc.compiler.schedulers.extract import extract, extract_along
from unetc.compiler.schedulers.make import make_scheduler, scheduler_for
from unetc.compiler.schedulers.same_start import CONVERGED_STEPS, converged, from_same_start
from unetc.errors import ModelError
from unetc.models.find import find_model
from unetc.models.model import Model
from unetc.sampler.table import SchedulerTable

CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}
WALKING = ("ddim", "ddpm", "dpmsolver++", "sde-dpmsolver++", "unipc", "deis", "euler", "euler-ancestral", "lms")


@pytest.fixture(scope="module")
def model() -> Model:
    return find_model("digits")


@pytest.mark.parametrize("name", WALKING)
def test_along_its_own_timesteps_a_scheduler_is_itself(name: str) -> None:
    """Except that sampling cannot start from an image along chosen timesteps."""
    scheduler = make_scheduler(name, CONFIG)
    assert walks_along(scheduler)
    own = extract(scheduler, 12)
    along = extract_along(scheduler, [int(timestep) for timestep in own.timesteps])
    for field in dataclasses.fields(SchedulerTable):
        if not field.name.startswith("start_") and field.name not in ("asked", "prediction_type"):
            np.testing.assert_allclose(getattr(along, field.name), getattr(own, field.name), rtol=1e-4, atol=1e-5)
    assert along.prediction_type == own.prediction_type


def test_ddim_steps_to_the_next_chosen_timestep() -> None:
    scheduler = make_scheduler("ddim", CONFIG | {"clip_sample": False})
    timesteps = (980, 700, 650, 20)
    table = extract_along(scheduler, timesteps)
    alphas: Any = scheduler.alphas_cumprod.double().numpy()  # type: ignore[attr-defined]
    after = np.append(alphas[list(timesteps[1:])], 1.0)
    now = alphas[list(timesteps)]
    np.testing.assert_allclose(table.sample_coefficients[:, 0], np.sqrt(after / now), rtol=1e-6)
    expected = np.sqrt(1 - after) - np.sqrt(after * (1 - now) / now)
    np.testing.assert_allclose(table.prediction_coefficients[:, 0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("timesteps", [(), (5, 5), (5, 6), (1000, 3), (3, -1)])
def test_timesteps_that_do_not_fall_are_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ModelError, match="do not fall from 999 or less to 0 or more"):
        begin_along(make_scheduler("ddim", CONFIG), timesteps)


@pytest.mark.parametrize("name", ["heun", "pndm", "lcm"])
def test_schedulers_of_several_calls_or_of_consistency_walk_alone(name: str) -> None:
    assert not walks_along(make_scheduler(name, CONFIG | {"clip_sample": False}))


@pytest.mark.parametrize(
    ("name", "steps", "fewer"),
    every_nth(5, ["ddim", "dpmsolver++", "ddpm"], [(50, 37), (50, 25), (20, 14), (8, 6), (4, 3), (2, 1)]),
)
def test_fewer_steps_start_where_the_full_schedule_does(model: Model, name: str, steps: int, fewer: int) -> None:
    full = extract(scheduler_for(name, model), steps)
    found = from_same_start(model, name, full, fewer)
    assert found
    for table in found.values():
        assert table.count == fewer
        assert table.timesteps[0] == full.timesteps[0]
        assert table.starts_like(full)
        assert table.initial_scale * table.input_scale[0] == pytest.approx(full.initial_scale * full.input_scale[0])
    different = {tuple(table.timesteps.tolist()) for table in found.values()}
    assert len(different) == len(found), "no schedule is listed twice"


@pytest.mark.parametrize("name", ["euler-karras", "euler-exponential", "euler-beta"])
def test_a_spacing_of_noise_levels_keeps_its_start(model: Model, name: str) -> None:
    scheduler = scheduler_for(name, model)
    assert spaces_levels(scheduler)
    full = extract(scheduler, 20)
    found = from_same_start(model, name, full, 14)
    assert found
    assert all(table.starts_like(full) for table in found.values())


@pytest.mark.parametrize("other", ["dpmsolver++", "unipc"])
def test_another_scheduler_takes_the_same_noise(model: Model, other: str) -> None:
    full = extract(scheduler_for("euler", model), 20)
    assert full.initial_scale > 2
    found = from_same_start(model, other, full, 14)
    assert len(found) >= 3
    for table in found.values():  # euler scales the samples by itself; what the model gets first is the same
        assert table.initial_scale * table.input_scale[0] == pytest.approx(full.initial_scale * full.input_scale[0])


@pytest.mark.parametrize(
    ("name", "own"), [("ddim", "ddim"), ("dpmsolver++", "dpmsolver++"), ("euler-karras", "dpmsolver++")]
)
def test_the_converged_trajectory_has_many_steps_and_no_noise(model: Model, name: str, own: str) -> None:
    full = extract(scheduler_for(name, model), 10)
    found = converged(model, name, full)
    (table,) = found.tables
    assert found.name == own
    assert table.steps >= CONVERGED_STEPS
    assert table.starts_like(full)
    assert not table.adds_noise


@pytest.mark.parametrize("name", ["ddpm", "euler-ancestral", "sde-dpmsolver++"])
def test_a_scheduler_that_adds_noise_converges_to_nothing(model: Model, name: str) -> None:
    full = extract(scheduler_for(name, model), 10)
    with pytest.raises(ModelError, match=f"{name.replace('+', '.')} adds noise in every step"):
        converged(model, name, full)


def test_a_model_of_few_timesteps_converges_over_all_of_them(model: Model) -> None:
    few = dataclasses.replace(model, scheduler_config={**model.scheduler_config, "num_train_timesteps": 100})
    full = extract(scheduler_for("ddim", few), 10)
    (table,) = converged(few, "ddim", full).tables
    assert table.timesteps.tolist() == list(range(int(full.timesteps[0]), -1, -1))

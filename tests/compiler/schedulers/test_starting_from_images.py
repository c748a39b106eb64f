"""A table knows the noisy image that enters each step, and where to start from one, as in diffusers."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.every_day import every_nth
from unetc.compiler.schedulers.classes import CLASSES
from unetc.compiler.schedulers.extract import extract, supports
from unetc.compiler.schedulers.make import make_scheduler
from unetc.compiler.schedulers.names import SCHEDULERS
from unetc.compiler.schedulers.walk import begin, noisy_image
from unetc.errors import SessionError
from unetc.sampler.table import SchedulerTable, update

from .test_every_class import OWN
from .trajectories import SHAPE, TOLERANCE, diffusers, model, noise_of, noise_type

STEPS = 10
STRENGTHS = (0.1, 0.55, 0.95, 1.0)
WITHOUT_HISTORY = {"ddim", "ddpm", "euler", "euler-karras", "euler-ancestral", "heun", "dpm2", "lcm", "flow-euler"} | {
    *("dpmsolver++", "dpmsolver++-karras", "dpmsolver++-singlestep", "sde-dpmsolver++", "deis", "edm-dpmsolver++"),
}
"""Some of the schedulers that can start at every strength."""


def made(name: str) -> Any:
    class_name, _ = SCHEDULERS[name]
    return make_scheduler(name, OWN[CLASSES[class_name].family])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_signal_and_noise_are_those_of_diffusers(name: str) -> None:
    scheduler = made(name)
    for steps in (2, 5, 20):
        if not supports(scheduler, steps):
            continue
        table, begun = extract(scheduler, steps), begin(scheduler, steps)
        calls = range(0, table.steps, begun.order)  # an image never starts between the calls of a step
        factors = np.array([noisy_image(begun, call) for call in calls])
        np.testing.assert_allclose([table.signal[call] for call in calls], factors[:, 0], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose([table.noise_of(call) for call in calls], factors[:, 1], rtol=2e-5)


def by_diffusers(name: str, strength: float, image: torch.Tensor) -> list[NDArray[Any]]:
    """Sample as the pipelines for image to image do."""
    class_name, overrides = SCHEDULERS[name]
    scheduler = getattr(diffusers, class_name).from_config(OWN[CLASSES[class_name].family], **overrides)
    scheduler.set_timesteps(STEPS)
    first = max(STEPS - min(int(STEPS * strength), STEPS), 0) * scheduler.order
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    times = timesteps[:1].repeat(len(image))
    if hasattr(scheduler, "scale_noise"):
        sample = scheduler.scale_noise(image, times, noise_of(-1))
    else:
        sample = scheduler.add_noise(image, noise_of(-1), times)
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    samples = []
    for call, timestep in enumerate(timesteps, start=first):
        prediction = torch.from_numpy(model(scale(sample, timestep).numpy(), float(timestep)))
        options: dict[str, Any] = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = torch.Generator().manual_seed(call + 10)
        if "eta" in inspect.signature(scheduler.step).parameters:
            options["eta"] = 0.0
        sample = scheduler.step(prediction, timestep, sample, **options).prev_sample
        samples.append(sample.numpy())
    return samples


def by_table(table: SchedulerTable, strength: float, image: torch.Tensor, kind: torch.dtype) -> list[NDArray[Any]]:
    first = table.first_step(strength)
    table = table.starting_at(first)
    samples = [(table.signal.item(first) * image + table.noise_of(first) * noise_of(-1)).numpy()]
    predictions: list[NDArray[Any]] = []
    for call in range(first, table.steps):
        predictions.insert(0, model(float(table.input_scale[call]) * samples[0], float(table.timesteps[call])))
        noise = noise_of(call, kind=kind).numpy() if table.noise_coefficient[call] else None
        samples.insert(0, update(table, call, samples[: table.window], predictions[: table.window], noise))
    return samples[-2::-1]


def starts(table: SchedulerTable, strength: float) -> bool:
    try:
        table.first_step(strength)
    except SessionError:
        return False
    return True


@pytest.mark.parametrize(("name", "strength"), every_nth(5, SCHEDULERS, STRENGTHS))
def test_sampling_from_an_image_equals_diffusers_or_is_refused(name: str, strength: float) -> None:
    table = extract(made(name), STEPS)
    image = torch.randn(SHAPE, generator=torch.Generator().manual_seed(99), dtype=torch.float64).clip(-1, 1)
    kind = noise_type(getattr(diffusers, SCHEDULERS[name][0])())
    if not starts(table, strength):
        assert name not in WITHOUT_HISTORY
        assert strength < 1
        with pytest.raises(SessionError, match="needs the results of earlier steps"):
            table.first_step(strength)
        return
    actual = by_table(table, strength, image, kind)
    expected = by_diffusers(name, strength, image)
    assert len(actual) == len(expected)
    for own, theirs in zip(actual, expected, strict=True):
        assert np.abs(own - theirs).max() < TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (0.0, r"strength is 0\. Expected a number above 0 and up to 1"),
        (1.5, r"strength is 1\.5"),
        (float("nan"), "strength is nan"),
        (0.05, r"strength 0\.05 makes none of 10 steps\. Expected at least 0\.1"),
    ],
)
def test_a_strength_without_a_step_is_refused(strength: float, message: str) -> None:
    with pytest.raises(SessionError, match=message):
        extract(made("ddim"), STEPS).first_step(strength)


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 49, 300, 1000])
def test_the_refusal_names_a_strength_that_makes_one_step(steps: int) -> None:
    table = extract(made("ddim"), steps)
    with pytest.raises(SessionError, match="makes none") as refusal:
        table.first_step(0.5 / steps)
    named = float(str(refusal.value).rpartition("at least ")[2].rstrip("."))
    assert table.first_step(named) == steps - 1

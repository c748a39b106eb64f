"""Scheduler tables know how the denoised sample follows from a prediction: as diffusers computes it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from unetc.compiler.schedulers.extract import extract, extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.compiler.schedulers.names import SCHEDULERS
from unetc.compiler.schedulers.walk import NUDGE, begin, log_snr, make_step, model_input
from unetc.errors import SessionError
from unetc.sampler.prediction_type import PredictionType
from unetc.sampler.table import SchedulerHeader, SchedulerTables

STEPS = 12
CONFIG: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
WITHOUT = {"edm-euler", "edm-dpmsolver++", "dpm2-ancestral", "pndm"}
"""Schedulers of other weights, and those whose calls go back to more noise."""
NAMES = [name for name in SCHEDULERS if name not in WITHOUT]


def config_of(name: str, kind: str) -> dict[str, Any]:
    """Make the configuration of a pipeline whose model has a type of prediction."""
    if name.startswith("flow"):
        return {"_class_name": SCHEDULERS[name][0]}
    config = {**CONFIG, "prediction_type": kind}
    return config | ({"clip_sample": False} if name in ("ddim", "ddpm", "lcm", "tcd", "heun") else {})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_denoised_sample_is_the_one_of_diffusers(name: str, kind: str) -> None:
    scheduler = make_scheduler(name, config_of(name, kind))
    begun = begin(scheduler, STEPS)
    table = extract(scheduler, STEPS)
    own = table.prediction_type
    assert own is not None
    assert own == ("flow" if name.startswith("flow") else kind)
    rng, compared = np.random.default_rng(0), 0
    for step, timestep in enumerate(begun.timesteps):
        image, noise = rng.standard_normal((2, 1, 1, 4, 4))
        sample = table.signal[step] * image + table.noise_of(step) * noise
        given = model_input(begun, torch.from_numpy(sample), timestep).numpy()
        p, q = own.denoised_weights(table.log_snr.item(step))
        # the prediction of a perfect model: x0 is the image
        alpha = table.signal[step] * table.input_scale[step]
        sigma = table.noise_of(step) * table.input_scale[step]
        np.testing.assert_allclose(given, alpha * image + sigma * noise, atol=1e-4)
        perfect = {"epsilon": noise, "v_prediction": alpha * noise - sigma * image, "flow": noise - image}[own]
        np.testing.assert_allclose(p * given + q * perfect, image, atol=2e-3)
        prediction = rng.standard_normal(sample.shape)
        answer = make_step(
            begun, torch.from_numpy(prediction), timestep, torch.from_numpy(sample), torch.zeros(sample.shape), seed=0
        )
        if getattr(answer, "pred_original_sample", None) is not None:
            expected = answer.pred_original_sample.numpy()
            np.testing.assert_allclose(
                p * given + q * prediction, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max())
            )
            compared += 1
    assert compared == (STEPS if name in ("ddim", "ddpm", "euler", "euler-ancestral") else compared)


@pytest.mark.parametrize("name", NAMES)
def test_no_call_goes_back_to_more_noise(name: str) -> None:
    levels = log_snr(begin(make_scheduler(name, config_of(name, "epsilon")), STEPS))
    assert (np.diff(levels) > -NUDGE).all()


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_other_schedulers_have_no_type(name: str) -> None:
    config: dict[str, Any] = {"_class_name": SCHEDULERS[name][0]} if name.startswith("edm") else CONFIG
    assert extract(make_scheduler(name, config), 5).prediction_type is None


def test_pndm_without_runge_kutta_has_a_type() -> None:
    scheduler = make_scheduler("pndm", {**CONFIG, "skip_prk_steps": True})
    assert extract(scheduler, 5).prediction_type is PredictionType.EPSILON
    assert (np.diff(log_snr(begin(scheduler, STEPS))) > -NUDGE).all()


def test_a_model_of_the_sample_itself_has_no_type() -> None:
    assert extract(make_scheduler("ddim", {**CONFIG, "prediction_type": "sample"}), 5).prediction_type is None


def test_the_type_survives_packing_and_is_optional() -> None:
    tables = extract_all(make_scheduler("ddim", CONFIG), "ddim", (3, 5))
    header, rows = tables.to_array()
    written = msgspec.json.encode(header)
    read = SchedulerTables.from_array(msgspec.json.decode(written, type=SchedulerHeader), rows)
    assert read.prediction_type is PredictionType.EPSILON
    assert all(table.prediction_type is PredictionType.EPSILON for table in read.tables)
    old = json.loads(written)
    del old["prediction_type"]
    older = SchedulerTables.from_array(msgspec.convert(old, SchedulerHeader), rows)
    assert older.prediction_type is None
    assert "prediction_type" not in json.loads(msgspec.json.encode(older.to_array()[0]))


def test_all_step_counts_have_one_type() -> None:
    one, other = (
        extract_all(make_scheduler("ddim", {**CONFIG, "prediction_type": kind}), "ddim", [count]).tables[0]
        for kind, count in (("epsilon", 3), ("v_prediction", 5))
    )
    with pytest.raises(SessionError, match="differ in prediction_type"):
        SchedulerTables(name="ddim", tables=(one, other))


@pytest.mark.parametrize("kind", PredictionType)
def test_the_weights_stay_finite_at_every_noise_level(kind: PredictionType) -> None:
    for level in np.linspace(-30, 30, 61):
        p, q = kind.denoised_weights(float(level))
        assert np.isfinite([p, q, 1 / q]).all()
        assert q < 0

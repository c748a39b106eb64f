"""Every scheduler class of diffusers is equal to diffusers over whole trajectories, or refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from tests.every_day import every_nth
from unetc.compiler.schedulers.classes import CLASSES, REFUSED, Family
from unetc.compiler.schedulers.extract import extract, supports
from unetc.compiler.schedulers.make import make_scheduler
from unetc.compiler.schedulers.names import SCHEDULERS, name_of
from unetc.errors import ModelError

from .trajectories import TOLERANCE, by_diffusers, by_table, difference, diffusers, noise_type

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EXPORTED = tuple(name for name in dir(diffusers) if name.endswith("Scheduler"))
COUNTS = (*range(1, 9), 20)
"""One to eight steps too: fewer than the bins of an analysis."""


def configuration(class_name: str) -> dict[str, Any]:
    """Read the configuration that diffusers saves for the defaults of a class."""
    config = dict(getattr(diffusers, class_name)().config)
    del config["_use_default_values"]
    return {**config, "_class_name": class_name}


def test_no_class_is_forgotten() -> None:
    assert len(EXPORTED) >= 45
    assert set(EXPORTED) <= set(CLASSES) | set(REFUSED)
    assert not set(CLASSES) & set(REFUSED)


@pytest.mark.parametrize(
    "class_name",  # KDPM2 needs long to list its timesteps; test_every_key shortens them
    [pytest.param(name, marks=[pytest.mark.nightly] * name.startswith("KDPM2")) for name in EXPORTED],
)
def test_a_class_equals_diffusers_or_is_refused_by_name(class_name: str) -> None:
    if class_name in REFUSED:
        for name in ("ddim", "edm-euler", "flow-euler"):
            with pytest.raises(ModelError) as refusal:
                make_scheduler(name, {"_class_name": class_name})
            assert class_name in str(refusal.value)
            assert REFUSED[class_name].reason in str(refusal.value)
            assert f"Nearest: {REFUSED[class_name].nearest}" in str(refusal.value)
        return
    config = configuration(class_name)
    if "clip_sample" in config and class_name.startswith(("Heun", "LCM", "TCD")):
        config["clip_sample"] = False
    name = name_of(class_name)
    assert name is not None
    scheduler = make_scheduler(name, config)
    done = 0
    for steps in COUNTS:
        own = getattr(diffusers, class_name).from_config(config)
        if not supports(scheduler, steps):
            continue
        done += 1
        table = extract(scheduler, steps)
        assert table.count == steps
        assert (np.diff(table.log_snr) > 0).all()
        assert difference(by_table(table, noise_type(own)), by_diffusers(own, steps)) < TOLERANCE
    assert done >= 5


def test_a_class_that_diffusers_may_add_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"TomorrowScheduler, which unetc does not know\. Known are DDIMScheduler"):
        make_scheduler("ddim", {"_class_name": "TomorrowScheduler"})


@pytest.mark.parametrize("class_name", CLASSES)
def test_the_allow_list_has_exactly_the_keys_of_diffusers(class_name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters.values()
    assert {one.name for one in parameters if one.kind != one.VAR_KEYWORD} - {"self"} == CLASSES[class_name].keys


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "skip_prk_steps": True}
OWN = {
    Family.BETAS: {**BETAS, "_class_name": "DDIMScheduler", "clip_sample": False},
    Family.EDM: configuration("EDMEulerScheduler"),
    Family.FLOW: {**configuration("FlowMatchEulerDiscreteScheduler"), "shift": 3.0},
}
"""Configuration of a pipeline of each family."""


@pytest.mark.parametrize(("name", "prediction_type"), every_nth(4, SCHEDULERS, ["epsilon", "v_prediction", "sample"]))
def test_a_name_equals_diffusers(name: str, prediction_type: str) -> None:
    class_name, overrides = SCHEDULERS[name]
    family = CLASSES[class_name].family
    config = OWN[family] | ({} if family == Family.FLOW else {"prediction_type": prediction_type})
    scheduler = make_scheduler(name, config)
    for steps in (1, 2, 5, 20):
        own = getattr(diffusers, class_name).from_config(config, **overrides)
        try:
            expected = by_diffusers(own, steps)
        except (NotImplementedError, ValueError) as error:  # the class does not know this kind of prediction
            with pytest.raises(ModelError, match=str(error)[:30]):
                extract(scheduler, steps)
            continue
        table = extract(scheduler, steps)
        assert difference(by_table(table, noise_type(own)), expected) < TOLERANCE
        if prediction_type == "epsilon":  # in float32, like a session
            single = by_table(table, noise_type(own), np.float32)
            assert all(sample.dtype == np.float32 for sample in single)
            assert difference(single, expected) < TOLERANCE


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_is_not_changed(name: str) -> None:
    class_name, _ = SCHEDULERS[name]
    scheduler: Any = make_scheduler(name, OWN[CLASSES[class_name].family])
    before = {key: str(value) for key, value in vars(scheduler).items()}
    extract(scheduler, 5)
    assert {key: str(value) for key, value in vars(scheduler).items()} == before


def test_names_with_a_spacing_differ_from_those_without() -> None:
    timesteps = {
        name: tuple(extract(make_scheduler(name, OWN[Family.BETAS]), 7).timesteps.tolist())
        for name in ("euler", "euler-karras", "euler-exponential", "euler-beta")
    }
    assert len(set(timesteps.values())) == 4


@pytest.mark.parametrize(
    ("name", "calls"), [("ddim", 7), ("heun", 13), ("dpm2", 13), ("dpm2-ancestral", 13), ("pndm", 8)]
)
def test_a_step_may_take_several_calls(name: str, calls: int) -> None:
    table = extract(make_scheduler(name, OWN[Family.BETAS]), 7)
    assert (table.steps, table.count) == (calls, 7)


def test_the_second_call_of_heun_is_at_the_same_noise_level() -> None:
    table = extract(make_scheduler("heun", OWN[Family.BETAS]), 7)
    assert table.timesteps[1] == table.timesteps[2]
    assert 0 < table.log_snr[2] - table.log_snr[1] < 1e-5


def test_unipc_needs_few_samples_though_its_state_depends_on_all() -> None:
    assert extract(make_scheduler("unipc", OWN[Family.BETAS]), 30).window == 3


@pytest.mark.parametrize(("name", "noisy"), [("sde-dpmsolver++", True), ("dpmsolver++", False), ("lcm", True)])
def test_stochastic_schedulers_take_the_noise_of_the_request(name: str, noisy: bool) -> None:
    table = extract(make_scheduler(name, OWN[Family.BETAS]), 8)
    assert table.noise_coefficient.any() == noisy

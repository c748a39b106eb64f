"""Every key of every supported configuration is used as diffusers uses it, or refused by name."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.every_day import every_nth
from unetc.compiler.schedulers.classes import CLASSES, Family
from unetc.compiler.schedulers.extract import extract, extract_all, supports
from unetc.compiler.schedulers.make import make_scheduler
from unetc.compiler.schedulers.names import SCHEDULERS, name_of
from unetc.errors import ModelError

from .test_every_class import configuration
from .trajectories import TOLERANCE, by_diffusers, by_table, difference, diffusers, noise_type

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

STEPS = 7

_ON = (True,)
VALUES: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (500,),
    "beta_start": (0.0005,),
    "beta_end": (0.015,),
    "beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2"),
    "trained_betas": (np.linspace(0.001, 0.01, 1000).tolist(),),
    "clip_sample": (True, False),
    "clip_sample_range": (2.0,),
    "thresholding": _ON,
    "dynamic_thresholding_ratio": (0.9,),
    "sample_max_value": (1.5,),
    "prediction_type": ("v_prediction", "sample", "flow_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "steps_offset": (1,),
    "set_alpha_to_one": (True, False),
    "rescale_betas_zero_snr": _ON,
    "variance_type": ("fixed_large", "fixed_small_log", "fixed_large_log", "learned"),
    "use_karras_sigmas": _ON,
    "use_exponential_sigmas": _ON,
    "use_beta_sigmas": _ON,
    "use_lu_lambdas": _ON,
    "use_flow_sigmas": _ON,
    "flow_shift": (3.0,),
    "use_dynamic_shifting": _ON,
    "time_shift_type": ("linear",),
    "solver_order": (1, 3),
    "algorithm_type": ("dpmsolver", "sde-dpmsolver", "sde-dpmsolver++"),
    "solver_type": ("heun", "bh1"),
    "lower_order_final": (True, False),
    "euler_at_final": _ON,
    "final_sigmas_type": ("sigma_min",),
    "lambda_min_clipped": (-3.0,),
    "interpolation_type": ("log_linear",),
    "timestep_type": ("continuous",),
    "sigma_min": (0.05,),
    "sigma_max": (9.0,),
    "sigma_data": (1.0,),
    "sigma_schedule": ("exponential",),
    "rho": (5.0,),
    "predict_x0": (False,),
    "disable_corrector": ([0, 1, 2],),
    "solver_p": ("DDIMScheduler",),
    "shift_terminal": (0.1,),
    "skip_prk_steps": (True, False),
    "original_inference_steps": (100,),
    "timestep_scaling": (0.1,),
    "shift": (2.0,),
    "base_shift": (0.3,),
    "max_shift": (2.0,),
    "base_image_seq_len": (128,),
    "max_image_seq_len": (8192,),
    "invert_sigmas": _ON,
    "stochastic_sampling": _ON,
    "scale_factors": ([1.0, 2.0],),
    "upscale_mode": ("nearest",),
}
"""Valid values of every key that differ from the default of some class."""

NEEDS: dict[str, dict[str, Any]] = {
    "clip_sample_range": {"clip_sample": True},
    "rescale_betas_zero_snr": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "timestep_type": {"prediction_type": "v_prediction"},
    "sigma_min": {"use_karras_sigmas": True},
    "sigma_max": {"use_karras_sigmas": True},
    "steps_offset": {"timestep_spacing": "leading"},
    **{key: {"final_sigmas_type": "sigma_min"} for key in ("lower_order_final", "predict_x0", "solver_type")},
    "euler_at_final": {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    "trained_betas": {"num_train_timesteps": 1000},
}
"""Settings without which a key has no effect."""

WITHOUT_EFFECT = {
    "dynamic_thresholding_ratio": "without thresholding, which is refused",
    "sample_max_value": "without thresholding, which is refused",
    "flow_shift": "without use_flow_sigmas, which is refused",
    "time_shift_type": "without use_dynamic_shifting",
    "base_shift": "without use_dynamic_shifting",
    "max_shift": "without use_dynamic_shifting",
    "base_image_seq_len": "without use_dynamic_shifting",
    "max_image_seq_len": "without use_dynamic_shifting",
    "upscale_mode": "without scale_factors, which are refused",
    "algorithm_type": "as the name decides",
    "solver_order": "as the name decides, where it changes nothing",
    "stochastic_sampling": "as the name decides",
}
"""Keys that change nothing, and why."""

WITHOUT_EFFECT_THERE = {
    ("DEISMultistepScheduler", "solver_type"): "it knows one only",
    ("DPMSolverMultistepScheduler", "variance_type"): "it drops the variance of a model with three channels",
    ("DPMSolverSinglestepScheduler", "variance_type"): "it drops the variance of a model with three channels",
    ("DPMSolverSinglestepScheduler", "lower_order_final"): "an odd number of steps switches it on",
    **dict.fromkeys(
        ((name, "num_train_timesteps") for name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")),
        "timesteps are logarithms",
    ),
    **dict.fromkeys(
        (
            (name, key)
            for name in ("LCMScheduler", "TCDScheduler")
            for key in ("set_alpha_to_one", "steps_offset", "timestep_spacing")
        ),
        "its timesteps come from the original ones",
    ),
    **dict.fromkeys(
        (("EDMDPMSolverMultistepScheduler", key) for key in ("euler_at_final", "lower_order_final")),
        "its last step, from sigma_min to sigma_min, changes nothing",
    ),
    ("TCDScheduler", "timestep_scaling"): "it has no boundary conditions",
}
"""Keys that change nothing in one class, and why."""

CASES = [(class_name, key) for class_name, row in CLASSES.items() for key in sorted(row.keys)]


def own(class_name: str, config: dict[str, Any]) -> Any:
    """Let diffusers make a scheduler with the overrides of unetc's name."""
    name = name_of(class_name)
    assert name is not None
    own_class, overrides = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(config, **(overrides if own_class == class_name else {}))


def short(class_name: str) -> dict[str, Any]:
    """Read the defaults of a class, with fewer trained timesteps where diffusers needs long to list them."""
    config = configuration(class_name)
    return {**config, "num_train_timesteps": 100} if class_name.startswith("KDPM2") else config


@cache
def default_trajectory(class_name: str, needed: tuple[tuple[str, Any], ...]) -> list[NDArray[Any]]:
    """Sample with the defaults of a class and the settings that a key needs."""
    return by_diffusers(own(class_name, short(class_name) | dict(needed)), STEPS)


@pytest.mark.parametrize(("class_name", "key"), every_nth(8, CASES))
def test_a_key_is_used_or_refused_by_name(class_name: str, key: str) -> None:
    needed = {other: setting for other, setting in NEEDS.get(key, {}).items() if other in CLASSES[class_name].keys}
    default = {**short(class_name), **needed}
    values = [value for value in VALUES[key] if value != default.get(key)]
    checked = [changes_as_diffusers_does(class_name, key, value, needed) for value in values]
    changes = [changed for changed in checked if changed is not None]
    explained = key in WITHOUT_EFFECT or (class_name, key) in WITHOUT_EFFECT_THERE
    assert values
    assert not changes or any(changes) or explained


def changes_as_diffusers_does(class_name: str, key: str, value: Any, needed: dict[str, Any]) -> bool | None:
    """Check a value; return whether the trajectory differs from the default's, or None if the value is refused."""
    name = name_of(class_name)
    assert name is not None
    config = {**short(class_name), **needed, key: value}
    try:
        table = extract(make_scheduler(name, config), STEPS)
    except ModelError as refusal:
        if not any(str(named) in str(refusal) for named in (key, value, *needed)):
            assert not np.isfinite(by_diffusers(own(class_name, config), STEPS)[-1]).all()
        return None
    expected = by_diffusers(own(class_name, config), STEPS)
    kind = noise_type(own(class_name, config))
    assert difference(by_table(table, kind), expected) < TOLERANCE
    without = default_trajectory(class_name, tuple(needed.items()))
    return len(without) != len(expected) or difference(without, expected) > TOLERANCE


@pytest.mark.parametrize("class_name", [name for name, row in CLASSES.items() if "trained_betas" in row.keys])
def test_too_few_betas_are_refused(class_name: str) -> None:
    config = {**configuration(class_name), "trained_betas": [0.01] * 10}
    name = name_of(class_name)
    assert name is not None
    with pytest.raises(ModelError, match=r"Scheduler has 10 trained_betas and num_train_timesteps 1000"):
        make_scheduler(name, config)
    with pytest.raises(ModelError, match="10 trained_betas"):
        extract_all(own(class_name, config), name, (STEPS,))


_OWN_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@pytest.mark.parametrize("levels", _OWN_LEVELS)
@pytest.mark.parametrize("betas", [pytest.param("scaled_linear", marks=pytest.mark.nightly), "squaredcos_cap_v2"])
def test_a_first_timestep_that_comes_twice_is_refused(levels: str, betas: str) -> None:
    """diffusers begins one step late there, or fails at the last step; with other schedules it does neither."""
    refused = []
    for class_name in (name for name, row in CLASSES.items() if levels in row.keys and row.family == Family.BETAS):
        name = name_of(class_name)
        assert name is not None
        config = {"_class_name": class_name, "num_train_timesteps": 100, "beta_schedule": betas, levels: True}
        scheduler = own(class_name, config)
        scheduler.set_timesteps(20)
        first = (scheduler.timesteps == scheduler.timesteps[0]).sum()
        if first > 1:
            refused.append(class_name)
            with pytest.raises(ModelError, match=r"its first timestep 9\d comes twice, so diffusers skips"):
                extract(make_scheduler(name, config), 20)
            continue
        if not supports(make_scheduler(name, config), 20):
            continue
        table, expected = extract(make_scheduler(name, config), 20), by_diffusers(own(class_name, config), 20)
        assert difference(by_table(table, noise_type(own(class_name, config))), expected) < TOLERANCE
    assert refused or (levels, betas) not in TWICE


TWICE = {("use_karras_sigmas", "squaredcos_cap_v2"), ("use_beta_sigmas", "scaled_linear")}
"""Schedules whose first two timesteps round to the same one."""

"""The configuration of a pipeline's own scheduler goes through an allow-list, and the pipeline's class has its say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.every_day import every_nth
from unetc.compiler.schedulers.classes import CLASSES, Family
from unetc.compiler.schedulers.extract import extract, extract_all
from unetc.compiler.schedulers.make import CORRECTIONS, make_scheduler
from unetc.compiler.schedulers.names import SCHEDULERS
from unetc.errors import ModelError, SessionError
from unetc.models.pipelines import PIPELINES
from unetc.sampler.table import SchedulerTables

from .test_every_class import BETAS, OWN, configuration
from .trajectories import TOLERANCE, by_diffusers, by_table, difference, diffusers

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

EDM = configuration("EDMEulerScheduler")
BY_FAMILY = [(name, CLASSES[class_name].family) for name, (class_name, _) in SCHEDULERS.items()]


@pytest.mark.parametrize(("name", "family"), BY_FAMILY)
@pytest.mark.parametrize("trained", Family)
def test_a_model_is_sampled_by_schedulers_of_its_family_alone(name: str, family: Family, trained: Family) -> None:
    # A1: ddim, ddpm, euler and dpmsolver++ took the configuration of EDM
    if family == trained:
        assert make_scheduler(name, OWN[trained])
        return
    with pytest.raises(ModelError, match=rf"{SCHEDULERS[name][0]} cannot .* trained for {trained.value}\. Choose \w+"):
        make_scheduler(name, OWN[trained])


def test_edm_is_known_by_its_keys_without_a_class() -> None:
    # A1
    without = {key: value for key, value in EDM.items() if key != "_class_name"}
    with pytest.raises(ModelError, match=r"trained for EDM\. Choose edm-euler"):
        make_scheduler("euler", without)


def test_a_key_of_edm_in_another_configuration_is_refused() -> None:
    # A1
    with pytest.raises(ModelError, match="'sigma_data', which unetc does not know for diffusion with betas"):
        make_scheduler("ddim", {**OWN[Family.BETAS], "sigma_data": 0.5})


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"DDIMScheduler has the key 'magic', which unetc does not know"):
        make_scheduler("ddim", {**OWN[Family.BETAS], "magic": 1})


def unclipped(class_name: str) -> dict[str, Any]:
    """Read the defaults of a class, without settings that Heun and UniPC cannot take over."""
    config = configuration(class_name)
    return config | {key: key == "lower_order_final" for key in ("clip_sample", "lower_order_final") if key in config}


@pytest.mark.parametrize(
    ("source", "key", "value", "name"),
    [
        ("EulerDiscreteScheduler", "timestep_type", "continuous", "ddim"),
        ("EulerDiscreteScheduler", "timestep_type", "continuous", "dpmsolver++"),
        ("DDIMScheduler", "rescale_betas_zero_snr", True, "heun"),
        ("DDIMScheduler", "rescale_betas_zero_snr", True, "pndm"),
        ("DPMSolverMultistepScheduler", "use_flow_sigmas", True, "ddim"),
        ("DDPMScheduler", "predict_epsilon", False, "ddim"),
        ("FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting", True, "flow-heun"),
        ("FlowMatchEulerDiscreteScheduler", "shift_terminal", 0.1, "flow-heun"),
    ],
)
def test_a_key_about_the_training_is_not_dropped(source: str, key: str, value: object, name: str) -> None:
    config = unclipped(source)
    make_scheduler(name, config)
    with pytest.raises(ModelError, match=rf"does not know {key}, which is .* in the pipeline's {source}"):
        make_scheduler(name, {**config, key: value})


@pytest.mark.parametrize(
    ("source", "name"),
    every_nth(
        4,
        [name for name, row in CLASSES.items() if row.family == Family.BETAS],
        ["ddim", "euler", "dpmsolver++", "unipc", "heun"],
    ),
)
def test_a_configuration_carries_over_as_in_diffusers(source: str, name: str) -> None:
    config = {**unclipped(source), "prediction_type": "v_prediction", "beta_end": 0.013}
    class_name, overrides = SCHEDULERS[name]
    own = getattr(diffusers, class_name).from_config(config, **overrides)
    table = extract(make_scheduler(name, config), 6)
    assert difference(by_table(table, torch.float64), by_diffusers(own, 6)) < TOLERANCE


def test_defaults_that_differ_are_not_guessed() -> None:
    with pytest.raises(ModelError, match=r"HeunDiscreteScheduler has no beta_start, whose default is 0\.00085 there"):
        make_scheduler("ddim", {"_class_name": "HeunDiscreteScheduler"})
    make_scheduler("heun", {"_class_name": "HeunDiscreteScheduler"})


def pipeline_with(class_name: str, scheduler: Any) -> Any:
    """Make a pipeline that has nothing but a scheduler."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "feature_extractor", "safety_checker"))
    if class_name.startswith("StableDiffusionXL"):
        parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet"))
        return getattr(diffusers, class_name)(**parts, scheduler=scheduler, add_watermarker=False)
    if class_name in ("DDPMPipeline", "DDIMPipeline"):
        return getattr(diffusers, class_name)(unet=None, scheduler=scheduler)
    return getattr(diffusers, class_name)(**parts, scheduler=scheduler, requires_safety_checker=False)


SOURCES = ("PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


@pytest.mark.parametrize("pipeline", sorted({*PIPELINES, *CORRECTIONS}))
@pytest.mark.parametrize("source", [*SOURCES, "DDIMScheduler"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "pndm", "euler", "heun"])
def test_the_pipelines_class_corrects_its_scheduler(pipeline: str, source: str, name: str) -> None:
    # A3: DDIM's default clips latents; StableDiffusionPipeline switches it off
    if pipeline == "DDIMPipeline" and name != "ddim":
        pytest.skip("this pipeline turns every scheduler into DDIM")
    config = unclipped(source) if name == "heun" else configuration(source)
    class_name, overrides = SCHEDULERS[name]
    theirs = pipeline_with(pipeline, getattr(diffusers, class_name).from_config(config, **overrides)).scheduler.config
    ours = make_scheduler(name, config, pipeline).config
    for key in CLASSES[class_name].keys:
        if key == "clip_sample" and key not in config and key not in CORRECTIONS.get(pipeline, {}):
            # the default of the class, meant for images
            assert ours[key] == (theirs[key] and not getattr(PIPELINES.get(pipeline), "text", False))
        else:
            assert ours[key] == theirs[key], key


@pytest.mark.parametrize("source", SOURCES)
def test_latents_are_not_clipped(source: str, caplog: pytest.LogCaptureFixture) -> None:
    # A3
    config = {**configuration(source), **BETAS}
    for pipeline in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        assert extract(make_scheduler("ddim", config, pipeline), 5).clip == np.inf
    assert "latents are not clipped" in caplog.text
    caplog.clear()
    assert extract(make_scheduler("ddim", config), 5).clip == 1
    assert "latents" not in caplog.text


def test_a_clip_that_the_folder_asks_for_is_kept_where_diffusers_keeps_it() -> None:
    config = configuration("DDIMScheduler")
    assert config["clip_sample"]
    assert extract(make_scheduler("ddim", config, "StableDiffusionXLPipeline"), 5).clip == 1
    assert extract(make_scheduler("ddim", config, "StableDiffusionPipeline"), 5).clip == np.inf


def tables_of(name: str, config: dict[str, Any]) -> SchedulerTables:
    """Read tables, through the array of a bundle."""
    tables = extract_all(make_scheduler(name, config), name, (5, 20))
    return SchedulerTables.from_array(*tables.to_array())


def test_noise_levels_between_timesteps_are_interpolated() -> None:
    tables = tables_of("ddim", OWN[Family.BETAS])
    signal = make_scheduler("ddim", OWN[Family.BETAS]).alphas_cumprod.double()  # type: ignore[attr-defined]
    levels = (signal / (1 - signal)).log().numpy()
    assert tables.log_snr_at(999) == pytest.approx(levels[999])
    assert tables.log_snr_at(0) == pytest.approx(levels[0])
    assert levels[501] < tables.log_snr_at(500.25) < levels[500]
    table = tables.table(20)
    for timestep, level in zip(table.timesteps, table.log_snr, strict=True):
        assert tables.log_snr_at(float(timestep)) == pytest.approx(level, abs=1e-4)


@pytest.mark.parametrize("name", ["edm-euler", "edm-dpmsolver++"])
def test_noise_levels_of_edm_follow_from_its_timesteps(name: str) -> None:
    # A1: the drop-in clamped timesteps that it did not know
    tables = tables_of(name, EDM)
    for steps in (5, 20):
        table = tables.table(steps)
        assert [tables.log_snr_at(float(t)) for t in table.timesteps] == pytest.approx(table.log_snr, abs=1e-4)
    with pytest.raises(SessionError, match=r"timestep 999 lies outside -1\.5\d+ to 1\.09\d+"):
        tables.log_snr_at(999)


@pytest.mark.parametrize("timestep", [-0.5, -1.5, 999.5, 1000.0, float("nan")])
def test_timesteps_outside_the_trained_range_are_refused(timestep: float) -> None:
    # A1
    with pytest.raises(SessionError, match="lies outside 0 to 999, the range on which this model was trained"):
        tables_of("ddim", OWN[Family.BETAS]).log_snr_at(timestep)


def test_tables_of_old_bundles_know_the_range_of_their_timesteps() -> None:
    own = tables_of("ddim", OWN[Family.BETAS])
    old = SchedulerTables(name=own.name, tables=own.tables)
    header, array = old.to_array()
    assert header.trained == 0
    assert len(array) == 25
    last = float(old.table(20).timesteps[-1])
    assert old.log_snr_at(last) == pytest.approx(old.table(20).log_snr[-1])
    with pytest.raises(SessionError, match="lies outside"):
        old.log_snr_at(last - 1)


@pytest.mark.parametrize(("kind", "image_tokens"), [("exponential", 256), ("exponential", 1024), ("linear", 1024)])
def test_a_dynamic_shift_belongs_to_one_size(kind: str, image_tokens: int) -> None:
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    config = {**OWN[Family.FLOW], "use_dynamic_shifting": True, "time_shift_type": kind}
    with pytest.raises(ModelError, match=r"use_dynamic_shifting, which makes .* depend on the size"):
        make_scheduler("flow-euler", config)
    scheduler = make_scheduler("flow-euler", config, image_tokens=image_tokens)
    tables = extract_all(scheduler, "flow-euler", (5, 20))
    assert tables.one_size
    assert SchedulerTables.from_array(*tables.to_array()).one_size
    own = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    expected = by_diffusers(own, 20, mu=calculate_shift(image_tokens))
    assert difference(by_table(tables.table(20), torch.float64), expected) < TOLERANCE


def test_more_steps_than_timesteps_are_refused_with_the_reason() -> None:  # G1
    scheduler = make_scheduler("ddim", {"_class_name": "DDIMScheduler", "num_train_timesteps": 40})
    with pytest.raises(ModelError, match=r"no proper schedule of 41 steps: it has 40 timesteps\. Choose"):
        extract(scheduler, 41)
    assert extract(scheduler, 40).steps == 40

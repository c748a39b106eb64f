"""The law at budget 0: without removals, unetc draws the same samples as the diffusers pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import msgspec
import numpy as np
import pytest
import torch

import unetc
from tests.models import condition_well
from unetc.artifacts import Assignment, Phase, Plan, Prediction, Profile
from unetc.backend import Array
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.engines import compile_full
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.prepare import prepare
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.compiler.search.bench import Measured
from unetc.compiler.search.candidate import Candidate
from unetc.compiler.search.workbench import Workbench
from unetc.models.find import find_model
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.session import Session
from unetc.sampler.noise import initial_noise, step_noise

diffusers: Any = untyped_diffusers

TOLERANCE = 1e-4
"""Tolerance for samples in -1 to 1. Both sides compute in float32 with different orders of sums, and errors add up."""

SEED, BATCH = 11, 3


def pipeline_of(name: str) -> Any:
    """Load a pipeline as a user of diffusers does."""
    pipeline = diffusers.DDPMPipeline.from_pretrained(find_model(name).folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_ddim(name: str, steps: int, noise: Array, monkeypatch: pytest.MonkeyPatch, **config: str) -> Array:
    """Sample with diffusers' DDIM pipeline from given noise."""
    pipeline = pipeline_of(name)
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **config)
    pipeline = diffusers.DDIMPipeline(unet=pipeline.unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    with monkeypatch.context() as patch:
        draw_from(patch, "diffusers.pipelines.ddim.pipeline_ddim", iter([noise]))
        return in_range(pipeline(batch_size=len(noise), num_inference_steps=steps, eta=0.0, output_type="np"))


def run_ddpm(name: str, steps: int, noise: list[Array], monkeypatch: pytest.MonkeyPatch) -> Array:
    """Sample with diffusers' DDPM pipeline from given initial noise and given noise of every step."""
    source = iter(noise)
    with monkeypatch.context() as patch:
        draw_from(patch, "diffusers.pipelines.ddpm.pipeline_ddpm", source)
        draw_from(patch, "diffusers.schedulers.scheduling_ddpm", source)
        output = pipeline_of(name)(batch_size=len(noise[0]), num_inference_steps=steps, output_type="np")
    assert list(source) == [], "diffusers has drawn noise less often than expected"
    return in_range(output)


def draw_from(patch: pytest.MonkeyPatch, module: str, source: Iterator[Array]) -> None:
    def draw(shape: tuple[int, ...], **_: object) -> torch.Tensor:
        noise = torch.from_numpy(next(source))
        assert noise.shape == torch.Size(shape)
        return noise

    patch.setattr(f"{module}.randn_tensor", draw)


def in_range(output: Any) -> Array:
    """Undo a pipeline's final scaling and order of axes, but not its clipping to -1 to 1."""
    samples: Array = (2 * output.images - 1).transpose(0, 3, 1, 2)
    return samples


def assert_same(samples: Array, expected: Array) -> None:
    assert (np.abs(expected) < 0.99).mean() > 0.05, "clipping would hide every difference"
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    assert np.abs(np.clip(samples, -1, 1) - expected).max() <= TOLERANCE


def full_session(name: str, cache: Path, scheduler: str, steps: int, **config: str) -> Session:
    """Create a session of the full model with one scheduler table."""
    prepared = prepare(find_model(name), cache)
    gated, model = prepared.gated, prepared.model
    loader = open_backend("onnxruntime:cpu", threads=1).open_weights(gated.weights.read_bytes())
    program = loader.load(compile_full(gated))
    plan = Plan(
        unetc=unetc.__version__,
        model=model.reference,
        profile_sha256="0" * 64,
        budget=0.0,
        max_engines=1,
        engines=(Assignment(treatments={}),),
        phases=(Phase(low=-30.0, high=30.0, cycle=(0,)),),
        prediction=Prediction(time_ratio=1.0, relative_l2=0.0, memory=2.0),
    )
    scheduler = extract_all(make_scheduler(scheduler, model.scheduler_config | config), scheduler, [steps])
    return Session(
        plan=plan,
        full=program,
        programs=[program],
        scheduler=scheduler,
        sample_shape=model.sample_shape,
        steps=steps,
        predicted_channels=gated.predicted_channels,
    )


@pytest.mark.architecture("UNet2DModel")
@pytest.mark.shows("sample")
@pytest.mark.parametrize("steps", [4, 20, 50])
def test_the_full_model_equals_the_ddim_pipeline(
    tiny_model: Path, tiny_bundle: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = unetc.load(tiny_bundle)
    noise = initial_noise(SEED, range(BATCH), session.sample_shape)
    expected = run_ddim(str(tiny_model), steps, noise, monkeypatch)
    assert_same(session.sample(noise=noise, steps=steps, full_model=True), expected)
    assert_same(session.sample(BATCH, seed=SEED, steps=steps, full_model=True), expected)
    assert np.abs(session.sample(noise=noise, steps=steps) - expected).max() > 0.1  # the plan's removals are visible


@pytest.mark.parametrize(("prediction", "steps"), [("sample", 20), ("epsilon", 4)])
def test_other_prediction_types_equal_the_pipeline(
    tiny_model: Path, cache: Path, prediction: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use few steps for epsilon: with random weights, rounding grows tenfold in four steps, a millionfold in fifty."""
    session = full_session(str(tiny_model), cache, "ddim", steps, prediction_type=prediction)
    noise = initial_noise(SEED, range(BATCH), session.sample_shape)
    expected = run_ddim(str(tiny_model), steps, noise, monkeypatch, prediction_type=prediction)
    assert_same(session.sample(noise=noise), expected)


def test_a_bundle_of_budget_zero_equals_the_ddim_pipeline(
    tiny_model: Path, tiny_build: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unetc.compiler.prepare.STEP_COUNTS", (20,))  # the other tables are not used
    measure = Workbench.measure

    def measure_late(bench: Workbench, candidate: Candidate, *, seed: int) -> Measured:
        """Pretend that the plan was slow for a moment, which is no reason to remove anything."""
        measured = measure(bench, candidate, seed=seed)
        return replace(measured, measurement=msgspec.structs.replace(measured.measurement, time_ratio=1.05))

    monkeypatch.setattr(Workbench, "measure", measure_late)
    options = BuildOptions(plan=PlanOptions(budget=0.0), steps=20)
    profile = Profile.load(tiny_build / "profile.json")
    manifest = build(find_model(str(tiny_model)), profile, tmp_path / "bundle", options, cache=cache)
    assert manifest.plan.engines == (Assignment(treatments={}),)
    assert manifest.measured.damage.relative_l2.mean == 0
    session = unetc.load(tmp_path / "bundle")
    noise = initial_noise(SEED, range(BATCH), session.sample_shape)
    samples = session.sample(noise=noise)
    np.testing.assert_array_equal(samples, session.sample(noise=noise, full_model=True))
    assert_same(samples, run_ddim(str(tiny_model), 20, noise, monkeypatch))


def test_a_stochastic_session_equals_the_ddpm_pipeline(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 20
    session = full_session(str(tiny_model), cache, "ddpm", steps)
    noise = [initial_noise(SEED, range(BATCH), session.sample_shape)]
    noise += [step_noise(SEED, range(BATCH), step, session.sample_shape) for step in range(steps - 1)]
    expected = run_ddpm(str(tiny_model), steps, noise, monkeypatch)
    assert_same(session.sample(BATCH, seed=SEED), expected)
    assert np.abs(session.sample(noise=noise[0], seed=SEED + 1) - expected).max() > 0.1  # the steps' noise matters


@pytest.mark.nightly
def test_a_session_with_learned_variance_equals_the_ddpm_pipeline(
    tiny_model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 20
    pipeline = pipeline_of(str(tiny_model))
    # without attention, which makes the capture faster
    plain = {"add_attention": False, "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel.from_config(pipeline.unet.config, out_channels=2, **plain)
    condition_well(unet, seed=0)
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config, variance_type="learned_range")
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path)
    session = full_session(str(tmp_path), cache, "ddpm", steps)
    noise = [initial_noise(SEED, range(BATCH), session.sample_shape)]
    noise += [step_noise(SEED, range(BATCH), step, session.sample_shape) for step in range(steps - 1)]
    expected = run_ddpm(str(tmp_path), steps, noise, monkeypatch)
    assert_same(session.sample(BATCH, seed=SEED), expected)
    fixed = full_session(str(tmp_path), cache, "ddpm", steps, variance_type="fixed_large")
    assert np.abs(fixed.sample(BATCH, seed=SEED) - expected).max() > 0.1  # the predicted variance matters


@pytest.mark.nightly  # its capture takes 20 s; the daily tests above compare a tiny model of the same class
def test_the_shipped_model_equals_its_ddim_pipeline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = full_session("digits", cache, "ddim", 20)
    noise = initial_noise(SEED, range(BATCH), session.sample_shape)
    assert_same(session.sample(noise=noise), run_ddim("digits", 20, noise, monkeypatch))

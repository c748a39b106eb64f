"""The drop-in: unmodified diffusers pipelines with a bundle as their UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import Tensor

import unetc
import unetc.diffusers
from tests.models import condition_well
from tests.pipelines import save_stable_diffusion, save_stable_diffusion_2, save_stable_diffusion_xl
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.artifacts import Phase, Plan, Prediction, Profile
from unetc.backend import Array
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.repair import RepairOptions
from unetc.compiler.tensorrt.compile_bundle import compile_bundle
from unetc.compiler.tensorrt.options import CompileOptions
from unetc.diffusers import BundleUNet
from unetc.errors import NonFiniteError, SessionError, UnetcError
from unetc.models.find import ModelSource, find_model
from unetc.nvidia.call_ranges import check_call
from unetc.precision import Precision
from unetc.runtime.bundle import Bundle
from unetc.runtime.rollout import EngineCall, Rollout
from unetc.runtime.session import Session
from unetc.treatments import Treatment

pytestmark = pytest.mark.nightly

diffusers: Any = untyped_diffusers

STEPS = 6
SCALE = 3.0
PROMPTS = ["a small circle", "a blue square"]
TOLERANCE = 1e-3
"""Largest difference between two images in 0..1: rounding of two runtimes over up to eleven calls and a decoder."""

SAVERS: dict[str, Callable[[Path], Path]] = {
    "sd": save_stable_diffusion,
    "sd2": save_stable_diffusion_2,
    "sdxl": save_stable_diffusion_xl,
}

VERSIONS = {"sd": "1.5", "sd2": "2.1", "sdxl": "XL"}

ONLY_SD = pytest.mark.parametrize("folder", ["sd"], indirect=True)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            name, marks=pytest.mark.architecture(f"UNet2DConditionModel as in Stable Diffusion {VERSIONS[name]}")
        )
        for name in SAVERS
    ],
)
def folder(request: pytest.FixtureRequest, shared: Path) -> Path:
    """Save a pipeline and build a bundle of it next to it; the bundle of Stable Diffusion accepts a ControlNet."""
    root = shared / f"diffusers-{request.param}"
    with FileLock(f"{root}.lock"):  # another pytest-xdist worker may be building it
        if not (root / "bundle").exists():
            root.mkdir()
            SAVERS[request.param](root / "pipeline")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("unetc.compiler.prepare.STEP_COUNTS", (1, 500))  # the other tables are not used
                build_by_hand(root, controlnet=request.param == "sd")
    return root / "pipeline"


def build_by_hand(root: Path, *, controlnet: bool) -> None:
    model, cache = str(root / "pipeline"), root / "cache"
    analysis = AnalysisOptions(
        steps=STEPS,
        samples=1,
        bins=1,
        batch=1,
        rounds=1,
        threads=1,
        decisive=1,
        prompts=("a red square",),
        guidance_scale=SCALE,
    )
    found = find_model(ModelSource(model, controlnet=controlnet))
    profile = analyze_model(found, analysis, cache=cache)
    plain = RepairOptions(tune=False)  # a pipeline's scheduler has plain rows
    options = BuildOptions(plan=PlanOptions(budget=0.0), steps=STEPS, repair=plain, controls=False)
    build(found, profile, root / "bundle", options, cache=cache, plan=plan_of(profile))


def plan_of(profile: Profile) -> Plan:
    """Compute the first noise levels in full, then alternate engine 0 with an engine that holds and forecasts."""
    level = next(component for component in profile.components if component.kind == "level")
    apart = [c for c in profile.components if c.kind == "residual" and c.name not in level.nested]
    reusing = {level.name: Treatment.HOLD, apart[-1].name: Treatment.FORECAST}
    low, high = profile.bins[0].low, profile.bins[-1].high
    return Plan(
        unetc=unetc.__version__,
        model=profile.model,
        profile_sha256=profile.sha256(),
        budget=0.0,
        max_engines=1,
        engines=with_emissions([{}, reusing], profile.components),
        phases=(Phase(low=low, high=-4.0, cycle=(0,)), Phase(low=-4.0, high=high, cycle=(0, 1))),
        prediction=Prediction(time_ratio=1.0, relative_l2=0.0, memory=2.0),
    )


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    return folder.parent / "bundle"


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return unetc.load(bundle)


@pytest.fixture(scope="module")
def planned(bundle: Path) -> BundleUNet:
    return unetc.diffusers.load(bundle)


@pytest.fixture(scope="module")
def full_model(bundle: Path) -> BundleUNet:
    return unetc.diffusers.load(str(bundle), full_model=True)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the engines in the order they run."""
    engines: list[int] = []
    run = Rollout.run

    def run_and_note(self: Rollout, *values: Any, **named: Any) -> EngineCall:
        call = run(self, *values, **named)
        engines.append(call.engine)
        return call

    monkeypatch.setattr(Rollout, "run", run_and_note)
    return engines


@contextmanager
def denoised_by(pipeline: Any, unet: BundleUNet) -> Iterator[Any]:
    own = pipeline.unet
    pipeline.unet = unet
    try:
        yield pipeline
    finally:
        pipeline.unet = own


def latents(batch: int = 2, size: int = 16) -> Tensor:
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(0))


def images_of(pipeline: Any, **options: Any) -> Array:
    defaults = {
        "prompt": PROMPTS,
        "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
        "output_type": "pt",
    }
    if "image" not in options:
        defaults["latents"] = latents()
    images: Array = pipeline(**defaults | options).images.numpy()
    return images


@pytest.mark.shows("drop-in")
@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_the_full_model_equals_the_pipeline(pipeline: Any, full_model: BundleUNet, scale: float) -> None:
    expected = images_of(pipeline, guidance_scale=scale)
    with denoised_by(pipeline, full_model):
        np.testing.assert_allclose(images_of(pipeline, guidance_scale=scale), expected, atol=TOLERANCE)


def test_a_plan_gives_the_sessions_samples(
    folder: Path, pipeline: Any, session: Session, planned: BundleUNet, engines: list[int]
) -> None:
    with denoised_by(pipeline, planned):
        images = images_of(pipeline)
    assert tuple(engines) == session.schedule(STEPS)
    assert set(engines) == {0, 1}
    conditions = find_model(str(folder)).encode(PROMPTS, SCALE)
    expected = session.sample(noise=latents().numpy(), conditions=conditions)
    np.testing.assert_allclose(images, np.clip(expected / 2 + 0.5, 0, 1), atol=TOLERANCE)
    assert np.abs(images - images_of(pipeline)).max() > TOLERANCE  # the plan's reuse is visible


@pytest.mark.shows("sample")
def test_a_session_equals_the_pipeline(folder: Path, pipeline: Any, session: Session) -> None:
    conditions = find_model(str(folder)).encode(PROMPTS, SCALE)
    images = session.sample(noise=latents().numpy(), conditions=conditions, full_model=True)
    np.testing.assert_allclose(np.clip(images / 2 + 0.5, 0, 1), images_of(pipeline), atol=TOLERANCE)


@ONLY_SD
@pytest.mark.parametrize(
    "scheduler",
    [
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "PNDMScheduler",
    ],
)
def test_schedulers_that_the_bundle_was_not_built_with(
    pipeline: Any, planned: BundleUNet, full_model: BundleUNet, engines: list[int], scheduler: str
) -> None:
    """Heun calls twice at every timestep except the first, KDPM2 between timesteps, PNDM twice at the second."""
    own = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(own.config)
    try:
        noise = latents() / pipeline.scheduler.init_noise_sigma

        def run() -> Array:
            return images_of(pipeline, latents=noise, generator=torch.Generator().manual_seed(1))

        expected = run()
        with denoised_by(pipeline, full_model):
            np.testing.assert_allclose(run(), expected, atol=TOLERANCE)
        engines.clear()
        with denoised_by(pipeline, planned):
            images = run()
            np.testing.assert_array_equal(run(), images)  # the second trajectory is independent of the first
    finally:
        pipeline.scheduler = own
    half = len(engines) // 2
    assert engines[:half] == engines[half:]
    assert engines[0] == 0
    assert 1 in engines
    difference = np.linalg.norm(images - expected) / np.linalg.norm(expected)
    assert 1e-4 < difference < 0.5


def test_image_to_image_starts_in_the_middle(
    pipeline: Any, session: Session, planned: BundleUNet, full_model: BundleUNet, engines: list[int]
) -> None:
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    converted = diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
    converted.set_progress_bar_config(disable=True)

    def run() -> Array:
        return images_of(converted, image=image, strength=0.5, generator=torch.Generator().manual_seed(1))

    expected = run()
    with denoised_by(converted, full_model):
        np.testing.assert_allclose(run(), expected, atol=TOLERANCE)
    engines.clear()
    with denoised_by(converted, planned):
        images = run()
        np.testing.assert_array_equal(run(), images)
    levels = session.scheduler.table(STEPS).log_snr[STEPS // 2 :].tolist()
    assert tuple(engines) == session.plan.schedule(levels) * 2
    assert 1 in engines
    assert np.isfinite(images).all()


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_inpainting_keeps_most_of_its_saving(
    pipeline: Any,
    planned: BundleUNet,
    full_model: BundleUNet,
    engines: list[int],
    strength: float,
) -> None:
    """The pipeline pastes the noised original into the samples after every step."""
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., 8:24, 4:] = 1
    converted = diffusers.AutoPipelineForInpainting.from_pipe(pipeline)
    converted.set_progress_bar_config(disable=True)

    def run() -> Array:
        generator = torch.Generator().manual_seed(1)
        return images_of(
            converted, image=image, mask_image=mask, strength=strength, generator=generator, num_inference_steps=10
        )

    expected = run()
    with denoised_by(converted, full_model):
        np.testing.assert_allclose(run(), expected, atol=TOLERANCE)
    engines.clear()
    with denoised_by(converted, planned):
        first = run()
        ran = tuple(engines)
        engines.clear()
        np.testing.assert_array_equal(run(), first)
    assert tuple(engines) == ran
    assert ran[0] == ran[1] == 0
    assert ran.count(1) >= len(ran) // 2 - 3


@ONLY_SD
def test_a_trajectory_ends_where_another_begins(pipeline: Any, planned: BundleUNet, engines: list[int]) -> None:
    """Every trajectory begins with engine 0, whatever was held."""
    with denoised_by(pipeline, planned):
        first = images_of(pipeline)
        images_of(pipeline, num_inference_steps=1)
        images_of(pipeline, num_inference_steps=1)
        images_of(pipeline, height=48, width=32, latents=None)
        images_of(pipeline, guidance_scale=1.0)
        np.testing.assert_array_equal(images_of(pipeline), first)
    assert engines[6:8] == [0, 0]
    assert engines[:6] == engines[8:14] == engines[14:20] == engines[20:]


@ONLY_SD
def test_a_controlnet_adds_to_every_engine(
    pipeline: Any, planned: BundleUNet, full_model: BundleUNet, engines: list[int]
) -> None:
    controlnet = diffusers.ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16))
    condition_well(controlnet, seed=4)  # a fresh ControlNet adds nothing
    controlled = diffusers.StableDiffusionControlNetPipeline(**pipeline.components, controlnet=controlnet.eval())
    controlled.set_progress_bar_config(disable=True)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def run() -> Array:
        return images_of(controlled, image=image, latents=latents())

    expected = run()
    assert np.abs(expected - images_of(pipeline)).max() > 0.1
    with denoised_by(controlled, full_model):
        np.testing.assert_allclose(run(), expected, atol=TOLERANCE)
    engines.clear()
    with denoised_by(controlled, planned):
        images = run()
    assert 1 in engines
    assert 1e-4 < np.linalg.norm(images - expected) / np.linalg.norm(expected) < 0.5


@ONLY_SD
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_saved_pipeline_holds_the_bundle(
    pipeline: Any, bundle: Path, tmp_path: Path, full: bool, variant: str | None
) -> None:  # D7
    with denoised_by(pipeline, unetc.diffusers.load(bundle, full_model=full)):
        expected = images_of(pipeline)
        pipeline.save_pretrained(tmp_path, variant=variant)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, variant=variant, safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.unet, BundleUNet)
    np.testing.assert_allclose(images_of(loaded), expected, atol=1e-6)


@ONLY_SD
def test_latents_of_odd_sizes(pipeline: Any, planned: BundleUNet, full_model: BundleUNet) -> None:  # D1
    odd = torch.randn(2, 4, 13, 19, generator=torch.Generator().manual_seed(0))
    options = {"latents": odd, "height": 26, "width": 38}
    pipeline.check_inputs = lambda *_, **__: None  # the pipeline itself wants multiples of 8 pixels
    try:
        expected = images_of(pipeline, **options)
        with denoised_by(pipeline, full_model):
            np.testing.assert_allclose(images_of(pipeline, **options), expected, atol=TOLERANCE)
        with denoised_by(pipeline, planned):
            assert images_of(pipeline, **options).shape == expected.shape
    finally:
        del pipeline.check_inputs


@pytest.mark.rtx
@pytest.mark.parametrize("folder", ["sd", "sdxl"], indirect=True)
@pytest.mark.parametrize(("precision", "side"), [(Precision.FP32, None), (Precision.FP16, "14,22")])
def test_every_graph_becomes_an_engine_for_nvidia(
    bundle: Path, tmp_path: Path, precision: Precision, side: str | None
) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = CompileOptions(target="tensorrt-rtx", precision=precision, height=side, width=side)
    built = compile_bundle(bundle, options, cache=tmp_path)
    opened = Bundle.open(bundle)
    assert opened.manifest.decoder is not None
    expected = {engine.graph for engine in opened.manifest.all_engines()} | {opened.manifest.decoder.graph}
    assert {engine.graph for engine in built} == expected
    conditions = opened.conditions.take([0])
    for size in (16,) if side is None else (14, 18, 22):
        call = conditions.widen(np.zeros((1, 4, size, size), np.float32), 500.0)
        shapes = {name: array.shape for name, array in call.items()}
        for engine in built:
            if engine.graph != "decoder.onnx":
                assert shapes.keys() <= engine.record.shapes.keys()
                held = {name: least for name, (least, _, _) in engine.record.shapes.items() if "." in name}
                check_call(engine.record, shapes | held)


@pytest.mark.parametrize(
    ("folder", "problem"),
    [("sd", "take 4 down_block_additional_residuals"), ("sdxl", "cannot take down_block_additional_residuals")],
    indirect=["folder"],
)
def test_residuals_without_engine_inputs_are_refused(planned: BundleUNet, problem: str) -> None:
    residuals = [torch.zeros(1, 8, 16, 16)] * 3
    with pytest.raises(SessionError, match=problem):
        planned(
            **inputs_of(planned),
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=residuals[0],
        )


def inputs_of(unet: BundleUNet, timestep: float = 100.0, batch: int = 1) -> dict[str, Any]:
    width = unet.config.cross_attention_dim
    added = {"text_embeds": torch.zeros(batch, 16), "time_ids": torch.zeros(batch, 6)}
    return {
        "sample": latents(batch),
        "timestep": timestep,
        "encoder_hidden_states": torch.zeros(batch, 6, width),
        "added_cond_kwargs": added if unet.config.addition_embed_type else None,
    }


def test_a_trajectory_can_be_ended_by_hand(planned: BundleUNet, engines: list[int]) -> None:
    sample = latents(1)
    for timestep in (100.0, 90.0, 80.0):
        if timestep == 80.0:
            planned.reset()
        sample = sample - 0.1 * planned(**inputs_of(planned, timestep) | {"sample": sample}).sample
    assert engines == [0, 1, 0]


def test_pipelines_find_the_attributes_they_read(pipeline: Any, planned: BundleUNet) -> None:
    own = pipeline.unet
    assert {key for key in own.config if not key.startswith("_")} <= set(planned.config)
    for name in ("sample_size", "in_channels", "time_cond_proj_dim", "addition_time_embed_dim"):
        assert getattr(planned.config, name) == getattr(own.config, name)
    assert (planned.dtype, planned.device) == (own.dtype, own.device)
    if own.config.addition_embed_type:
        assert planned.add_embedding.linear_1.in_features == own.add_embedding.linear_1.in_features
    assert planned.to("cpu", torch.float16) is planned
    assert planned.eval() is planned
    with denoised_by(pipeline, planned):
        pipeline.to("cpu")
        assert pipeline.device == torch.device("cpu")
        assert pipeline.config.unet[1] == "BundleUNet"


def test_predictions_come_in_the_requested_form(planned: BundleUNet, full_model: BundleUNet) -> None:
    inputs = inputs_of(full_model)
    whole = full_model(**inputs).sample
    (alone,) = full_model(**inputs, return_dict=False)
    torch.testing.assert_close(alone, whole, rtol=0, atol=0)
    half = full_model(**inputs | {"sample": inputs["sample"].double(), "timestep": torch.tensor([100])}).sample
    assert half.dtype == torch.float64
    torch.testing.assert_close(half.float(), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cross_attention_kwargs", {"scale": 0.5}),
        ("timestep_cond", torch.zeros(1, 4)),
        ("attention_mask", torch.zeros(1, 4)),
        ("encoder_attention_mask", torch.zeros(1, 4)),
        ("down_intrablock_additional_residuals", [torch.zeros(1, 4)]),
        ("added_cond_kwargs", {"image_embeds": torch.zeros(1, 4)}),
    ],
)
def test_arguments_that_engines_cannot_take_are_refused_by_name(planned: BundleUNet, name: str, value: Any) -> None:
    with pytest.raises(UnetcError, match=f"cannot take {name}"):
        planned(**inputs_of(planned) | {name: value})
    if name == "cross_attention_kwargs":
        planned(**inputs_of(planned) | {name: {}})


@ONLY_SD
def test_inputs_that_do_not_fit_are_refused(planned: BundleUNet) -> None:
    inputs = inputs_of(planned, batch=2)
    with pytest.raises(SessionError, match=r"one call has the timesteps \[5.0, 9.0\]"):
        planned(**inputs | {"timestep": torch.tensor([9.0, 5.0])})
    with pytest.raises(SessionError, match="needs encoder_hidden_states"):
        planned(**inputs | {"encoder_hidden_states": None})
    with pytest.raises(NonFiniteError, match="at timestep 100"):
        planned(**inputs | {"sample": inputs["sample"] * torch.nan})


@pytest.fixture(scope="module")
def unconditional(tiny_model: Path) -> Any:
    return diffusers.DDPMPipeline.from_pretrained(tiny_model)


def samples_of(pipeline: Any, steps: int) -> Array:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images: Array = pipeline(batch_size=2, num_inference_steps=steps, generator=generator, output_type="np").images
    return images


@pytest.mark.architecture("UNet2DModel")
@pytest.mark.shows("drop-in")
def test_unconditional_pipelines(tiny_bundle: Path, unconditional: Any) -> None:
    own = unconditional.unet
    full, planned = (unetc.diffusers.load(tiny_bundle, full_model=full_model) for full_model in (True, False))
    ddim = diffusers.DDIMScheduler.from_config(unconditional.scheduler.config)
    for kind, scheduler in (("DDPMPipeline", unconditional.scheduler), ("DDIMPipeline", ddim)):
        expected, images = (
            samples_of(getattr(diffusers, kind)(unet=unet, scheduler=scheduler), 20) for unet in (own, full)
        )
        np.testing.assert_allclose(images, expected, atol=TOLERANCE)
    noise = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(3)).numpy()
    expected = np.clip(unetc.load(tiny_bundle).sample(noise=noise, steps=20) / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    images = samples_of(diffusers.DDIMPipeline(unet=planned, scheduler=ddim), 20)
    np.testing.assert_allclose(images, expected, atol=TOLERANCE)

"""Every kind of condition gives the numbers of diffusers' own pipelines, at the same noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch

from tests.pipelines import save_classes, save_stable_diffusion, save_stable_diffusion_xl
from tests.plans import plan_of
from unetc.artifacts import Assignment, Phase
from unetc.call import CLASS_LABELS, EXTRA_CHANNELS, TIME_IDS, TIMESTEP_COND
from unetc.compiler.engines import compile_full
from unetc.compiler.prepare import prepare
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.conditions import Conditions
from unetc.device import Array
from unetc.diffusers import BundleUNet
from unetc.errors import ModelError, ShapeMismatch
from unetc.models.find import find_model
from unetc.models.image_conditions import edit, encode_for_editing, encode_for_inpainting, seed_of
from unetc.models.images import Images
from unetc.models.labels import LABELS
from unetc.models.model import Model
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.session import Session
from unetc.sampler.noise import initial_noise, step_noise

diffusers: Any = untyped_diffusers

pytestmark = pytest.mark.nightly

STEPS = 3
TOLERANCE = 2e-5
"""Largest difference of latents, relative to the largest: rounding of two runtimes over three steps."""
PROMPTS = ["a small circle", "a blue square"]


def autoencoder_of(model: Model) -> Any:
    """Load the whole VAE of a model."""
    decoder = model.load_decoder()
    assert decoder is not None
    return decoder.autoencoder


def session_of(model: Model, cache: Path, steps: int = STEPS, scheduler: str = "ddim") -> Session:
    """Open the full model without a build."""
    prepared = prepare(model, cache)
    backend = open_backend("onnxruntime:cpu", threads=1)
    full = backend.open_weights(prepared.gated.weights.read_bytes()).load(compile_full(prepared.gated))
    decoder: Any = SimpleNamespace(scale=model.decoder_scale)  # latents are compared, so nothing is decoded
    return Session(
        plan=plan_of([Assignment(treatments={})], [Phase(low=-99.0, high=99.0, cycle=(0,))]),
        full=full,
        programs=(full,),
        scheduler=extract_all(make_scheduler(scheduler, model.scheduler_config), scheduler, [steps]),
        sample_shape=model.sample_shape,
        steps=steps,
        predicted_channels=prepared.gated.predicted_channels,
        calls=model.calls,
        decoder=decoder,
    )


def noise(height: int = 16, width: int = 16) -> Array:
    return np.random.default_rng(0).standard_normal((2, 4, height, width), dtype=np.float32)


def run(folder: Path, latents: Array, **arguments: Any) -> Array:
    """Sample with the pipeline itself."""
    index = json.loads((folder / "model_index.json").read_text())
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        PROMPTS, num_inference_steps=STEPS, latents=torch.from_numpy(latents), output_type="latent", **arguments
    )
    images: Array = result.images.numpy()
    return images


def assert_same(actual: Array, expected: Array) -> None:
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


def pictures(height: int = 32, width: int = 32) -> tuple[Array, Array]:
    return Images(seed=1).read(2, height, width), Images(seed=1).masks(2, height, width)


Save = Callable[[Path], Path]


@pytest.mark.parametrize(
    "save",
    [
        pytest.param(
            partial(save_stable_diffusion, kind="StableDiffusionInpaintPipeline", in_channels=9), id="inpainting"
        ),
        pytest.param(
            partial(save_stable_diffusion_xl, kind="StableDiffusionXLInpaintPipeline", in_channels=9),
            id="inpainting-xl",
        ),
    ],
)
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_inpainting_with_nine_channels_equals_the_pipeline(save: Save, scale: float, tmp_path: Path) -> None:
    folder = save(tmp_path / "pipeline")
    model, (images, masks) = find_model(str(folder)), pictures()
    seeds = [seed_of(5, index) for index in range(2)]
    expected = run(
        folder,
        noise(),
        image=torch.from_numpy(images),
        mask_image=torch.from_numpy(masks),
        height=32,
        width=32,
        strength=1.0,
        guidance_scale=scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    )
    conditions = model.encode(PROMPTS, scale)
    vae = autoencoder_of(model)
    assert conditions.own[EXTRA_CHANNELS].shape == (2, 5, 16, 16)
    assert conditions.guided == (scale > 1)
    assert any("drawn images" in note for note in conditions.notes)
    extra = {EXTRA_CHANNELS: encode_for_inpainting(vae, images, masks, seed=5)}
    own = Conditions(
        own={**conditions.own, **extra},
        negative={**conditions.negative, **extra} if scale > 1 else {},
        scale=conditions.scale,
        size=conditions.size,
    )
    session = session_of(model, tmp_path)
    assert_same(session.sample(noise=noise(), conditions=own, latents=True), expected)
    other = session.sample(noise=noise(), conditions=conditions, latents=True)  # other images
    assert np.abs(other - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize(("scale", "image_scale"), [(3.0, 1.5), (3.0, 0.5), (1.0, 1.5)])
def test_three_way_guidance_equals_the_pipeline(scale: float, image_scale: float, tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "pipeline", kind="StableDiffusionInstructPix2PixPipeline", in_channels=8)
    model, (images, _) = find_model(str(folder)), pictures()
    expected = run(
        folder,
        noise(),
        image=torch.from_numpy(images),
        guidance_scale=scale,
        image_guidance_scale=image_scale,
    )
    conditions = model.encode(PROMPTS, scale)
    assert conditions.rows_per_sample == (3 if scale > 1 else 1)
    text = Conditions(
        own={name: value for name, value in conditions.own.items() if name != EXTRA_CHANNELS},
        negative={name: value for name, value in conditions.negative.items() if name != EXTRA_CHANNELS},
        scale=conditions.scale,
    )
    own = edit(text, encode_for_editing(autoencoder_of(model), images), image_scale)
    assert_same(session_of(model, tmp_path).sample(noise=noise(), conditions=own, latents=True), expected)


def test_the_guidance_scale_of_an_lcm_is_an_input(tmp_path: Path) -> None:
    for kind in ("LatentConsistencyModelPipeline", "StableDiffusionPipeline"):  # D4
        folder = save_stable_diffusion(tmp_path / kind / "pipeline", time_cond_proj_dim=8)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
        model = find_model(str(folder))
        session = session_of(model, tmp_path)
        index["_class_name"] = "StableDiffusionPipeline"  # LCM's own pipeline adds timesteps of its scheduler
        (folder / "model_index.json").write_text(json.dumps(index))
        for scale in (8.5, 1.0, 0.0):
            conditions = model.encode(PROMPTS, scale)
            assert conditions.own[TIMESTEP_COND].shape == (2, 8)
            assert not conditions.guided
            actual = session.sample(noise=noise(), conditions=conditions, latents=True)
            assert_same(actual, run(folder, noise(), guidance_scale=scale))


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_an_lcm_samples_like_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The noise of every step, the guidance as an input, and the pipeline's own timesteps, in both places (D4)."""
    folder = save_stable_diffusion(tmp_path / "pipeline", time_cond_proj_dim=8)
    diffusers.LCMScheduler(clip_sample=False, beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "LatentConsistencyModelPipeline", "scheduler": ["diffusers", "LCMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    model = find_model(str(folder))
    session = session_of(model, tmp_path, steps, "lcm")
    original = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    dropin = BundleUNet(session, "UNet2DConditionModel", original.config, full_model=True)
    shape, seed = session.sample_shape, 5

    def images(unet: Any, scale: float) -> Array:
        pipeline = diffusers.LatentConsistencyModelPipeline.from_pretrained(folder, unet=unet)
        pipeline.set_progress_bar_config(disable=True)
        drawn = (torch.from_numpy(step_noise(seed, range(2), step, shape)) for step in range(steps))
        monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(drawn))
        result = pipeline(
            PROMPTS,
            num_inference_steps=steps,
            guidance_scale=scale,
            latents=torch.from_numpy(initial_noise(seed, range(2), shape)),
            output_type="latent",
        )
        latents: Array = result.images.numpy()
        return latents

    for scale in (8.5, 1.0):
        expected = images(original, scale)
        assert_same(images(dropin, scale), expected)
        assert_same(session.sample(2, seed=seed, conditions=model.encode(PROMPTS, scale), latents=True), expected)


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_encodes_the_empty_prompt_as_its_settings_say(zeros: bool, tmp_path: Path) -> None:
    folder = save_stable_diffusion_xl(tmp_path / "pipeline", force_zeros_for_empty_prompt=zeros)
    model = find_model(str(folder))
    conditions = model.encode(PROMPTS, 3.0)
    assert bool(conditions.negative["text_embeds"].any()) != zeros
    actual = session_of(model, tmp_path).sample(noise=noise(), conditions=conditions, latents=True)
    assert_same(actual, run(folder, noise(), guidance_scale=3.0, height=32, width=32))


def test_size_numbers_follow_the_size_of_the_request(tmp_path: Path) -> None:
    folder = save_stable_diffusion_xl(tmp_path / "pipeline")
    model = find_model(str(folder))
    session = session_of(model, tmp_path)
    session.conditions = model.encode(PROMPTS, 3.0)
    expected = run(folder, noise(24, 20), guidance_scale=3.0, height=48, width=40)
    for conditions in (None, session.conditions):  # the bundle's, and the user's
        actual = session.sample(noise=noise(24, 20), conditions=conditions, latents=True)
        assert_same(actual, expected)
    drawn = session.sample(2, height=48, width=40, latents=True)
    assert drawn.shape == (2, 4, 24, 20)
    chosen = session.conditions.for_size(48, 40).own[TIME_IDS]
    np.testing.assert_array_equal(chosen, [[48, 40, 0, 0, 48, 40]] * 2)
    fixed = session.conditions.with_sizes((64, 50), (3, 5), (30, 40))
    chosen_by_user = run(
        folder,
        noise(24, 20),
        guidance_scale=3.0,
        height=48,
        width=40,
        original_size=(64, 50),
        crops_coords_top_left=(3, 5),
        target_size=(30, 40),
        negative_original_size=(64, 50),
        negative_crops_coords_top_left=(3, 5),
        negative_target_size=(30, 40),
    )
    assert_same(session.sample(noise=noise(24, 20), conditions=fixed, latents=True), chosen_by_user)
    assert np.abs(chosen_by_user - expected).max() > 100 * TOLERANCE
    wide = {name: np.concatenate([value, value], axis=-1) for name, value in session.conditions.own.items()}
    with pytest.raises(ShapeMismatch, match=r"encoder_hidden_states has shape \[2, 6, 64\]; expected \[2, 6, 32\]"):
        session.sample(2, conditions=Conditions(own=wide))  # D5
    with pytest.raises(ShapeMismatch, match="needs encoder_hidden_states"):
        session.sample(2, conditions=Conditions())
    for side in ({"height": 47}, {"width": 0}):
        with pytest.raises(ShapeMismatch, match="Expected a multiple of 2"):
            session.sample(**side)  # type: ignore[arg-type]


def test_sdxl_refiner_gets_aesthetic_scores(tmp_path: Path) -> None:  # D4
    folder = save_stable_diffusion_xl(tmp_path / "pipeline", kind="StableDiffusionXLImg2ImgPipeline", refiner=True)
    model = find_model(str(folder))
    conditions = model.encode(PROMPTS, 3.0)
    np.testing.assert_array_equal(conditions.own[TIME_IDS], [[32, 32, 0, 0, 6]] * 2)
    np.testing.assert_array_equal(conditions.negative[TIME_IDS], [[32, 32, 0, 0, 2.5]] * 2)
    np.testing.assert_array_equal(conditions.for_size(48, 40).own[TIME_IDS], [[48, 40, 0, 0, 6]] * 2)
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(folder)
    session = session_of(model, tmp_path)
    seen: list[Any] = []

    def record(unet: Any, given: Any, named: Any, output: Any) -> None:
        seen.append((given, named, output))

    hook = pipeline.unet.register_forward_hook(record, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        PROMPTS,
        image=torch.from_numpy(pictures()[0]),
        num_inference_steps=STEPS,
        strength=0.9,
        guidance_scale=3.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    hook.remove()
    assert len(seen) > 1
    for (sample, timestep), named, output in seen:
        rollout = session.rollout(full_model=True)
        guided = rollout.predict(sample[:2].numpy(), float(timestep), 0.0, conditions)
        negative, own = (half.numpy() for half in output[0].chunk(2))
        assert_same(guided, negative + 3.0 * (own - negative))
        assert named["added_cond_kwargs"]["time_ids"].shape == (4, 5)


@torch.no_grad()
def test_class_labels_are_conditions(tmp_path: Path) -> None:  # C4
    model = find_model(str(save_classes(tmp_path / "pipeline", num_class_embeds=10)))
    assert sorted(map(int, model.prompts())) == list(range(10))
    session, unet = session_of(model, tmp_path), model.load_denoiser()
    conditions = model.encode(["7", "3"], 1.0)
    latents = np.random.default_rng(0).standard_normal((2, 1, 16, 16), dtype=np.float32)
    scheduler: Any = make_scheduler("ddim", model.scheduler_config)
    scheduler.set_timesteps(STEPS)
    sample = torch.from_numpy(latents)
    for timestep in scheduler.timesteps:
        predicted = unet(sample, timestep, class_labels=torch.tensor([7, 3])).sample
        sample = scheduler.step(predicted, timestep, sample).prev_sample
    assert_same(session.sample(noise=latents, conditions=conditions, latents=True), sample.numpy())
    with pytest.raises(ModelError, match="none of its labels means no class"):
        model.encode(["7"], 2.0)
    for wrong, message in (("10", "from 0 to 9"), ("a cat", "from 0 to 9: pass them with --labels"), ("-1", "0 to 9")):
        with pytest.raises(ModelError, match=message):
            model.encode([wrong], 1.0)
    for labels in ([10, 0], [-1, 0], [0.5, 1]):  # a negative one would silently count from the end
        with pytest.raises(ShapeMismatch, match="class_labels are"):
            session.sample(noise=latents, conditions=Conditions(own={CLASS_LABELS: np.array(labels)}))


@torch.no_grad()
def test_classes_with_names_are_guided(tmp_path: Path) -> None:
    """Guidance moves samples away from the label that means no class, as in the loop of a user of diffusers."""
    folder = save_classes(tmp_path / "pipeline", num_class_embeds=4)
    (folder / LABELS).write_text('{"names": ["cat", "dog", "T-shirt/top"], "no_class": 1}')
    model = find_model(str(folder))
    assert sorted(model.prompts()) == ["T-shirt/top", "cat", "dog"]
    assert model.encode(["CAT", "dog", "t-shirt/top"], 1.0).own[CLASS_LABELS].tolist() == [0, 2, 3]
    session, unet = session_of(model, tmp_path), model.load_denoiser()
    latents = np.random.default_rng(0).standard_normal((2, 1, 16, 16), dtype=np.float32)
    scheduler: Any = make_scheduler("ddim", model.scheduler_config)
    scheduler.set_timesteps(STEPS)
    sample = torch.from_numpy(latents)
    for timestep in scheduler.timesteps:
        negative = unet(sample, timestep, class_labels=torch.tensor([1, 1])).sample
        own = unet(sample, timestep, class_labels=torch.tensor([2, 3])).sample
        sample = scheduler.step(negative + 3.0 * (own - negative), timestep, sample).prev_sample
    conditions = session.encode_labels(["dog", 3], 3.0)
    assert_same(session.sample(noise=latents, conditions=conditions, latents=True), sample.numpy())
    assert_same(session.sample(noise=latents, conditions=model.encode(["2", "3"], 3.0), latents=True), sample.numpy())
    dropin, current = BundleUNet(session, "UNet2DModel", unet.config), torch.from_numpy(latents)
    for timestep in scheduler.timesteps:
        both = dropin(torch.cat([current] * 2), timestep, class_labels=torch.tensor([1, 1, 2, 3])).sample
        negative, own = both.chunk(2)
        current = scheduler.step(negative + 3.0 * (own - negative), timestep, current).prev_sample
    assert_same(current.numpy(), sample.numpy())


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_labels_that_no_pipeline_gives_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    folder = save_classes(tmp_path / "pipeline", class_embed_type=kind)
    with pytest.raises(ModelError, match="needs class_labels, which a DDPMPipeline does not give it"):
        find_model(str(folder))


def test_a_pipeline_that_does_not_fit_its_unet_is_refused_with_the_one_that_does(tmp_path: Path) -> None:  # D5
    folder = save_stable_diffusion(tmp_path / "pipeline", in_channels=9)
    with pytest.raises(ModelError, match=r"takes 9 channels.*gives it 4\. A StableDiffusionInpaintPipeline gives it 9"):
        find_model(str(folder))
    ordinary = find_model(str(save_stable_diffusion(tmp_path / "other", kind="StableDiffusionInpaintPipeline")))
    with pytest.raises(ModelError, match="takes no images"):
        ordinary.encode(PROMPTS, 1.0, images=Images(folder=tmp_path))


def test_an_inpainting_pipeline_with_four_channels_is_ordinary(tmp_path: Path) -> None:
    folder = save_stable_diffusion(tmp_path / "pipeline", kind="StableDiffusionInpaintPipeline")
    model = find_model(str(folder))
    assert EXTRA_CHANNELS not in model.calls.names
    assert EXTRA_CHANNELS not in model.encode(PROMPTS, 3.0).own


def test_words_that_a_prompt_loses_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # G2
    for save in (save_stable_diffusion, save_stable_diffusion_xl):
        model = find_model(str(save(tmp_path / save.__name__ / "pipeline")))
        (note,) = model.encode(["a large red circle", "a red square a blue circle"], 1.0).notes
        assert "is cut at 6 tokens; lost: 'blue circle'" in note
        assert f"{note}." in caplog.messages


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_guidance_up_to_one_is_none(scale: float, tmp_path: Path) -> None:  # G1
    folder = save_stable_diffusion(tmp_path / "pipeline")
    model = find_model(str(folder))
    conditions = model.encode(PROMPTS, scale)
    assert conditions.rows_per_sample == 1
    for steps in (1, 2, 4, 8):
        session = session_of(model, tmp_path, steps)
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        expected = pipeline(
            PROMPTS,
            num_inference_steps=steps,
            guidance_scale=scale,
            latents=torch.from_numpy(noise()),
            output_type="latent",
        ).images.numpy()
        assert_same(session.sample(noise=noise(), conditions=conditions, latents=True), expected)


def test_encoders_that_do_not_fit_the_unet_are_refused_before_any_capture(tmp_path: Path) -> None:
    folder = save_stable_diffusion_xl(tmp_path / "pipeline", kind="StableDiffusionXLImg2ImgPipeline", refiner=True)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "requires_aesthetics_score": False}))
    with pytest.raises(
        ModelError, match=r"do not fit its denoiser: text_embeds has shape \[2, 16\]; expected \[2, 8\]"
    ):
        find_model(str(folder)).encode(PROMPTS, 3.0)

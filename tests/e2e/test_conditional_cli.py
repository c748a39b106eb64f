"""The command line with models that take prompts: GLIDE from its checkpoint, Stable Diffusion with a ControlNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import unetc
import unetc.diffusers
from tests.adm_twin import Form, adm_twin
from tests.command import run
from tests.glide_twin import SHAPES, small, tokens_of, twin
from tests.models import condition_well
from tests.pipelines import PROMPTS, save_classes, save_stable_diffusion
from unetc.artifacts import Phase, Plan, Prediction, Profile
from unetc.compiler.planner.emissions import with_emissions
from unetc.models.glide import LOW_RES
from unetc.treatments import Treatment

diffusers: Any = untyped_diffusers

pytestmark = pytest.mark.nightly

SMALL = ("--steps", 4, "--samples", 1, "--bins", 2, "--batch", 2, "--threads", 1, "--screen-only")
FEW = ("--components", "down_blocks.0.*")
"""Only these components are timed and ablated; all of them would take minutes."""


def plan_by_hand(path: Path) -> Path:
    """Plan to hold a residual branch at every other step of the second half, independent of any timing."""
    profile = Profile.load(path)
    noisy, clean = profile.bins
    name = next(component.name for component in profile.components if component.kind == "residual")
    plan = Plan(
        unetc=unetc.__version__,
        model=profile.model,
        profile_sha256=profile.sha256(),
        budget=0.0,
        max_engines=1,
        engines=with_emissions([{}, {name: Treatment.HOLD}], profile.components),
        phases=(
            Phase(low=noisy.low, high=noisy.high, cycle=(0,)),
            Phase(low=clean.low, high=clean.high, cycle=(0, 1)),
        ),
        prediction=Prediction(time_ratio=1.0, relative_l2=0.0, memory=2.0),
    )
    plan.save(path.with_name("plan.json"))
    return path.with_name("plan.json")


def go(model: object, folder: Path, *options: object) -> None:
    """Analyse, plan by hand and build."""
    profile, cache = folder / "profile.json", ("--cache", folder / "cache")
    analyzed = run("analyze", model, *SMALL, *FEW, *options, *cache, "-o", profile, "--json")
    assert analyzed.code == 0, analyzed.err
    plan = plan_by_hand(profile)
    weights = options[:2] if "--weights" in options else ()
    built = run(
        *("build", model, *weights, "--profile", profile, "--plan", plan),
        *("--steps", 4, *cache, "-o", folder / "bundle", "--json"),
    )
    assert built.code == 0, built.err
    assert unetc.load(folder / "bundle").plan.phases[1].cycle == (0, 1)


@pytest.mark.parametrize("name", SHAPES)
def test_glide_from_its_checkpoint_to_pictures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a reduced model, and a stand-in for OpenAI's tokenizer, which no registry offers."""
    for module in ("unetc.models.glide", "unetc.models.find"):
        monkeypatch.setattr(f"{module}.VARIANTS", {name: small(name)})
    monkeypatch.setattr("unetc.models.glide.tokenize", tokens_of)
    monkeypatch.setattr("unetc.models.glide.cut_prompts", lambda texts, length: ())
    monkeypatch.setattr("unetc.compiler.prepare.STEP_COUNTS", (4,))  # the other tables are not used
    torch.save(twin(name).state_dict(), tmp_path / "weights.pt")
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    low_res = np.random.default_rng(0).uniform(-1, 1, (4, 3, 4, 4)).astype(np.float32)
    np.save(tmp_path / LOW_RES, low_res)
    go(name, tmp_path, "--weights", tmp_path / "weights.pt")
    sampled = run("sample", tmp_path / "bundle", "--batch", 2, "-o", tmp_path / "samples.png")
    assert sampled.code == 0, sampled.err
    with Image.open(tmp_path / "samples.png") as picture:
        assert len(set(picture.convert("L").tobytes())) > 10
    session = unetc.load(tmp_path / "bundle")
    assert set(session.schedule(4)) == {0, 1}
    planned, full = session.sample(2, seed=1), session.sample(2, seed=1, full_model=True)
    assert np.isfinite(planned).all()
    assert np.abs(planned - full).max() > 0


def test_a_checkpoint_of_guided_diffusion_to_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unetc.compiler.prepare.STEP_COUNTS", (4,))
    form = Form(head_channels=16, out_channels=6, classes=10)
    torch.save(adm_twin(form).state_dict(), tmp_path / "model.pt")
    name = "adm:image_size=16,num_head_channels=16"
    go(name, tmp_path, "--weights", tmp_path / "model.pt")
    for labels in ("3", "5,5"):
        sampled = run("sample", tmp_path / "bundle", "--batch", 2, "--labels", labels, "-o", tmp_path / f"{labels}.png")
        assert sampled.code == 0, sampled.err
    assert (tmp_path / "3.png").read_bytes() != (tmp_path / "5,5.png").read_bytes()
    verified = run("verify", tmp_path / "bundle", "--rounds", 1, "--json")
    assert verified.code == 0, verified.err
    wrong = ("analyze", "adm:image_size=16,num_head_channels=24", "--weights", tmp_path / "model.pt")
    assert "cannot have heads of 24 channels" in run(*wrong).error
    assert "Pass it with --weights" in run("analyze", name).error


def test_classes_from_the_model_to_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # C4
    monkeypatch.setattr("unetc.compiler.prepare.STEP_COUNTS", (4,))
    model = save_classes(tmp_path / "pipeline", num_class_embeds=10)
    go(model, tmp_path)
    facts = Profile.load(tmp_path / "profile.json")
    assert sorted(map(int, facts.prompts)) == list(range(10))
    assert facts.used_prompts == 8
    for labels in ("3", "5,5"):
        sampled = run("sample", tmp_path / "bundle", "--batch", 2, "--labels", labels, "-o", tmp_path / f"{labels}.png")
        assert sampled.code == 0, sampled.err
    assert (tmp_path / "3.png").read_bytes() != (tmp_path / "5,5.png").read_bytes()
    verified = run("verify", tmp_path / "bundle", "--rounds", 1, "--json")
    assert verified.code == 0, verified.err
    assert "from 0 to 9" in run("sample", tmp_path / "bundle", "--labels", "10").error
    assert "Expected whole numbers from 0 to 9" in run("analyze", model, "--labels", "cat").error
    assert "takes labels of its 10 classes" in run("analyze", model, "--prompts", _file(tmp_path, "a cat")).error


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_guidance_that_the_scheduler_would_turn_round_is_noted(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unetc.compiler.prepare.STEP_COUNTS", (2,))
    model = save_classes(tmp_path / "pipeline", num_class_embeds=3)
    (model / "labels.json").write_text('{"no_class": 2}')
    short = ("--steps", 2, "--samples", 1, "--bins", 1, "--batch", 1, "--threads", 1, "--screen-only")
    for scale, expected in (("1", False), ("2", scheduler == "ddim")):
        made = run(
            *("analyze", model, "--scheduler", scheduler, *short, "--components", "mid_block.*"),
            *("--guidance-scale", scale, "-o", tmp_path / "profile.json", "--cache", tmp_path / "cache"),
        )
        assert made.code == 0, made.err
        notes = Profile.load(tmp_path / "profile.json").notes or ()
        assert any("Set clip_sample to false" in note for note in notes) == expected


def _file(folder: Path, text: str) -> Path:
    path = folder / "text.txt"
    path.write_text(text)
    return path


def test_inpainting_is_measured_on_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unetc.compiler.prepare.STEP_COUNTS", (4,))
    model = save_stable_diffusion(tmp_path / "pipeline", kind="StableDiffusionInpaintPipeline", in_channels=9)
    images = tmp_path / "images"
    images.mkdir()
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (40, 50), colour).save(images / f"{i}.png")
    go(model, tmp_path, "--images", images)
    profile = Profile.load(tmp_path / "profile.json")
    assert profile.images
    assert profile.images.folder == str(images)
    assert not profile.notes
    session = unetc.load(tmp_path / "bundle")
    assert session.conditions.own["extra_channels"].shape == (4, 5, 16, 16)
    Image.new("RGB", (40, 50), "green").save(images / "0.png")
    built = run("build", model, "--profile", tmp_path / "profile.json", "--steps", 4, "-o", tmp_path / "other")
    assert "have changed since the analysis" in built.error
    drawn = run("analyze", model, *SMALL, *FEW, "--cache", tmp_path / "cache", "-o", tmp_path / "drawn.json", "--json")
    assert any("drawn images" in note for note in drawn.json["notes"])
    assert "note: the damage was measured on drawn images" in run("inspect", tmp_path / "drawn.json").out
    digits = run("analyze", "digits", "--images", images)
    assert "digits takes no images" in digits.error


def test_turbo_settings_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # G1
    monkeypatch.setattr("unetc.compiler.prepare.STEP_COUNTS", (1,))
    model = save_stable_diffusion(tmp_path / "pipeline")
    built = run(
        *("build", model, "--steps", 1, "--guidance-scale", 0, "--budget", 0, "--repair", 0, "--no-controls"),
        *("--samples", 1, "--batch", 1, "--threads", 1),
        *("--cache", tmp_path / "cache", "-o", tmp_path / "bundle", "--json"),
    )
    assert built.code == 0, built.err
    session = unetc.load(tmp_path / "bundle")
    assert session.conditions.rows_per_sample == 1
    assert np.isfinite(session.sample(1)).all()


def test_a_controlnet_is_requested_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unetc.compiler.prepare.STEP_COUNTS", (4, 500))
    go(save_stable_diffusion(tmp_path / "pipeline"), tmp_path, "--controlnet")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None)
    controlnet = diffusers.ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16))
    condition_well(controlnet, seed=4)  # a fresh ControlNet adds nothing
    controlled = diffusers.StableDiffusionControlNetPipeline(**pipeline.components, controlnet=controlnet.eval())
    controlled.set_progress_bar_config(disable=True)

    def images() -> Any:
        return controlled(
            "a red square",
            image=torch.full((1, 3, 32, 32), 0.5),
            latents=torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
            num_inference_steps=4,
            output_type="np",
        ).images

    expected = images()
    controlled.unet = unetc.diffusers.load(tmp_path / "bundle", full_model=True)
    np.testing.assert_allclose(images(), expected, atol=1e-3)  # two runtimes, four steps and a decoder

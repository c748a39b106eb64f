"""Damage is measured with control images where engines take a ControlNet, and artifacts say what it was measured on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

import unetc
from tests.models import condition_well, relative_error
from tests.pipelines import save_stable_diffusion
from tests.plans import plan_of
from unetc.analyzer.analysis import AnalysisOptions
from unetc.artifacts import Phase
from unetc.artifacts.profile import Profile
from unetc.artifacts.scope import control_scope, damage_scope
from unetc.cli.summary import bundle_facts, profile_facts
from unetc.compiler.engines import compile_full
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.prepare import prepare, prepare_scheduler
from unetc.compiler.search.set_up import set_up
from unetc.errors import ModelError, ProfileError
from unetc.models.control_images import ControlSource
from unetc.models.find import ModelSource, find_model
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.session import Session

diffusers: Any = untyped_diffusers

STEPS = 4


@dataclass(frozen=True, kw_only=True)
class Folders:
    """A pipeline, a ControlNet for it and control images, and the pipeline of diffusers with both."""

    pipeline: Path
    control: ControlSource
    cache: Path

    @property
    def source(self) -> ModelSource:
        return ModelSource(str(self.pipeline), control=self.control)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("control")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        save_stable_diffusion(folder / "pipeline"), safety_checker=None
    )
    controlnet = diffusers.ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16))
    condition_well(controlnet, seed=4)  # a fresh ControlNet adds nothing
    controlnet.save_pretrained(folder / "controlnet")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        pixels = rng.integers(0, 256, (40, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    control = ControlSource(model=folder / "controlnet", images=folder / "images")
    return Folders(pipeline=folder / "pipeline", control=control, cache=folder / "cache")


@pytest.fixture(autouse=True)
def few_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unetc.compiler.prepare.STEP_COUNTS", (STEPS,))


# E1
@pytest.mark.nightly
def test_a_call_gets_what_the_controlnet_of_diffusers_computes_at_every_step(folders: Folders) -> None:
    model = find_model(folders.source)
    prepared = prepare(model, folders.cache)
    conditions = model.encode(("a red square", "a blue circle"), 3.0)
    backend = open_backend("onnxruntime:cpu", threads=1)
    full = backend.open_weights(prepared.gated.weights.read_bytes()).load(compile_full(prepared.gated))
    session = Session(
        plan=plan_of(with_emissions([{}], prepared.gated.components), [Phase(low=-20.0, high=20.0, cycle=(0,))]),
        full=full,
        programs=[full],
        scheduler=prepare_scheduler(model, "ddim", (STEPS,)),
        sample_shape=model.sample_shape,
        steps=STEPS,
        conditions=conditions,
        device=backend.device,
    )
    noise = np.random.default_rng(3).standard_normal((3, *model.sample_shape), dtype=np.float32)
    sampled = session.sample(noise=noise, full_model=True)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folders.pipeline, safety_checker=None)
    controlled = diffusers.StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=diffusers.ControlNetModel.from_pretrained(folders.control.model)
    )
    controlled.set_progress_bar_config(disable=True)
    images = [Image.open(path) for path in sorted(folders.control.images.iterdir())]
    for i in range(3):  # the third sample has the first prompt and the first image again
        expected = controlled(
            ("a red square", "a blue circle")[i % 2],
            image=images[i % 2],
            height=32,
            width=32,
            latents=torch.from_numpy(noise[i : i + 1]),
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            output_type="latent",
        ).images.numpy()
        assert relative_error(sampled[i : i + 1], expected) < 1e-4
    without = session.sample(noise=noise, full_model=True, conditions=replace(conditions, control=None).take(range(3)))
    assert relative_error(without, sampled) > 0.01


def test_a_controlnet_that_pools_is_used_as_in_its_pipeline(folders: Folders, tmp_path: Path) -> None:
    """The pipelines of diffusers give such a ControlNet the rows with the prompts alone; the others get zeros."""
    folder = Path(shutil.copytree(folders.control.model, tmp_path / "pooling"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"global_pool_conditions": True}))
    model = find_model(replace(folders.source, control=replace(folders.control, model=folder)))
    assert model.control is not None
    assert model.calls.controlnet
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folders.pipeline, safety_checker=None)
    controlled = diffusers.StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=diffusers.ControlNetModel.from_pretrained(folder)
    )
    controlled.set_progress_bar_config(disable=True)
    seen: dict[str, Any] = {}
    forward = controlled.unet.forward

    def spy(sample: torch.Tensor, timestep: torch.Tensor, **given: Any) -> Any:
        seen.update(given, sample=sample, timestep=timestep)
        return forward(sample, timestep, **given)

    controlled.unet.forward = spy
    image = Image.open(sorted(folders.control.images.iterdir())[0])
    controlled(
        "a red square",
        image=image,
        height=32,
        width=32,
        num_inference_steps=1,
        guidance_scale=3.0,
        output_type="latent",
    )
    conditions = model.encode(("a red square",), 3.0)
    inputs = conditions.varying(seen["sample"][:1].numpy(), float(seen["timestep"]))
    for one, value in zip(
        model.calls.controlnet,
        (*seen["down_block_additional_residuals"], seen["mid_block_additional_residual"]),
        strict=True,
    ):
        expected = value.expand(one.shape(2, 16, 16)).numpy()
        assert not expected[0].any()
        np.testing.assert_allclose(inputs[one.name], expected, atol=1e-5)


OPTIONS = AnalysisOptions(
    steps=STEPS, samples=1, bins=1, batch=2, threads=1, rounds=2, components=("skip:*",), decisive=1
)


def analyse(folders: Folders, source: ModelSource) -> Profile:
    return unetc.analyze(source, OPTIONS, cache=folders.cache)


@pytest.fixture(scope="module")
def profiles(folders: Folders) -> tuple[Profile, Profile]:
    """Analyse with control images and with zeros."""
    return analyse(folders, folders.source), analyse(folders, ModelSource(str(folders.pipeline), controlnet=True))


@pytest.mark.nightly
def test_damage_is_measured_with_the_images(folders: Folders, profiles: tuple[Profile, Profile]) -> None:
    controlled, zeros = profiles
    assert controlled.model == zeros.model
    assert zeros.control is None
    assert controlled.control is not None
    assert controlled.control.images == 2
    assert {effect.relative_l2.mean for effect in controlled.effects if effect.measured}.isdisjoint(
        effect.relative_l2.mean for effect in zeros.effects
    )
    assert Profile.from_json(controlled.to_json(), "profile.json") == controlled
    assert profile_facts(controlled, Path("p.json"))["control"] == msgspec.to_builtins(controlled.control)


@pytest.mark.nightly
def test_a_bundle_says_what_its_damage_was_measured_on(
    folders: Folders, profiles: tuple[Profile, Profile], tmp_path: Path
) -> None:
    options = unetc.BuildOptions(plan=PlanOptions(budget=0.0), steps=STEPS, controls=False)
    plain = ModelSource(str(folders.pipeline), controlnet=True)
    for source, profile, words in zip(
        (folders.source, plain),
        profiles,
        ("2 control images", "without a control image: all ControlNet inputs were zero"),
        strict=True,
    ):
        path = tmp_path / str(profile.control is None)
        manifest = unetc.build(source, path, options, profile=profile, cache=folders.cache)
        assert words in manifest.notes[0]
        assert words in str(bundle_facts(manifest, path)["damage_holds_for"])
        assert manifest.control == profile.control
        unetc.load(path).sample(1, seed=0)  # a session needs no ControlNet
        assert unetc.verify(path, unetc.VerifyOptions(rounds=1, batch=1)).control is None


@pytest.mark.nightly
def test_a_profile_is_only_used_with_the_images_it_was_measured_with(
    folders: Folders, profiles: tuple[Profile, Profile], tmp_path: Path
) -> None:
    controlled, zeros = profiles
    model, plain = find_model(folders.source), find_model(ModelSource(str(folders.pipeline), controlnet=True))
    with (
        pytest.raises(ProfileError, match=r"2 control images .* and none are given"),
        set_up(plain, controlled, steps=STEPS, cache=folders.cache),
    ):
        pass
    with (
        pytest.raises(ProfileError, match="measured without a control image"),
        set_up(model, zeros, steps=STEPS, cache=folders.cache),
    ):
        pass
    shutil.copytree(folders.control.images, tmp_path / "images")
    (tmp_path / "images/1.png").unlink()
    fewer = replace(folders.source, control=replace(folders.control, images=tmp_path / "images"))
    with (
        pytest.raises(ProfileError, match="and other ones are given"),
        set_up(find_model(fewer), controlled, steps=STEPS, cache=folders.cache),
    ):
        pass


def test_controlnets_and_images_that_cannot_be_used_are_refused_by_name(folders: Folders, tmp_path: Path) -> None:
    def refused(match: str, **changes: Path) -> None:
        with pytest.raises(ModelError, match=match):
            find_model(replace(folders.source, control=replace(folders.control, **changes)))

    def changed(name: str, **changes: Any) -> Path:
        shutil.copytree(folders.control.model, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
        return tmp_path / name

    refused("cannot read .*config.json", model=tmp_path / "nowhere")
    refused("is a ControlNetUnionModel", model=changed("union", _class_name="ControlNetUnionModel"))
    refused("differ in cross_attention_dim", model=changed("wide", cross_attention_dim=768))
    refused("differ in block_out_channels", model=changed("deep", block_out_channels=[8, 16, 16]))
    refused("reads 4 channels", model=changed("four", conditioning_channels=4))
    pickled = changed("pickled")
    for path in pickled.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    refused("has no .safetensors weights", model=pickled)
    refused("channel_order 'xyz'", model=changed("order", controlnet_conditioning_channel_order="xyz"))
    refused("setting 'new'", model=changed("new", new=1))
    refused("size mismatch", model=changed("kernel", conditioning_embedding_out_channels=[8, 24]))
    refused("has no images", images=folders.control.model)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no picture")
    refused("cannot read the image .*a.png", images=tmp_path / "broken")
    with pytest.raises(ModelError, match=r"takes no ControlNet|ControlNet is supported with"):
        find_model(replace(folders.source, name="digits"))


def test_a_controlnet_is_read_as_diffusers_reads_it(folders: Folders, tmp_path: Path) -> None:
    """A variant alone is read; files that no ControlNet is read from change no hash."""
    model = find_model(folders.source)
    folder = tmp_path / "controlnet"
    shutil.copytree(folders.control.model, folder)
    (weights,) = folder.glob("*.safetensors")
    shutil.copy(weights, folder / "other.safetensors")
    weights.rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    other = find_model(replace(folders.source, control=replace(folders.control, model=folder)))
    assert model.control is not None
    assert other.control is not None
    assert other.control.measured.model_sha256 == model.control.measured.model_sha256
    sample = np.random.default_rng(0).standard_normal((1, *model.sample_shape), dtype=np.float32)
    inputs = {"sample": sample, "timestep": np.array([500]), **model.encode(("a",), 1.0).own}
    expected, actual = (one.control.take([0]).residuals(inputs) for one in (model, other))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value)


def test_control_images_are_turned_as_their_orientation_says(folders: Folders, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    model = find_model(replace(folders.source, control=replace(folders.control, images=tmp_path)))
    assert model.control is not None
    (image,) = model.control.images
    np.testing.assert_array_equal(np.round(image * 255), np.rot90(pixels, -1).transpose(2, 0, 1))


# D6
@pytest.mark.nightly
def test_the_scope_of_a_damage_names_its_start(profiles: tuple[Profile, Profile]) -> None:
    controlled, zeros = profiles
    for profile in profiles:
        assert "from pure noise over 50 steps; image to image" in damage_scope(profile.model, profile.control, 50)
    assert control_scope(msgspec.structs.replace(zeros.model, controlnet=False), None) is None
    assert control_scope(zeros.model, None) != control_scope(controlled.model, controlled.control)

"""A bundle takes any prompt and any image, without torch, and gives the images of diffusers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.command import run
from tests.quick_build import build_quickly
from tests.runtime.test_bundle import edit
from unetc.errors import SessionError, ShapeMismatch
from unetc.models.find import find_model
from unetc.runtime.batching.batcher import Batcher
from unetc.runtime.batching.request import FULL, SampleRequest
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session, load

diffusers: Any = untyped_diffusers

pytestmark = pytest.mark.nightly

STEPS, SCALE = 10, 4.0
PROMPT, NEGATIVE = "a thick seven", "a thin one"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = find_model("prompted-digits").folder  # type: ignore[attr-defined]
    return Path(shutil.copytree(source, tmp_path_factory.mktemp("free-prompts") / "model"))


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    path = folder.parent / "bundle"
    build_quickly(folder, path, folder.parent / "cache", steps=STEPS, scale=SCALE, decisive=1, budget=0.2, text=True)
    return path


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return load(bundle, threads=1)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    made = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None)
    made.scheduler = diffusers.DDIMScheduler.from_config(made.scheduler.config)
    made.set_progress_bar_config(disable=True)
    return made


def picture() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Draw an image of the bundle's size."""
    rows, columns = np.mgrid[-1:1:32j, -1:1:32j]
    image = np.where(abs(np.hypot(rows, columns) - 0.5) < 0.2, 1.0, -1.0)
    return np.repeat(image[None, None], 3, axis=1).astype(np.float32)


def test_any_prompt_gives_the_conditions_of_the_pipeline(folder: Path, session: Session) -> None:
    assert session.text is not None
    prompts = ["a thick seven", "something else entirely", ""]
    actual = session.text.encode(prompts, guidance_scale=2.0).to_arrays()
    for name, expected in find_model(str(folder)).encode(prompts, 2.0).to_arrays().items():
        np.testing.assert_allclose(actual[name], expected, atol=1e-5)


@pytest.mark.parametrize("strength", [0.25, 0.75, 1.0])
def test_image_to_image_equals_diffusers(session: Session, pipeline: Any, strength: float) -> None:
    assert session.text is not None
    image = session.encode(picture())
    noise = np.random.default_rng(0).standard_normal(image.shape, dtype=np.float32)
    conditions = session.text.encode([PROMPT], negative=[NEGATIVE], guidance_scale=SCALE)
    sampled = session.sample(image=image, strength=strength, noise=noise, conditions=conditions, full_model=True)
    begun = pipeline.scheduler
    begun.set_timesteps(STEPS)
    timesteps = begun.timesteps[STEPS - int(STEPS * strength) :]
    with torch.no_grad():
        mode = pipeline.vae.encode(torch.from_numpy(picture())).latent_dist.mode() * pipeline.vae.config.scaling_factor
    np.testing.assert_allclose(image, mode.numpy(), atol=1e-4)
    latents = begun.add_noise(mode, torch.from_numpy(noise), timesteps[:1])
    with pytest.MonkeyPatch.context() as patch:  # the noise and the mode in place of what the pipeline draws
        patch.setattr(pipeline, "prepare_latents", lambda *args, **options: latents)
        expected = pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            image=torch.from_numpy(picture()) / 2 + 0.5,
            strength=strength,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            output_type="np",
        ).images
    actual = np.clip(sampled / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_engines_start_from_images_too(session: Session) -> None:
    image = session.encode(picture())
    made: list[tuple[int, int]] = []
    session.sample(image=image, strength=0.5, on_step=lambda step: made.append((step.index, step.engine)))
    assert [index for index, _ in made] == [5, 6, 7, 8, 9]
    assert made[0][1] == 0, "no branch is there to be reused"
    close, far = (session.sample(image=image, strength=strength, latents=True) for strength in (0.1, 1.0))
    assert np.abs(close - image).mean() < np.abs(far - image).mean()


def test_samples_do_not_depend_on_their_batch(session: Session) -> None:
    image = np.repeat(session.encode(picture()), 3, axis=0)
    many = session.sample(image=image, strength=0.6, seed=3, latents=True)
    alone = session.sample(image=image[:1], strength=0.6, seed=3, first_index=2, latents=True)
    np.testing.assert_allclose(many[2:], alone, atol=1e-4)


def test_wrong_images_are_refused(session: Session) -> None:
    image = session.encode(picture())
    with pytest.raises(ShapeMismatch, match=r"the image has shape \(1, 3, 32, 32\); expected \[batch, 4, height"):
        session.sample(image=picture(), strength=0.5)
    with pytest.raises(ShapeMismatch, match="noise has shape"):
        session.sample(image=image, noise=np.zeros((2, *image.shape[1:]), np.float32))
    with pytest.raises(ShapeMismatch, match="another height or width"):
        session.sample(image=image, height=64, width=64)
    with pytest.raises(SessionError, match="no image is given"):
        session.sample(strength=0.5)
    with pytest.raises(SessionError, match=r"ddim: strength 0\.01 makes none of 10 steps"):
        session.sample(image=image, strength=0.01)


def test_the_batcher_starts_from_images(session: Session) -> None:
    image = np.repeat(session.encode(picture()), 2, axis=0)
    batcher = Batcher({"plan": session})
    try:
        requests = [
            SampleRequest(level=level, seed=seed, count=2, image=image, strength=strength)
            for level, seed, strength in ((FULL, 1, 0.5), ("plan", 2, 0.9), (FULL, 3, 0.1))
        ]
        results = [ticket.future.result(60) for ticket in [batcher.submit(request) for request in requests]]
        with pytest.raises(ShapeMismatch, match="for 3 images, and starts from 2"):
            batcher.submit(SampleRequest(count=3, image=image))
    finally:
        batcher.close()
    for request, result in zip(requests, results, strict=True):
        expected = session.sample(
            image=image, strength=request.strength, seed=request.seed, full_model=request.level == FULL
        )
        np.testing.assert_allclose(result.images, expected, atol=1e-4)
    assert [result.steps for result in results] == [5, 9, 1]


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers"):
            raise AssertionError(f"{name} is imported")
sys.meta_path.insert(0, Refuse())
from unetc.cli import main
sys.argv = ["unetc", *sys.argv[1:]]
main()
"""


def sampled(*options: object) -> dict[str, Any]:
    """Run `unetc sample` in a process that refuses to import torch."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "sample", *map(str, options), "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "notes": done.stderr}


def test_prompts_and_images_are_sampled_without_torch(bundle: Path, tmp_path: Path, session: Session) -> None:
    Image.fromarray((picture()[0].transpose(1, 2, 0) * 127.5 + 127.5).astype(np.uint8)).save(tmp_path / "in.png")
    asked = ("--prompt", PROMPT, "--negative-prompt", NEGATIVE, "--guidance-scale", 3.0, "--batch", 2, "--seed", 5)
    text = sampled(bundle, *asked, "-o", tmp_path / "text.png")
    from_image = sampled(
        bundle, *asked, "--prompt", "a b " * 20, "--image", tmp_path / "in.png", "-o", tmp_path / "image.png"
    )
    assert text["shape"] == from_image["shape"] == [2, 3, 32, 32]
    assert "is cut at 16 tokens" in from_image["notes"]
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("text.png", "image.png")]
    assert (pictures[0] != pictures[1]).any()


def test_the_files_are_part_of_the_bundle(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest.text is not None
    assert manifest.encoder is not None
    (encoder,) = manifest.text.encoders
    listed = {one.path for one in manifest.files}
    assert {encoder.graph, encoder.weights, encoder.tokenizer, manifest.encoder.graph} <= listed


def test_a_bundle_without_text_encoders_names_its_prompts(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    edit(copy, lambda manifest: manifest.update(text=None))
    assert load(copy, threads=1).text is None
    refused = run("sample", copy, "--prompt", PROMPT, "-o", tmp_path / "samples.png")
    assert refused.code == 1
    assert "has no text encoders, so it takes only the prompts that it was built with: '" in refused.err
    assert "Build it with --text" in refused.err

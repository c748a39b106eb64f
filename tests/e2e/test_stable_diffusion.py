"""From a text-conditioned pipeline to a bundle: the full model gives diffusers' images, and prompts stay separate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch

from tests.server.bundles import PROMPTED_STEPS, make_prompted_server
from unetc.analyzer.verify import VerifyOptions, verify
from unetc.conditions import Conditions
from unetc.errors import CorruptArtifactError, ModelError, ShapeMismatch
from unetc.models.find import find_model
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session, load

diffusers: Any = untyped_diffusers

STEPS = PROMPTED_STEPS
SCALE = 3.0
IMAGE_TOLERANCE = 1e-3
"""Largest difference between two images in -1..1: rounding of two runtimes over four steps and a decoder."""


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    return make_prompted_server(shared) / "model"


@pytest.fixture(scope="module")
def bundle(shared: Path) -> Path:
    return make_prompted_server(shared) / "bundle"


@pytest.fixture(scope="module")
def session(bundle: Path) -> Session:
    return load(bundle, threads=1)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def noise(batch: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).standard_normal((batch, 4, 16, 16), dtype=np.float32)


@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_the_full_model_equals_the_pipeline(folder: Path, session: Session, pipeline: Any, scale: float) -> None:
    prompts = ["a small circle", "a blue square"]
    latents = noise(2)
    expected = pipeline(
        prompts, num_inference_steps=STEPS, guidance_scale=scale, latents=torch.from_numpy(latents), output_type="pt"
    ).images.numpy()
    conditions = find_model(str(folder)).encode(prompts, scale)
    assert conditions.guided == (scale > 1)
    images = session.sample(noise=latents, conditions=conditions, full_model=True)
    np.testing.assert_allclose(np.clip(images, -1, 1), 2 * expected - 1, atol=IMAGE_TOLERANCE)


def test_the_plan_gives_another_image(session: Session) -> None:
    """Otherwise the tests here would compare the full model with itself."""
    assert set(session.schedule(STEPS)) != {0}
    assert np.abs(session.sample(2) - session.sample(2, full_model=True)).max() > 0


def test_prompts_and_guidance_matter(folder: Path, session: Session) -> None:
    model = find_model(str(folder))
    one, other = (model.encode([prompt], SCALE) for prompt in ("a red square", "a blue circle"))
    images = [session.sample(conditions=conditions) for conditions in (one, other, model.encode(["a red square"], 1.0))]
    assert np.abs(images[0] - images[1]).max() > IMAGE_TOLERANCE
    assert np.abs(images[0] - images[2]).max() > IMAGE_TOLERANCE


def test_a_batch_is_its_samples_one_by_one(session: Session) -> None:
    together = session.sample(3, seed=5)
    apart = [session.sample(seed=5, first_index=i) for i in range(3)]
    np.testing.assert_allclose(together, np.concatenate(apart), atol=IMAGE_TOLERANCE)


def test_latents_are_the_input_of_the_decoder(session: Session) -> None:
    latents = session.sample(2, latents=True)
    assert latents.shape == (2, 4, 16, 16)
    np.testing.assert_array_equal(session.decode(latents), session.sample(2))


def test_every_fourth_prompt_is_kept_for_verify(bundle: Path, folder: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest.conditioning is not None
    assert list(manifest.conditioning.prompts) == (folder / "prompts.txt").read_text().splitlines()
    assert manifest.conditioning.used == 3
    assert manifest.conditioning.guidance_scale == SCALE
    verification = verify(Bundle.open(bundle), VerifyOptions(rounds=2))
    assert verification.samples == 4
    assert 0 < verification.damage.relative_l2.mean < 1


def test_conditions_of_another_batch_are_refused(session: Session) -> None:
    assert session.conditions.rows == 4
    with pytest.raises(ShapeMismatch, match="conditions have 4 rows; expected one for each of 3 samples"):
        session.sample(3, conditions=session.conditions)


def test_conditions_that_do_not_belong_together_are_refused() -> None:
    rows = np.zeros((2, 3), np.float32)
    with pytest.raises(ShapeMismatch, match="different numbers of rows"):
        Conditions(own={"one": rows, "other": rows[:1]})
    with pytest.raises(ShapeMismatch, match="negative conditions have the shapes"):
        Conditions(own={"one": rows}, negative={"one": rows[:, :2]}, scale=2.0)


def test_a_model_without_prompts_refuses_them() -> None:
    with pytest.raises(ModelError, match="digits takes no prompts"):
        find_model("digits").encode(["a seven"], 1.0)


def test_a_damaged_conditions_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    path = copy / "conditions.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptArtifactError, match=r"conditions.safetensors has changed"):
        Bundle.open(copy)

"""From an uncommon folder to a bundle: oblong sizes, a variant in shards, and statistics of latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch

from tests.ground.test_models import edit
from tests.pipelines import save_stable_diffusion_xl
from tests.quick_build import build_quickly
from unetc.models.find import find_model
from unetc.runtime.session import Session, load

pytestmark = pytest.mark.nightly

diffusers: Any = untyped_diffusers

STEPS = 4
SCALE = 3.0
SHAPE = (4, 16, 24)
IMAGE_TOLERANCE = 1e-3
"""Largest difference between two images in -1..1: rounding of two runtimes over four steps and a decoder."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    plain = save_stable_diffusion_xl(folder / "plain")
    edit(plain / "unet/config.json", sample_size=SHAPE[1:])
    edit(plain / "vae/config.json", latents_mean=[0.3, -0.2, 0.1, 0.4], latents_std=[1.5, 0.7, 1.2, 0.9])
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(plain, dtype=torch.float16)
    pipeline.save_pretrained(folder / "oblong", variant="fp16", max_shard_size="20KB")
    (plain / "prompts.txt").rename(folder / "oblong/prompts.txt")
    return folder / "oblong"


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    bundle = folder.parent / "bundle"
    profile = build_quickly(folder, bundle, folder.parent / "cache", steps=STEPS, scale=SCALE, decisive=1, budget=0.1)
    assert profile.sample_shape == SHAPE
    return load(bundle, threads=1)


def test_images_equal_the_pipelines(folder: Path, session: Session) -> None:  # A2, C2
    prompts = ["a small circle", "a blue square"]
    latents = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
        folder, variant="fp16", dtype=torch.float32, add_watermarker=False
    )
    expected = pipeline(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        height=32,
        width=48,
        latents=torch.from_numpy(latents),
        output_type="pt",
    ).images.numpy()
    conditions = find_model(str(folder)).encode(prompts, SCALE)
    images = session.sample(noise=latents, conditions=conditions, full_model=True)
    assert images.shape == (2, 3, 32, 48)
    np.testing.assert_allclose(np.clip(images, -1, 1), 2 * expected - 1, atol=IMAGE_TOLERANCE)


def test_noise_has_the_size_of_the_folder(session: Session) -> None:
    assert session.sample_shape == SHAPE
    assert session.sample(2).shape == (2, 3, 32, 48)

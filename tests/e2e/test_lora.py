"""From a model with LoRAs to images, by the command line: the same images as diffusers with unfused LoRAs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unetc.diffusers
from tests.loras import load_unfused, save_lora
from tests.pipelines import save_stable_diffusion
from unetc.artifacts import Profile
from unetc.cli import main
from unetc.models.find import ModelSource, find_model
from unetc.models.lora import Lora
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import load

pytestmark = pytest.mark.nightly

STEPS = 6
SCALE = 3.0
SMALL = ("--steps", STEPS, "--samples", 2, "--bins", 2, "--batch", 2, "--threads", 1, "--guidance-scale", SCALE)
PROMPTS = ["a small circle", "a blue square"]
IMAGE_TOLERANCE = 1e-3
"""Largest difference between two images in -1..1: rounding of two runtimes over six steps and a decoder."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a pipeline with two LoRAs and build a bundle of it."""
    root = tmp_path_factory.mktemp("lora")
    save_stable_diffusion(root / "pipeline")
    save_lora(root / "pipeline", root / "style.safetensors", seed=0)
    save_lora(root / "pipeline", root / "other.safetensors", seed=1)
    profile = root / "profile.json"
    assert run("analyze", *model(root), *loras(root), *SMALL, "-o", profile) == 0
    assert run("build", *model(root), *loras(root), "--profile", profile, *OPTIONS, "-o", root / "bundle") == 0
    return root


OPTIONS = ("--budget", 0.0, "--steps", STEPS, "--repair", 0, "--no-controls")


def model(root: Path) -> tuple[object, ...]:
    return (root / "pipeline", "--cache", root / "cache")


def loras(root: Path) -> tuple[object, ...]:
    return ("--lora", f"{root}/style.safetensors:0.7", "--lora", f"{root}/other.safetensors:-0.5")


def run(*arguments: object) -> int:
    """Run a command in this process, which has already imported torch, and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["unetc", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
    return int(end.value.code or 0)


def unfused(root: Path) -> Any:
    return load_unfused(root / "pipeline", (root / "style.safetensors", 0.7), (root / "other.safetensors", -0.5))


def draw(pipeline: Any, latents: torch.Tensor) -> np.ndarray[Any, Any]:
    images: np.ndarray[Any, Any] = pipeline(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=SCALE, latents=latents, output_type="pt"
    ).images.numpy()
    return 2 * images - 1


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_full_model_of_a_bundle_equals_the_pipeline_with_its_loras(root: Path, latents: torch.Tensor) -> None:
    given = tuple(Lora.parse(str(text)) for text in loras(root)[1::2])
    conditions = find_model(ModelSource(str(root / "pipeline"), loras=given)).encode(PROMPTS, SCALE)
    session = load(root / "bundle", threads=1)
    images = np.clip(session.sample(noise=latents.numpy(), conditions=conditions, full_model=True), -1, 1)
    expected = draw(unfused(root), latents)
    np.testing.assert_allclose(images, expected, atol=IMAGE_TOLERANCE)
    plain = draw(load_unfused(root / "pipeline"), latents)
    assert np.abs(expected - plain).max() > 100 * IMAGE_TOLERANCE


def test_the_bundle_is_the_unet_of_a_pipeline_whose_loras_are_fused(root: Path, latents: torch.Tensor) -> None:
    pipeline = unfused(root)
    expected = draw(pipeline, latents)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.unet = unetc.diffusers.load(root / "bundle", full_model=True)
    np.testing.assert_allclose(draw(pipeline, latents), expected, atol=IMAGE_TOLERANCE)


def test_a_bundle_lists_its_loras(root: Path) -> None:
    given = (f"{root}/style.safetensors:0.7", f"{root}/other.safetensors:-0.5")
    assert Profile.load(root / "profile.json").model.loras == given
    assert Bundle.open(root / "bundle").manifest.model.loras == given


def test_a_profile_with_a_lora_does_not_fit_the_model_without(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", *model(root), "--profile", root / "profile.json", *OPTIONS, "-o", root / "other") == 1
    (message,) = capsys.readouterr().err.splitlines()
    given = f"{root}/style.safetensors:0.7 + {root}/other.safetensors:-0.5"
    assert f"the profile is of {root}/pipeline + {given} " in message
    assert f"not of {root}/pipeline (" in message

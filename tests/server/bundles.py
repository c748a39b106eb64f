"""A bundle with encoded prompts, guidance and a decoder, for tests of the server."""

from __future__ import annotations

from pathlib import Path

from tests.pipelines import save_stable_diffusion
from tests.quick_build import build_quickly

PROMPTED_STEPS = 4


def build_prompted_bundle(folder: Path) -> None:
    """Build a bundle of a tiny Stable Diffusion into `folder`/bundle."""
    folder.mkdir(parents=True)
    pipeline = save_stable_diffusion(folder / "model")
    build_quickly(pipeline, folder / "bundle", steps=PROMPTED_STEPS, scale=3.0, decisive=1, budget=0.1)

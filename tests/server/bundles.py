"""Small bundles with prompts or with classes, for tests of the server."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.pipelines import save_classes, save_stable_diffusion
from tests.quick_build import CAPTURES, build_quickly
from tests.tiny_build import once
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.repair import RepairOptions
from unetc.models.find import find_model

PROMPTED_STEPS = 4


def make_prompted_server(shared: Path) -> Path:
    """Build bundle/ of a tiny Stable Diffusion, once, into a folder of the shared one; return that folder."""
    return once(shared / "prompted-server", partial(_build_stable_diffusion, text=False))


def make_free_server(shared: Path) -> Path:
    """Build a bundle of the same kind, with text encoders and an encoder of images."""
    return once(shared / "free-server", partial(_build_stable_diffusion, text=True))


def _build_stable_diffusion(folder: Path, *, text: bool) -> None:
    folder.mkdir(parents=True)
    build_quickly(
        save_stable_diffusion(folder / "model"),
        folder / "bundle",
        folder.parent / CAPTURES,
        steps=PROMPTED_STEPS,
        scale=3.0,
        decisive=1,
        budget=0.1,
        text=text,
    )


def make_class_server(shared: Path) -> Path:
    """Build a bundle of a tiny model with ten classes; its only level is the full model again."""
    return once(shared / "classes-server", _build_classes)


def _build_classes(folder: Path) -> None:
    folder.mkdir(parents=True)
    analysis = AnalysisOptions(
        steps=PROMPTED_STEPS,
        samples=2,
        bins=1,
        batch=2,
        rounds=1,
        threads=1,
        components=("down_blocks.0.*",),
        decisive=0,
    )
    options = BuildOptions(
        plan=PlanOptions(budget=0.0), steps=PROMPTED_STEPS, repair=RepairOptions(evaluations=0), controls=False
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unetc.compiler.prepare.STEP_COUNTS", (PROMPTED_STEPS,))
        model = find_model(str(save_classes(folder / "model", num_class_embeds=10)))
        profile = analyze_model(model, analysis, cache=folder / "cache")
        build(model, profile, folder / "bundle", options, cache=folder / "cache")

"""A small analysis and build, for tests of later stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.artifacts import Profile
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.repair import RepairOptions
from unetc.models.find import find_model

CAPTURES = "captures"
"""Folder for the cache of quick builds, in the folder that all processes of a test run share."""


def build_quickly(
    folder: Path,
    bundle: Path,
    cache: Path,
    *,
    steps: int,
    scale: float,
    decisive: int,
    budget: float,
    text: bool = False,
) -> Profile:
    """Analyse and build a model with attention.

    Args:
        folder: Folder of the pipeline.
        bundle: Folder to write.
        cache: Folder of captures; builds of the same model share one.
        steps: Number of steps; no other number can be sampled.
        scale: Guidance scale.
        decisive: Ablations that are carried to the final output.
        budget: Share of the time to save.
        text: Whether the bundle gets the text encoders.

    Returns:
        The profile.
    """
    analysis = AnalysisOptions(
        steps=steps,
        samples=4,
        bins=2,
        batch=2,
        rounds=2,
        threads=1,
        decisive=decisive,
        guidance_scale=scale,
        components=("*.attentions.*",),  # enough for a plan, and faster to time and screen than all
    )
    options = BuildOptions(
        plan=PlanOptions(budget=budget),
        steps=steps,
        repair=RepairOptions(evaluations=0),
        controls=False,
        text=text,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unetc.compiler.prepare.STEP_COUNTS", (steps,))  # the other tables are not used
        model = find_model(str(folder))
        profile = analyze_model(model, analysis, cache=cache)
        build(model, profile, bundle, options, cache=cache)
    return profile

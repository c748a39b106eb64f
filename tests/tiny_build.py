"""A tiny model with random weights and its bundle, made once for many tests.

Nothing heavy is imported before it is needed: torch reads its environment when it is first imported.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder unless another worker already has."""
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(folder)
    return folder


def save_tiny_model(folder: Path) -> None:
    """Save a seeded UNet with two levels and attention; zero weights of a fresh one would hide effects of ablations.

    It predicts v, which keeps rounding errors small with any weights. Predicting epsilon with random weights would
    multiply them by 10^6 in 50 steps.
    """
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True, prediction_type="v_prediction")
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)


def build_tiny_bundle(model: Path, folder: Path, cache: Path) -> None:
    """Build a handwritten plan, so that the bundle does not depend on timing; only the controls are fitted.

    It has the schedules of all numbers of steps that a build prepares.
    """
    import pytest

    import unetc
    from unetc.analyzer.analysis import AnalysisOptions
    from unetc.analyzer.analyze import analyze_model
    from unetc.artifacts import Assignment, Phase, Plan, Prediction
    from unetc.compiler.build import BuildOptions, build
    from unetc.compiler.planner.planner import PlanOptions
    from unetc.compiler.schedulers.extract import STEP_COUNTS
    from unetc.models.find import find_model
    from unetc.treatments import Treatment

    analysis = AnalysisOptions(steps=4, samples=2, bins=2, batch=2, rounds=2, threads=1)
    found = find_model(str(model))
    profile = analyze_model(found, analysis, cache=cache)
    noisy, clean = profile.bins
    plan = Plan(
        unetc=unetc.__version__,
        model=profile.model,
        profile_sha256=profile.sha256(),
        budget=0.3,
        max_engines=2,
        engines=(
            Assignment(treatments={}),
            Assignment(treatments={"level:up_blocks.0.upsamplers.0": Treatment.DROP}),
            Assignment(
                treatments={
                    "mid_block.attentions.0": Treatment.MEAN,
                    "skip:conv_in→up_blocks.1.resnets.1": Treatment.DROP,
                    "up_blocks.1.resnets.0": Treatment.MEAN,
                }
            ),
        ),
        phases=(Phase(low=noisy.low, high=noisy.high, cycle=(1,)), Phase(low=clean.low, high=clean.high, cycle=(2,))),
        prediction=Prediction(time_ratio=0.6, relative_l2=0.5, memory=2.0),
    )
    options = BuildOptions(plan=PlanOptions(budget=0.3), steps=4, random_plans=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unetc.compiler.prepare.STEP_COUNTS", STEP_COUNTS)  # conftest leaves few for other builds
        build(found, profile, folder / "bundle", options, cache=cache, plan=plan)
    profile.save(folder / "profile.json")
    plan.save(folder / "plan.json")

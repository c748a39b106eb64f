"""Making a diffusers scheduler for a pipeline, from the name that the user chose and the pipeline's configuration."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import diffusers

from unetc.errors import ModelError
from unetc.models.model import Model
from unetc.models.pipelines import PIPELINES, denoiser_channels
from unetc.models.quiet import quiet

from .classes import CLASSES, Family
from .keys import check_source, check_values, keys_of
from .names import SCHEDULERS
from .walk import Scheduler, asks_variance

logger = logging.getLogger(__name__)

CORRECTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
        "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
    }
)
"""Settings of every scheduler that a pipeline's class changes in its constructor, by class; the others change nothing.

Source:
    `__init__` in diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion.py and
    pipeline_stable_diffusion_inpaint.py.
"""

MU = "mu"
"""Key under which a made scheduler holds the shift that belongs to the size of the image."""


def scheduler_for(name: str, model: Model) -> Scheduler:
    """Make a scheduler for a model.

    Args:
        name: A key of `SCHEDULERS`.
        model: The model; the class of its pipeline has its say.

    Raises:
        ModelError: As `make_scheduler` does, or if the scheduler needs a variance that the model does not predict.
    """
    scheduler = make_scheduler(name, model.scheduler_config, model.reference.pipeline)
    if asks_variance(scheduler) and model.denoiser_config.get("out_channels", ...) is not None:
        # the configuration of a transformer may leave them open
        channels = model.sample_shape[0]
        _, predicted = denoiser_channels(model.reference.denoiser, model.denoiser_config)
        if predicted == channels:
            raise ModelError(
                f"{type(scheduler).__name__} has variance_type learned_range, so it needs a predicted variance of its "
                f"noise, but {model.reference.name} predicts only the {channels} channels of its samples. Use a "
                "scheduler with a fixed variance (variance_type fixed_small or fixed_large), or ddim."
            )
    return scheduler


def turns_guidance_round(scheduler: Scheduler) -> bool:
    """Check whether a scheduler combines a clipped image with the noise of the image before clipping, as DDIM does.

    A guided image overshoots, so this shifts every step: findings/clipping-turns-guidance-round.sh.
    """
    clips: bool = getattr(scheduler.config, "clip_sample", False)
    return type(scheduler).__name__ in ("DDIMScheduler", "DDIMParallelScheduler") and clips


def make_scheduler(
    name: str, config: Mapping[str, Any], pipeline: str | None = None, *, image_tokens: int | None = None
) -> Scheduler:
    """Make a scheduler for a pipeline.

    Args:
        name: A key of `SCHEDULERS`.
        config: `config` of the pipeline's own scheduler, of any supported class.
        pipeline: Class of the pipeline, which may correct the configuration; None for a model outside pipelines.
        image_tokens: Length of the transformer's sequence, for a flow with dynamic shift; the tables then hold for
            images of this size alone.

    Returns:
        A diffusers scheduler of the same noise schedule and prediction type; ddim has eta 0.

    Raises:
        ModelError: If there is no such name, if the configuration has a class or a key that unetc does not know or
            that a table cannot express, or if diffusers refuses it.
    """
    if name not in SCHEDULERS:
        raise ModelError(f"unknown scheduler {name!r}. Choose one of {', '.join(SCHEDULERS)}.")
    class_name, overrides = SCHEDULERS[name]
    check_source(name, config)
    used = {key: value for key, value in config.items() if key in keys_of(class_name)} | dict(overrides)
    used |= _corrections(class_name, used, pipeline)
    check_values(class_name, used)
    return _make(class_name, used, image_tokens)


def _corrections(class_name: str, config: Mapping[str, Any], pipeline: str | None) -> dict[str, Any]:
    """List the settings that the pipeline's class changes in the scheduler that it is given.

    A latent has no limits. Where neither the folder nor the pipeline says so, as with Stable Diffusion XL, the default
    of ddim and ddpm would clip it; that default is meant for images.
    """
    keys = keys_of(class_name)
    changes = {key: value for key, value in CORRECTIONS.get(str(pipeline), {}).items() if key in keys}
    kind = PIPELINES.get(str(pipeline))
    if kind is not None and kind.text and "clip_sample" in keys and "clip_sample" not in {*config, *changes}:
        logger.warning("the latents are not clipped: %s does so by default, but the pipeline does not ask", class_name)
        changes["clip_sample"] = False
    return changes


def _make(class_name: str, config: dict[str, Any], image_tokens: int | None) -> Scheduler:
    """Let diffusers make the scheduler."""
    dynamic = class_name in CLASSES and CLASSES[class_name].family == Family.FLOW and config.get("use_dynamic_shifting")
    if dynamic and image_tokens is None:
        raise ModelError(
            f"{class_name} has use_dynamic_shifting, which makes the noise levels depend on the size of the image. "
            "Pass image_tokens, for tables of one size, or set it to False and choose a shift."
        )
    # diffusers drops values that a scheduler in memory had by default, and keeps the same values from a file:
    # findings/scheduler-config-changes-on-disk.sh
    try:
        with quiet(diffusers):
            scheduler: Any = getattr(diffusers, class_name).from_config(config)
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(f"{class_name} does not accept this configuration: {error}. Choose another one.") from error
    if dynamic and image_tokens is not None:
        scheduler.register_to_config(**{MU: shift_of(scheduler.config, image_tokens)})
    made: Scheduler = scheduler
    return made


def shift_of(config: Mapping[str, Any], image_tokens: int) -> float:
    """Compute the dynamic shift for a size of images.

    Args:
        config: Configuration of a flow.
        image_tokens: Length of the transformer's sequence.

    Source:
        `calculate_shift` in diffusers/pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py.
    """
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    return float(config["base_shift"] + slope * (image_tokens - low))

"""Analyse a model by name: capture it, open the target here or on a Ray cluster, and measure every component on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unetc.artifacts.profile import ImageSource, Profile
from unetc.call import EXTRA_CHANNELS, TIMESTEP_COND
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.place import place_for
from unetc.compiler.prepare import prepare
from unetc.compiler.schedulers.extract import extract
from unetc.compiler.schedulers.make import scheduler_for, turns_guidance_round
from unetc.compiler.tensorrt.on_demand import OnDemand, overflow_finder
from unetc.errors import ProfileError
from unetc.jobs import Cluster
from unetc.lock import locked_with_note
from unetc.models.images import Images
from unetc.models.model import Model
from unetc.progress import OnProgress, ignore

from .analysis import AnalysisOptions, analyze
from .bench import AnalysisEquipment

HELD_OUT_SHARE = 4
"""One prompt in this many is kept for `verify`."""


def analyze_model(
    model: Model,
    options: AnalysisOptions,
    *,
    cache: Path,
    cluster: Cluster | None = None,
    on_progress: OnProgress = ignore,
) -> Profile:
    """Capture a model and measure it; bad options are refused before the capture, which takes long.

    Args:
        model: The model.
        options: How to measure.
        cache: Folder for captures and partial results.
        cluster: Where to measure; None measures in this process.
        on_progress: Called as the work advances.

    Raises:
        ModelError: If the model is not supported.
        ProfileError: If it cannot be analysed.
        WorkerError: If the cluster cannot do it.
    """
    if options.target == "null":
        raise ProfileError("target null computes nothing that could be measured. Use onnxruntime:cpu.")
    scheduler = scheduler_for(options.scheduler, model)
    table = extract(scheduler, options.steps)
    with place_for(options.target, options.threads, cluster, on_progress) as place:
        if options.labels and model.calls.classes is None:
            raise ProfileError(f"{model.reference.name} has no classes, so it takes no labels. Omit them.")
        prompts = options.prompts or tuple(map(str, options.labels)) or model.prompts()
        scale = model.guidance_scale if options.guidance_scale is None else options.guidance_scale
        used = prompts[: len(prompts) - len(prompts) // HELD_OUT_SHARE]
        images = Images(folder=Path(options.images) if options.images else None, seed=options.seed)
        conditions = model.encode(used, scale, images=images)
        guided = conditions.guided or TIMESTEP_COND in conditions.own
        if scale > 1 and options.guidance_scale is not None and not guided:
            raise ProfileError(f"{model.reference.name} has no guidance, so it takes no guidance scale. Omit it.")
        place.check(conditions)
        if conditions.guided and turns_guidance_round(scheduler):
            conditions = replace(conditions, notes=(*conditions.notes, _CLIPS))
        prepared = prepare(model, cache, on_progress)
        calls = MeasuredCalls.of(model.sample_shape, options.batch, options.samples, conditions)
        finder = overflow_finder(prepared, options.scheduler, conditions, on_progress)
        equipment = AnalysisEquipment(
            graph=prepared.gated,
            conditions=conditions,
            samples=options.samples,
            prediction_type=table.prediction_type,
        )
        with locked_with_note(prepared.work / "analysis.lock", "analyses this model", on_progress):
            return analyze(
                prepared.gated,
                model.reference,
                table,
                place.workers(equipment, OnDemand(calls, finder, on_progress)),
                sample_shape=model.sample_shape,
                conditions=conditions,
                prompts=prompts,
                images=_source(images, options.images) if EXTRA_CHANNELS in conditions.own else None,
                options=options,
                work=prepared.work,
                on_progress=on_progress,
            )


_CLIPS = (
    "the scheduler clips predicted images, which guidance overshoots: DDIM of diffusers may then draw the opposite of "
    "what is asked for. Set clip_sample to false in scheduler/scheduler_config.json, or use another scheduler"
)


def _source(images: Images, folder: str | None) -> ImageSource:
    return ImageSource(folder=folder, sha256=images.sha256())

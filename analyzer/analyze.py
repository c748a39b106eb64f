"""Analyse a model by name: capture it, open the target here or on a Ray cluster, and measure every component on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from filelock import FileLock

from unetc.artifacts.profile import ImageSource, Profile
from unetc.call import EXTRA_CHANNELS, TIMESTEP_COND
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.prepare import Prepared, prepare
from unetc.compiler.schedulers.extract import extract
from unetc.compiler.schedulers.make import scheduler_for, turns_guidance_round
from unetc.compiler.tensorrt.on_demand import OnDemand, overflow_finder
from unetc.conditions import Conditions
from unetc.environment import machine_for, on_cpu
from unetc.errors import ProfileError
from unetc.jobs import Cluster, InProcess, Workers
from unetc.models.images import Images
from unetc.models.model import Model
from unetc.precision import Precision
from unetc.progress import OnProgress, Progress, ignore
from unetc.runtime.backends.registry import check_target, open_backend
from unetc.sampler.table import SchedulerTable

from .analysis import AnalysisOptions, analyze
from .bench import Bench, BenchRecipe

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
    with _opened(options, table, cluster, on_progress) as workers_for:
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
        if cluster is not None and conditions.control is not None:
            raise ProfileError("a ControlNet does not travel to a cluster. Measure with control images without --ray.")
        if conditions.guided and turns_guidance_round(scheduler):
            conditions = replace(conditions, notes=(*conditions.notes, _CLIPS))
        prepared = prepare(model, cache, on_progress)
        with FileLock(prepared.work / "analysis.lock"):  # a second process reads the results of the first
            return analyze(
                prepared.gated,
                model.reference,
                table,
                workers_for(prepared, conditions),
                sample_shape=model.sample_shape,
                conditions=conditions,
                prompts=prompts,
                images=_source(images, options.images) if EXTRA_CHANNELS in conditions.own else None,
                options=options,
                work=prepared.work,
                on_progress=on_progress,
            )


WorkersFor = Callable[[Prepared, Conditions], Workers[Bench]]


@contextmanager
def _opened(
    options: AnalysisOptions, table: SchedulerTable, cluster: Cluster | None, on_progress: OnProgress
) -> Iterator[WorkersFor]:
    """Open the target, here or on a cluster, before a model is captured for it.

    Yields:
        Gives workers the model and its conditions.
    """

    def calls_of(prepared: Prepared, conditions: Conditions) -> MeasuredCalls:
        return MeasuredCalls.of(prepared.model.sample_shape, options.batch, options.samples, conditions)

    def here(prepared: Prepared, conditions: Conditions) -> Workers[Bench]:
        finder = overflow_finder(prepared, options.scheduler, conditions, on_progress)
        backend = target.prepared_by(OnDemand(calls_of(prepared, conditions), finder, on_progress))
        kind = table.prediction_type
        bench = Bench.of(prepared.gated, backend, conditions, samples=options.samples, prediction_type=kind)
        return InProcess(bench=bench, machine=machine_for(options.target))

    def there(prepared: Prepared, conditions: Conditions) -> Workers[Bench]:
        finder = overflow_finder(prepared, options.scheduler, conditions, on_progress)
        recipe = BenchRecipe(
            graph=prepared.gated.pack(),
            conditions=conditions,
            samples=options.samples,
            prediction_type=table.prediction_type,
            target=options.target,
            threads=options.threads,
            calls=calls_of(prepared, conditions),
            wide=finder() if Precision.of_target(options.target) is Precision.FP16 else frozenset(),
        )
        workers = workers_of(recipe, needs)
        for note in (f"{workers}: {workers.machine}", *workers.notes):
            on_progress(Progress(stage="workers", done=workers.count, total=workers.count, note=note))
        return workers

    if cluster is None:
        target = open_backend(options.target, threads=options.threads)
        yield here
        return
    check_target(options.target)
    if "tensorrt" in options.target:
        raise ProfileError(
            f"target {options.target} builds engines, which differ from machine to machine, so their damages do not "
            "compare. Measure it without --ray."
        )
    from unetc.ray_workers import Needs, joined, workers_of  # needs ray

    needs = Needs(
        cpus=options.threads,
        gpu=not on_cpu(options.target),
        describe=partial(machine_for, options.target),
        most_workers=cluster.most_workers,
    )
    with joined(cluster.address):
        yield there


_CLIPS = (
    "the scheduler clips predicted images, which guidance overshoots: DDIM of diffusers may then draw the opposite of "
    "what is asked for. Set clip_sample to false in scheduler/scheduler_config.json, or use another scheduler"
)


def _source(images: Images, folder: str | None) -> ImageSource:
    return ImageSource(folder=folder, sha256=images.sha256())

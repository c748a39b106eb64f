"""Set up what planning by measurement needs: the profile of a model and a workbench for its plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from unetc.analyzer.analysis import AnalysisOptions, analyze, largest_batch
from unetc.artifacts.plan import Plan
from unetc.artifacts.profile import Profile
from unetc.compiler.engines import check_plan
from unetc.conditions import Conditions
from unetc.errors import ProfileError
from unetc.models import Model, find_model
from unetc.models.lora import Lora
from unetc.progress import OnProgress, ignore
from unetc.runtime.backend import open_backend
from unetc.runtime.decoder import Decoder
from unetc.solver.extract import extract, make_scheduler
from unetc.solver.table import SolverTables

from .measuring import Calls, LoweringBackend, take_any_graph
from .prepare import Prepared, prepare, prepare_decoder, prepare_solver
from .workbench import Workbench

HELD_OUT_SHARE = 4
"""One of so many prompts is kept for `verify`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A model, measured, and a workbench for plans of its profile."""

    prepared: Prepared
    profile: Profile
    solver: SolverTables
    conditions: Conditions
    """Of all prompts of the profile."""
    decoder: bytes | None
    """ONNX graph that turns samples into images; None if samples are images."""
    workbench: Workbench
    lowering: LoweringBackend | None
    """What lowers graphs for the profile's target; None if it takes them in float32."""


def set_up(
    name: str,
    *,
    weights: Path | None = None,
    loras: Sequence[Lora] = (),
    analysis: AnalysisOptions,
    steps: int,
    cache: Path,
    profile: Profile | None = None,
    plan: Plan | None = None,
    on_progress: OnProgress = ignore,
) -> Setup:
    """Analyse a model if there is no profile of it yet, and open its target.

    Args:
        name: Built-in model, diffusers folder or Hub id.
        weights: Checkpoint of a model that is named without one.
        loras: What is fused into the model, in order.
        analysis: How to analyse when no profile is given.
        steps: Number of steps that plans are measured at.
        cache: Folder for captures and partial results.
        profile: An analysis of this model.
        plan: A plan that must be of the profile.
        on_progress: Told how far the work is.

    Raises:
        ModelError: If there is no such model or it is not supported.
        ProfileError: If the profile belongs to another model.
        PlanError: If the plan belongs to another profile.
    """
    controlnet = (profile.model if profile else analysis).controlnet
    model = find_model(name, weights, loras=loras, controlnet=controlnet)
    profile = profile or analyze_found(model, analysis, cache, on_progress)
    _check_profile(profile, model)
    if plan is not None:
        check_plan(plan, profile)
    backend = open_backend(profile.target, threads=profile.threads)
    prepared = prepare(model, cache, on_progress)
    if profile.components != prepared.gated.components:
        raise ProfileError("the profile knows other components than this version finds. Analyse the model again.")
    solver = prepare_solver(model, profile.scheduler, (steps,), on_progress)
    conditions = model.encode(profile.prompts, profile.guidance_scale)
    calls = Calls.of(profile.sample_shape, profile.batch, largest_batch(profile.samples), conditions)
    backend = take_any_graph(
        profile.target, backend, calls, _overflowing(prepared, profile.scheduler, conditions, on_progress), on_progress
    )
    decoder = prepare_decoder(prepared)
    workbench = Workbench(
        prepared.gated,
        profile,
        solver,
        backend,
        steps=steps,
        conditions=conditions.take(range(profile.used_prompts)),
        decoder=Decoder(decoder, model.decoder_scale, backend) if decoder else None,
    )
    return Setup(
        prepared=prepared,
        profile=profile,
        solver=solver,
        conditions=conditions,
        decoder=decoder,
        workbench=workbench,
        lowering=backend if isinstance(backend, LoweringBackend) else None,
    )


def analyze_model(
    name: str,
    options: AnalysisOptions,
    *,
    weights: Path | None = None,
    loras: Sequence[Lora] = (),
    cache: Path,
    on_progress: OnProgress = ignore,
) -> Profile:
    """Capture a model and measure it.

    Raises:
        ModelError: If there is no such model or it is not supported.
        ProfileError: If it cannot be analysed.
    """
    model = find_model(name, weights, loras=loras, controlnet=options.controlnet)
    return analyze_found(model, options, cache, on_progress)


def analyze_found(model: Model, options: AnalysisOptions, cache: Path, on_progress: OnProgress) -> Profile:
    """Analyse, having refused what can be refused before the capture, which takes long."""
    if options.target == "null":
        raise ProfileError("target null computes nothing that could be measured. Use onnxruntime:cpu.")
    table = extract(make_scheduler(options.scheduler, model.scheduler_config), options.steps)
    backend = open_backend(options.target, threads=options.threads)
    prompts = options.prompts or model.prompts()
    scale = model.guidance_scale if options.guidance_scale is None else options.guidance_scale
    used = prompts[: len(prompts) - len(prompts) // HELD_OUT_SHARE]
    conditions = model.encode(used, scale)
    calls = Calls.of(model.sample_shape, options.batch, largest_batch(options.samples), conditions)
    prepared = prepare(model, cache, on_progress)
    backend = take_any_graph(
        options.target, backend, calls, _overflowing(prepared, options.scheduler, conditions, on_progress), on_progress
    )
    with FileLock(prepared.work / "analysis.lock"):  # a second process reads what the first has measured
        return analyze(
            prepared.gated,
            model.reference,
            table,
            backend,
            sample_shape=model.sample_shape,
            conditions=conditions,
            prompts=prompts,
            options=options,
            work=prepared.work,
            on_progress=on_progress,
        )


def _overflowing(
    prepared: Prepared, scheduler: str, conditions: Conditions, on_progress: OnProgress
) -> Callable[[], frozenset[str]]:
    """Make what finds the values of a model that float16 cannot hold."""

    def find() -> frozenset[str]:
        from .calibrate import overflowing_in_model  # needs onnxruntime, which most targets do without

        return overflowing_in_model(prepared, scheduler, conditions, on_progress)

    return find


def _check_profile(profile: Profile, model: Model) -> None:
    reference = model.reference
    if profile.model.sha256 != reference.sha256:
        command = " --lora ".join((reference.name, *reference.loras))
        raise ProfileError(
            f"the profile is of {profile.model.title} ({profile.model.sha256[:12]}), not of {reference.title} "
            f"({reference.sha256[:12]}). Analyse this model: `unetc analyze {command} -o profile.json`."
        )

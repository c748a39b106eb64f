"""Open a profile's model and target for planning by measurement, here or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from unetc.artifacts.plan import Plan
from unetc.artifacts.profile import Profile, without_guidance
from unetc.compiler.engines import check_plan
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.place import place_for
from unetc.compiler.prepare import Prepared, prepare, prepare_decoder, prepare_scheduler
from unetc.compiler.tensorrt.on_demand import Lowering, OnDemand, overflow_finder
from unetc.conditions import Conditions
from unetc.errors import ProfileError
from unetc.jobs import Cluster
from unetc.models.images import Images
from unetc.models.model import Model
from unetc.progress import OnProgress, ignore
from unetc.sampler.table import SchedulerTables

from .bench import DecoderGraph, Sampling, SearchEquipment
from .workbench import Workbench, full_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A model, its profile, and a workbench for plans of that profile."""

    prepared: Prepared
    profile: Profile
    scheduler: SchedulerTables
    conditions: Conditions
    """Conditions of all prompts of the profile."""
    decoder: bytes | None
    """ONNX graph from samples to images; None if samples are images."""
    workbench: Workbench
    lowering: Lowering | None
    """Lowers graphs for the profile's target; None if it takes them in float32."""


@contextmanager
def set_up(
    model: Model,
    profile: Profile,
    *,
    steps: int,
    cache: Path,
    plan: Plan | None = None,
    cluster: Cluster | None = None,
    on_progress: OnProgress = ignore,
) -> Iterator[Setup]:
    """Open the model and the target of a profile.

    Args:
        model: The model that was analysed.
        profile: An analysis of this model.
        steps: Number of steps that plans are measured at.
        cache: Folder for captures and partial results.
        plan: A plan that must belong to the profile.
        cluster: Where to measure; None measures in this process.
        on_progress: Called as the work advances.

    Raises:
        ModelError: If the model cannot be captured.
        ProfileError: If the profile belongs to another model, or the cluster cannot measure it.
        PlanError: If the plan belongs to another profile.
        WorkerError: If the cluster cannot be joined.
    """
    _check_profile(profile, model)
    if plan is not None:
        check_plan(plan, profile)
    with place_for(profile.target, profile.threads, cluster, on_progress) as place:
        conditions = _encode(model, profile)  # before the capture, which takes long
        _check_control(profile, conditions)
        place.check(conditions)
        prepared = prepare(model, cache, on_progress)
        if without_guidance(profile.components) != prepared.gated.components:
            raise ProfileError("the profile knows other components than this version finds. Analyse the model again.")
        scheduler = prepare_scheduler(model, profile.scheduler, (steps,), on_progress)
        calls = MeasuredCalls.of(profile.sample_shape, profile.batch, profile.samples, conditions)
        finder = overflow_finder(prepared, profile.scheduler, conditions, on_progress)
        on_demand = OnDemand(calls, finder, on_progress)
        decoder = prepare_decoder(prepared)
        sampling = Sampling(
            full=full_model(prepared.gated, profile),
            scheduler=scheduler,
            sample_shape=profile.sample_shape,
            predicted_channels=prepared.gated.predicted_channels,
            batch=profile.batch,
            steps=steps,
            conditions=conditions.take(range(profile.used_prompts)),
            decoder=DecoderGraph(graph=decoder, scale=model.decoder_scale) if decoder else None,
        )
        yield Setup(
            prepared=prepared,
            profile=profile,
            scheduler=scheduler,
            conditions=conditions,
            decoder=decoder,
            workbench=Workbench(
                gated=prepared.gated,
                profile=profile,
                sampling=sampling,
                workers=place.workers(
                    SearchEquipment(sampling=sampling, weights=prepared.gated.read_weights()), on_demand
                ),
            ),
            lowering=on_demand.lowering(place.reads),
        )


def _encode(model: Model, profile: Profile) -> Conditions:
    """Encode all prompts of a profile, with its images.

    Raises:
        ProfileError: If the images have changed since the analysis.
    """
    source = profile.images or None
    images = Images(folder=Path(source.folder) if source and source.folder else None, seed=profile.seed)
    if source and images.sha256() != source.sha256:
        raise ProfileError(f"the images in {source.folder} have changed since the analysis. Analyse the model again.")
    return model.encode(profile.prompts, profile.guidance_scale, images=images)


def _check_control(profile: Profile, conditions: Conditions) -> None:
    given = None if conditions.control is None else conditions.control.measured
    if profile.control is None and given is not None:
        raise ProfileError(
            "the profile was measured without a control image, and control images are given. Analyse the model with "
            "them, or leave them out."
        )
    if profile.control is None:
        return
    wanted = profile.control
    hashes = wanted.model_sha256, wanted.images_sha256
    if given is None or (given.model_sha256, given.images_sha256) != hashes:
        raise ProfileError(
            f"the profile was measured with {wanted.images} control images through the ControlNet {wanted.model}, and "
            f"{'other ones' if given else 'none'} are given. Give the same --controlnet-model and --control-images."
        )


def _check_profile(profile: Profile, model: Model) -> None:
    reference = model.reference
    command = " --lora ".join((reference.name, *reference.loras))
    if profile.model.sha256 != reference.sha256:
        raise ProfileError(
            f"the profile is of {profile.model.title} ({profile.model.sha256[:12]}), not of {reference.title} "
            f"({reference.sha256[:12]}). Analyse this model: `unetc analyze {command} -o profile.json`."
        )
    hashes = profile.model.text_sha256, reference.text_sha256
    if msgspec.UNSET not in hashes and hashes[0] != hashes[1]:
        raise ProfileError(
            f"the profile was measured with other text encoders than {reference.title} has now. Analyse it again: "
            f"`unetc analyze {command} -o profile.json`."
        )

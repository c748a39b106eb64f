"""Measure a bundle on new seeds, with controls at equal measured time, all in one run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

import unetc
from unetc.arguments import plain_fields
from unetc.artifacts.manifest import FULL, Level, Manifest
from unetc.artifacts.profile import Damage
from unetc.artifacts.verification import ControlResult, Converged, EngineUse, Verification
from unetc.conditions import Conditions
from unetc.environment import describe
from unetc.errors import SessionError
from unetc.metrics.damage import measure_damage
from unetc.progress import OnProgress, Progress, ignore
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.loaded_bundle import LoadedBundle
from unetc.runtime.session import Session
from unetc.timing import interleaved_ms

Array = NDArray[np.float32]

HELD_OUT = 1000
"""Distance of the default seed from those that analysis and build have used."""

CONVERGED_ROUNDS = 4
"""Most batches of the converged trajectory: each takes the time of many others."""
FEWER_STEPS = "fewer_steps"
"""Name of the control that every level is compared with, even without others, unless it has one step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """Options of a verification."""

    rounds: int = 8
    """Every round samples one batch with each contender, alternating."""
    batch: int | None = None
    """The bundle's batch when not given."""
    seed: int | None = None
    """A seed far from the used ones when not given."""
    level: str | None = None
    """Name of the quality level; the default level when not given."""
    target: str | None = None
    """Where engines run; the target the bundle was built for when not given."""
    converged: bool = True
    """Whether to compare with the converged trajectory too; it takes at least 500 calls per batch."""

    def __post_init__(self) -> None:
        """Check numbers and flags.

        Raises:
            SessionError: If one has another type.
        """
        plain_fields(self, SessionError)


def verify(bundle: Bundle, options: VerifyOptions, on_progress: OnProgress = ignore) -> Verification:
    """Measure time and damage of a quality level, and of the controls of the default level if it is that one.

    Raises:
        SessionError: If the seed was used by analysis or build, an option is out of range, or there is no such level
            or target.
        MissingDependency: If the target's backend is not installed.
    """
    manifest = bundle.manifest
    if options.level == FULL:
        known = ", ".join(level.name for level in manifest.levels)
        raise SessionError(f"the full model is what quality levels are compared with. Expected one of: {known}.")
    level = manifest.levels[0] if options.level is None else manifest.level(options.level)
    seed = max(manifest.used_seeds) + HELD_OUT if options.seed is None else options.seed
    if seed in manifest.used_seeds:
        raise SessionError(f"seed {seed} was used to make this bundle; expected any but {list(manifest.used_seeds)}.")
    batch = manifest.batch if options.batch is None else options.batch
    if options.rounds < 1 or batch < 1:
        raise SessionError(f"rounds and batch must be at least 1, got {options.rounds} and {batch}.")
    target = options.target or manifest.target
    backend = open_backend(target, threads=manifest.threads)
    loaded = LoadedBundle(bundle, backend)
    session = Session.over(loaded, level=level.name)
    sample = partial(_sample, conditions=_held_out(manifest, bundle.conditions), batch=batch, seed=seed)
    contenders: dict[str, Callable[[int], Array]] = {
        "full": partial(sample, session, full_model=True),
        "plan": partial(sample, session),
    }
    descriptions: dict[str, str] = {}
    for control in manifest.controls if level is manifest.levels[0] else ():
        own = Session.over(loaded, control=control)
        contenders[control.name] = partial(sample, own, full_model=control.plan is None)
        descriptions[control.name] = control.description
    if FEWER_STEPS not in contenders:
        fewer = _steps_of_equal_time(session, partial(sample, session, 0))
        if fewer is not None:
            contenders[FEWER_STEPS] = partial(sample, session, full_model=True, steps=fewer)
            descriptions[FEWER_STEPS] = _describe_fewer(session, fewer)
    non_finite_before = session.non_finite_steps
    times, sampled = _run(contenders, options.rounds, on_progress)
    non_finite_steps = session.non_finite_steps - non_finite_before  # before further sampling
    outputs = {name: session.decode(latents) for name, latents in sampled.items()}
    ratios = {name: row / times["full"] for name, row in times.items()}
    groups = _groups(outputs)
    converged = None
    if options.converged and manifest.converged is not None:
        truth = session.along(bundle.tables[manifest.converged])
        rounds = min(options.rounds, CONVERGED_ROUNDS)
        latents = _sample_converged(partial(sample, truth, full_model=True), rounds, batch, on_progress)
        converged = _compare(truth, latents, outputs, groups)
    result = Verification(
        unetc=unetc.__version__,
        model=manifest.model,
        plan_sha256=level.plan.sha256(),
        target=target,
        threads=manifest.threads,
        environment=describe(),
        budget=level.plan.budget,
        scheduler=manifest.scheduler.name,
        steps=manifest.steps,
        samples=len(outputs["full"]),
        seed=seed,
        rounds=options.rounds,
        full_ms=float(np.median(times["full"])),
        time_ratio=float(np.median(ratios["plan"])),
        time_ratio_p10=float(np.percentile(ratios["plan"], 10)),
        time_ratio_p90=float(np.percentile(ratios["plan"], 90)),
        damage=measure_damage(outputs["full"], outputs["plan"]),
        non_finite_steps=non_finite_steps,
        controls=_control_results(outputs, ratios, groups, descriptions),
        converged=converged,
        engines=_engine_uses(level, session, manifest.steps),
        disk_bytes=_disk_bytes(manifest, [manifest.full.graph, *(engine.graph for engine in level.engines)]),
        full_disk_bytes=_disk_bytes(manifest, [manifest.full.graph]),
    )
    return msgspec.structs.replace(result, loses_to=result.beaten_by())


def _sample(
    session: Session,
    first: int,
    *,
    conditions: Conditions,
    batch: int,
    seed: int,
    full_model: bool = False,
    steps: int | None = None,
) -> Array:
    """Sample the latents of a batch from its first index on."""
    own = conditions.take(range(first, first + batch))
    return session.sample(
        batch, seed=seed, steps=steps, first_index=first, conditions=own, full_model=full_model, latents=True
    )


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of controls; numbered ones of a kind make one result."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if name not in ("full", "plan"):
            groups.setdefault(re.sub(r"-\d+$", "", name), []).append(name)
    return groups


def _control_results(
    outputs: Mapping[str, Array],
    ratios: Mapping[str, NDArray[np.float64]],
    groups: Mapping[str, Sequence[str]],
    descriptions: Mapping[str, str],
) -> dict[str, ControlResult]:
    """Compare the controls with the full model."""
    return {
        group: ControlResult(
            time_ratio=float(np.median(np.concatenate([ratios[name] for name in names]))),
            damage=_distance(outputs["full"], outputs, names),
            description=_describe(descriptions[names[0]], len(names)),
        )
        for group, names in groups.items()
    }


def _distance(reference: Array, outputs: Mapping[str, Array], names: Sequence[str]) -> Damage:
    """Measure the distance of contenders to a reference, over all of their samples."""
    return measure_damage(np.concatenate([reference] * len(names)), np.concatenate([outputs[name] for name in names]))


def _sample_converged(sample: Callable[[int], Array], rounds: int, batch: int, on_progress: OnProgress) -> Array:
    """Sample the converged trajectory from the same noise; its time does not matter."""
    parts = []
    for i in range(rounds):
        parts.append(sample(i * batch))
        on_progress(Progress(stage="converged trajectory", done=i + 1, total=rounds))
    return np.concatenate(parts)


def _compare(
    truth: Session, latents: Array, outputs: Mapping[str, Array], groups: Mapping[str, Sequence[str]]
) -> Converged:
    """Compare every contender with the converged trajectory, on as many of its first samples."""
    reference = truth.decode(latents)
    outputs = {name: sampled[: len(reference)] for name, sampled in outputs.items()}
    return Converged(
        scheduler=truth.scheduler.name,
        steps=truth.steps,
        samples=len(reference),
        full=_distance(reference, outputs, ["full"]),
        plan=_distance(reference, outputs, ["plan"]),
        controls={group: _distance(reference, outputs, names) for group, names in groups.items()},
    )


def _held_out(manifest: Manifest, conditions: Conditions) -> Conditions:
    """Pick the prompts that neither analysis nor build has seen; all if there are no others."""
    if manifest.conditioning is None:
        return conditions
    count, used = len(manifest.conditioning.prompts), manifest.conditioning.used
    return conditions.take(range(used if used < count else 0, count))


def _steps_of_equal_time(session: Session, sample: Callable[..., Array]) -> int | None:
    """Find how many fewer steps of the full model take the time of the plan; the first, untimed round warms up.

    Returns:
        A number of steps below the session's; None if there is none.
    """
    fewer = [count for count in session.scheduler.counts if count < session.steps]
    if not fewer:
        return None
    calls = [partial(sample, full_model=full_model) for full_model in (True, False)]
    times = interleaved_ms(calls, rounds=3, warmup=1)
    wanted = session.steps * float(np.median(times[:, 1] / times[:, 0]))
    return min(fewer, key=lambda count: abs(count - wanted))


def _run(
    contenders: dict[str, Callable[[int], Array]], rounds: int, on_progress: OnProgress
) -> tuple[dict[str, NDArray[np.float64]], dict[str, Array]]:
    """Let the contenders sample the same noise, alternating; the first, untimed round warms up."""
    outputs: dict[str, list[Array]] = {name: [] for name in contenders}
    times = np.empty((rounds, len(contenders)))
    batch = 0
    for i in range(-1, rounds):
        round_outputs: dict[str, Array] = {}

        def call(name: str, first: int = max(i, 0) * batch, into: dict[str, Array] = round_outputs) -> None:
            into[name] = contenders[name](first)

        row = interleaved_ms([partial(call, name) for name in contenders], rounds=1, warmup=0)[0]
        batch = len(round_outputs["full"])
        if i >= 0:
            times[i] = row
            for name, output in round_outputs.items():
                outputs[name].append(output)
        on_progress(Progress(stage="verifying", done=i + 2, total=rounds + 1))
    columns = {name: times[:, i] for i, name in enumerate(contenders)}
    return columns, {name: np.concatenate(parts) for name, parts in outputs.items()}


def _describe(text: str, count: int) -> str:
    return f"{text} ({count} plans)" if count > 1 else text


def _describe_fewer(session: Session, fewer: int) -> str:
    """Describe the full model along the bundle's own schedule for fewer steps, which may start elsewhere."""
    full, table = session.scheduler.table(session.steps), session.scheduler.table(fewer)
    text = f"the full model with fewer steps ({fewer} of {full.count})"
    return text if table.starts_like(full) else f"{text}, from another noise level"


def _engine_uses(level: Level, session: Session, steps: int) -> tuple[EngineUse, ...]:
    schedule = session.schedule(steps)
    return tuple(
        EngineUse(step_ms=engine.step_ms, steps=schedule.count(i), removed=len(engine.treatments))
        for i, engine in enumerate(level.engines)
    )


def _disk_bytes(manifest: Manifest, graphs: list[str]) -> int:
    sizes = {record.path: record.bytes for record in manifest.files}
    return sizes[manifest.weights] + sum(sizes[graph] for graph in set(graphs))

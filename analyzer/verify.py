"""Measure a bundle on new seeds, with controls at equal measured time, all in one run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

import unetc
from unetc.artifacts.manifest import FULL, Control, Level, Manifest
from unetc.artifacts.verification import ControlResult, EngineUse, Verification
from unetc.backend import Backend
from unetc.conditions import Conditions
from unetc.environment import describe
from unetc.errors import SessionError
from unetc.metrics.damage import measure_damage
from unetc.progress import OnProgress, Progress, ignore
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session
from unetc.timing import interleaved_ms

Array = NDArray[np.float32]

HELD_OUT = 1000
"""Distance of the default seed from those that analysis and build have used."""

_DESCRIPTIONS = {
    "fewer_steps": "the full model with fewer steps",
    "uniform": "the same treatment at all noise levels, chosen by the planner",
    "deep-hold": "one level held in all phases with one period (DeepCache's rule), the best level and period",
    "random": "random treatments of random components at random noise levels",
}


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
    session = Session.of(bundle, backend, level=level.name)
    controls = manifest.controls if level is manifest.levels[0] else ()
    contenders, fewer = _contenders(bundle, backend, session, controls, batch, seed)
    times, sampled = _run(contenders, options.rounds, on_progress)
    outputs = {name: session.decode(latents) for name, latents in sampled.items()}
    ratios = {name: row / times["full"] for name, row in times.items()}
    return Verification(
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
        controls=_control_results(outputs, ratios, fewer, manifest.steps),
        engines=_engine_uses(level, session, manifest.steps),
        disk_bytes=_disk_bytes(manifest, [manifest.full.graph, *(engine.graph for engine in level.engines)]),
        full_disk_bytes=_disk_bytes(manifest, [manifest.full.graph]),
    )


def _contenders(
    bundle: Bundle, backend: Backend, session: Session, controls: tuple[Control, ...], batch: int, seed: int
) -> tuple[dict[str, Callable[[int], Array]], int]:
    """Make the functions that sample a batch from its first index on, and count the steps of `fewer_steps`."""
    conditions = _held_out(bundle.manifest, bundle.conditions)

    def sample(session: Session, first: int, *, full_model: bool = False, steps: int | None = None) -> Array:
        own = conditions.take(range(first, first + batch))
        return session.sample(
            batch, seed=seed, steps=steps, first_index=first, conditions=own, full_model=full_model, latents=True
        )

    fewer = _steps_of_equal_time(session, partial(sample, session, 0))
    contenders: dict[str, Callable[[int], Array]] = {
        "full": partial(sample, session, full_model=True),
        "plan": partial(sample, session),
        "fewer_steps": partial(sample, session, full_model=True, steps=fewer),
    }
    for control in controls:
        contenders[control.name] = partial(sample, Session.of(bundle, backend, control=control))
    return contenders, fewer


def _control_results(
    outputs: Mapping[str, Array], ratios: Mapping[str, NDArray[np.float64]], fewer: int, steps: int
) -> dict[str, ControlResult]:
    """Compare the controls with the full model; numbered ones of a kind make one result."""
    groups: dict[str, list[str]] = {}
    for name in outputs:
        if name not in ("full", "plan"):
            groups.setdefault(re.sub(r"-\d+$", "", name), []).append(name)
    return {
        group: ControlResult(
            time_ratio=float(np.median(np.concatenate([ratios[name] for name in names]))),
            damage=measure_damage(
                np.concatenate([outputs["full"]] * len(names)), np.concatenate([outputs[name] for name in names])
            ),
            description=_describe(group, len(names), fewer, steps),
        )
        for group, names in groups.items()
    }


def _held_out(manifest: Manifest, conditions: Conditions) -> Conditions:
    """Pick the prompts that neither analysis nor build has seen; all if there are no others."""
    if manifest.conditioning is None:
        return conditions
    count, used = len(manifest.conditioning.prompts), manifest.conditioning.used
    return conditions.take(range(used if used < count else 0, count))


def _steps_of_equal_time(session: Session, sample: Callable[..., Array]) -> int:
    """Find how many steps of the full model take the time of the plan; the first, untimed round warms up."""
    calls = [partial(sample, full_model=full_model) for full_model in (True, False)]
    times = interleaved_ms(calls, rounds=3, warmup=1)
    wanted = session.steps * float(np.median(times[:, 1] / times[:, 0]))
    return min(session.scheduler.counts, key=lambda count: abs(count - wanted))


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


def _describe(group: str, count: int, fewer: int, steps: int) -> str:
    text = _DESCRIPTIONS.get(group, group)
    if group == "fewer_steps":
        return f"{text} ({fewer} of {steps})"
    return f"{text} ({count} plans)" if count > 1 else text


def _engine_uses(level: Level, session: Session, steps: int) -> tuple[EngineUse, ...]:
    schedule = session.schedule(steps)
    return tuple(
        EngineUse(step_ms=engine.step_ms, steps=schedule.count(i), removed=len(engine.treatments))
        for i, engine in enumerate(level.engines)
    )


def _disk_bytes(manifest: Manifest, graphs: list[str]) -> int:
    sizes = {record.path: record.bytes for record in manifest.files}
    return sizes[manifest.weights] + sum(sizes[graph] for graph in set(graphs))

"""Strategies for valid artifacts of every kind."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import strategies as st

from unetc.artifacts import (
    Assignment,
    Bin,
    BundleEngine,
    BundleTable,
    Component,
    Control,
    ControlResult,
    Converged,
    Cost,
    Damage,
    Effect,
    EngineUse,
    Estimate,
    FileRecord,
    Level,
    Manifest,
    Measurement,
    ModelReference,
    Phase,
    Plan,
    Prediction,
    Profile,
    Verification,
)
from unetc.artifacts.call_input import CallInput
from unetc.artifacts.classes import Classes
from unetc.artifacts.manifest import BundleDecoder, Conditioning, EnginePair
from unetc.artifacts.pareto import Pareto, Point
from unetc.artifacts.record import Artifact
from unetc.sampler.table import SchedulerCount, SchedulerHeader
from unetc.treatments import Treatment

number = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=1e-6, max_value=1e9)
count = st.integers(min_value=1, max_value=2**63 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
digest = st.text("0123456789abcdef", min_size=64, max_size=64)
removal = st.sampled_from([Treatment.DROP, Treatment.MEAN])
reuse = st.sampled_from([Treatment.HOLD, Treatment.FORECAST, Treatment.HOLD_X0, Treatment.FORECAST_X0])
treatments = st.dictionaries(text, removal | reuse, max_size=3)
shape = st.tuples(*[st.integers(1, 64)] * 3)
estimates = st.tuples(number, number, number).map(sorted).map(lambda v: Estimate(low=v[0], mean=v[1], high=v[2]))
damages = st.builds(Damage, relative_l2=estimates, psnr=estimates, ssim=estimates)
measurements = st.builds(Measurement, time_ratio=number, damage=damages)
pairs = st.builds(EnginePair, engines=st.tuples(count, count), alone=st.tuples(number, number), together=number)
conditionings = st.builds(
    Conditioning,
    file=st.just("c"),
    prompts=st.lists(text, min_size=1, max_size=3).map(tuple),
    used=st.just(1),
    guidance_scale=positive,
)
models = st.builds(ModelReference, name=text, sha256=digest, pipeline=text, denoiser=text)


def edges(size: int) -> st.SearchStrategy[list[float]]:
    return st.lists(number, min_size=size, max_size=size, unique=True).map(sorted)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    others = draw(st.lists(treatments, max_size=2))
    reused = {name for own in others for name, treatment in own.items() if treatment.reuses}
    emitted = [draw(st.sets(st.sampled_from(sorted(reused - {*own})))) if reused - {*own} else () for own in others]
    engines = (
        Assignment(treatments={}, emits=tuple(sorted(reused | draw(st.sets(text, max_size=1))))),
        *(Assignment(treatments=own, emits=tuple(sorted(e))) for own, e in zip(others, emitted, strict=True)),
    )
    ends = draw(edges(draw(st.integers(2, 4))))
    cycle = st.lists(st.integers(0, len(engines) - 1), min_size=1, max_size=3).map(tuple)
    return Plan(
        unetc=draw(text),
        model=draw(models),
        profile_sha256=draw(digest),
        budget=draw(st.floats(0, 1, exclude_max=True)),
        max_engines=draw(count),
        engines=engines,
        phases=tuple(Phase(low=low, high=high, cycle=draw(cycle)) for low, high in itertools.pairwise(ends)),
        prediction=draw(st.builds(Prediction, time_ratio=number, relative_l2=number, memory=number)),
    )


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    names = draw(st.lists(text, max_size=3, unique=True))
    width = draw(st.integers(1, 3))
    ends = draw(edges(draw(st.integers(2, 4))))
    fields: dict[str, Any] = {
        "component": st.sampled_from(names or [""]),
        "bin": st.integers(0, len(ends) - 2),
        "measured": st.booleans(),
        "relative_l2": estimates,
    }
    removed = st.builds(Effect, treatment=removal, period=st.just(1), **fields)
    reused = st.builds(Effect, treatment=reuse, period=st.integers(2, 2**63 - 1), **fields)
    return Profile(
        unetc=draw(text),
        model=draw(models),
        scheduler=draw(text),
        steps=draw(count),
        samples=draw(count),
        seed=draw(count),
        target=draw(text),
        threads=draw(count),
        batch=draw(count),
        sample_shape=draw(shape),
        components=tuple(
            Component(
                name=name,
                kind=draw(st.sampled_from(["residual", "skip", "level", "step"])),
                owner=draw(text),
                index=i,
                channels=width,
                axis=draw(st.sampled_from([1, 2])),
                nested=(),
                offset=i * width,
            )
            for i, name in enumerate(names)
        ),
        bins=tuple(Bin(low=low, high=high, steps=draw(count)) for low, high in itertools.pairwise(ends)),
        full_ms=draw(st.builds(Estimate, low=st.just(1e-9), mean=st.just(0.5), high=positive.map(lambda v: v + 1))),
        full_bytes=10**6,
        costs=tuple(
            Cost(component=name, saved_ms=draw(estimates), freed_bytes=draw(st.integers(0, 10**6))) for name in names
        ),
        effects=tuple(draw(st.lists(removed | reused, max_size=3)) if names else ()),
        samplings=draw(number),
        means=tuple(draw(st.binary(min_size=n, max_size=n)) for n in [4 * width * len(names)] * (len(ends) - 1)),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    def engine(assignment: Assignment, name: str) -> BundleEngine:
        return BundleEngine(
            graph=name,
            unused_weights=tuple(draw(st.lists(text, max_size=2))),
            treatments=assignment.treatments,
            step_ms=draw(number),
            batch_ms=draw(st.dictionaries(count, positive, max_size=2).map(lambda own: tuple(sorted(own.items())))),
        )

    plan, other = draw(plans()), draw(plans())
    full = engine(Assignment(treatments={}), "engines/full.onnx")
    engines = tuple(engine(assignment, f"engines/{i}.onnx") for i, assignment in enumerate(plan.engines))
    others = tuple(engine(assignment, f"controls/{i}.onnx") for i, assignment in enumerate(other.engines))
    names = ["w", "p", "s", "c", "d", full.graph, *(e.graph for e in engines), *(e.graph for e in others)]
    counts = draw(
        st.lists(st.builds(SchedulerCount, steps=count, start=count, initial_scale=positive), min_size=1, max_size=2)
    )
    channels, *sides = draw(shape)
    inputs = st.builds(
        CallInput,
        name=text,
        axes=st.lists(count | text, max_size=3).map(tuple),
        classes=st.none() | st.builds(Classes, count=count),
        optional=st.booleans(),
    )
    return Manifest(
        unetc=draw(text),
        model=draw(models),
        target=draw(text),
        threads=draw(count),
        sample_shape=(channels, sides[0], sides[1]),
        inputs=(CallInput(name="sample", axes=(channels, "height", "width")), *draw(st.lists(inputs, max_size=2))),
        denoiser_config=draw(st.dictionaries(text, st.none() | text | st.lists(count), max_size=2)),
        predicted_channels=draw(count),
        conditioning=draw(st.none() | conditionings),
        decoder=draw(st.none() | st.builds(BundleDecoder, graph=st.just("d"), scale=count)),
        batch=draw(count),
        steps=draw(count),
        weights="w",
        profile="p",
        scheduler=SchedulerHeader(
            name=draw(text), columns=("timesteps",), clip=draw(st.none() | positive), counts=tuple(counts)
        ),
        scheduler_file="s",
        full=full,
        levels=(
            Level(
                name="27",
                plan=plan,
                engines=engines,
                measured=draw(measurements),
                evaluated=tuple(draw(st.lists(measurements, max_size=2))),
            ),
            Level(name=draw(text) + "%", plan=other, engines=others, measured=draw(measurements), evaluated=()),
        ),
        controls=(
            Control(name=draw(text), description=draw(text), plan=other, engines=others),
            Control(name=draw(text), description=draw(text), table="t"),
        ),
        tables=(bundle_table(),),
        converged=draw(st.none() | st.just("t")),
        pairs=tuple(draw(st.lists(pairs, max_size=2))),
        used_seeds=tuple(draw(st.lists(count, min_size=1, max_size=2))),
        notes=tuple(draw(st.lists(text, max_size=2))),
        files=tuple(FileRecord(path=name, bytes=draw(count), sha256=draw(digest)) for name in names),
    )


@st.composite
def curves(draw: st.DrawFn) -> Pareto:
    points = st.builds(Point, budget=number, time_ratio=number, damage=damages, plan=plans())
    return Pareto(
        unetc=draw(text),
        model=draw(models),
        profile_sha256=draw(digest),
        target=draw(text),
        environment=draw(st.dictionaries(text, text, max_size=2)),
        steps=draw(count),
        samples=draw(count),
        seed=draw(count),
        points=tuple(draw(st.lists(points, min_size=1, max_size=2))),
    )


results = st.builds(ControlResult, time_ratio=number, damage=damages, description=text)


def verifications_of(controls: list[str]) -> st.SearchStrategy[Verification]:
    return st.builds(
        Verification,
        unetc=text,
        model=models,
        plan_sha256=digest,
        target=text,
        threads=count,
        environment=st.dictionaries(text, text, max_size=2),
        budget=number,
        scheduler=text,
        steps=count,
        samples=count,
        seed=count,
        rounds=count,
        full_ms=number,
        time_ratio=number,
        time_ratio_p10=number,
        time_ratio_p90=number,
        damage=damages,
        non_finite_steps=count,
        controls=st.fixed_dictionaries(dict.fromkeys(controls, results)),
        loses_to=st.sets(st.sampled_from(controls)).map(tuple) if controls else st.just(()),
        converged=st.none()
        | st.builds(
            Converged,
            scheduler=text,
            steps=count,
            samples=count,
            full=damages,
            plan=damages,
            controls=st.fixed_dictionaries(dict.fromkeys(controls, damages)),
        ),
        engines=st.lists(st.builds(EngineUse, step_ms=number, steps=count, removed=count), max_size=2).map(tuple),
        disk_bytes=count,
        full_disk_bytes=count,
    )


verifications = st.lists(text, max_size=2, unique=True).flatmap(verifications_of)

ARTIFACTS = {
    "profile": profiles(),
    "plan": plans(),
    "manifest": manifests(),
    "verification": verifications,
    "pareto": curves(),
}
CLASSES: dict[str, type[Artifact]] = {
    "profile": Profile,
    "plan": Plan,
    "manifest": Manifest,
    "verification": Verification,
    "pareto": Pareto,
}


def bundle_table(file: str = "s", counts: int = 1) -> BundleTable:
    steps = tuple(SchedulerCount(steps=i + 1, start=0, initial_scale=1.0) for i in range(counts))
    return BundleTable(name="t", file=file, header=SchedulerHeader(name="ddim", columns=(), clip=None, counts=steps))

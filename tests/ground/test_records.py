"""Artifacts survive JSON bit for bit, refuse contradictions, and are written completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ground.records import ARTIFACTS, CLASSES, bundle_table
from unetc.artifacts import (
    Assignment,
    Bin,
    BundleEngine,
    Component,
    Control,
    ControlResult,
    Converged,
    Cost,
    Damage,
    Effect,
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
from unetc.artifacts.manifest import BundleDecoder, BundleEncoder, Conditioning, EnginePair
from unetc.artifacts.pareto import Pareto, Point
from unetc.artifacts.record import MAX_JSON_BYTES, check_writable, write_atomically, write_together
from unetc.errors import ArtifactError, CorruptArtifactError, SchemaVersionError
from unetc.sampler.table import SchedulerHeader
from unetc.treatments import Treatment

every_kind = pytest.mark.parametrize("kind", ARTIFACTS)
few = settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@every_kind
@few
@given(data=st.data())
def test_an_artifact_survives_json_to_the_bit(kind: str, data: st.DataObject) -> None:
    artifact = data.draw(ARTIFACTS[kind])
    saved = artifact.to_json()
    read = type(artifact).from_json(saved, "here")
    assert read == artifact
    assert read.to_json() == saved
    assert read.sha256() == artifact.sha256()
    json.loads(saved)


@every_kind
@few
@given(data=st.data())
def test_unknown_and_missing_fields_are_refused_at_any_depth(kind: str, data: st.DataObject) -> None:
    artifact = data.draw(ARTIFACTS[kind])
    free = {"treatments", "environment", "controls", "denoiser_config"}  # dictionaries with arbitrary keys
    # these fields have defaults: an engine that emits nothing or is not timed by batch, and a model without prompts,
    # ControlNet and decoder
    optional = {"emits", "controlnet", "prompts", "used_prompts", "guidance_scale", "conditioning", "decoder"}
    optional |= {"batch_ms", "control", "control_images", "sample_sizes", "smallest", "largest", "only"}
    records = [node for node, under in objects(json.loads(artifact.to_json())) if under not in free]
    chosen = data.draw(st.integers(0, len(records) - 1))
    required = sorted(records[chosen].keys() - (optional if "file" not in records[chosen] else set()))
    for change in ({"stranger": 1}, {required[0]: ...}):
        whole = json.loads(artifact.to_json())
        node = [node for node, under in objects(whole) if under not in free][chosen]
        changed = {name: value for name, value in (node | change).items() if value is not ...}
        node.clear()
        node.update(changed)
        with pytest.raises(CorruptArtifactError, match="here is not a valid"):
            type(artifact).from_json(json.dumps(whole).encode(), "here")


def objects(value: Any, under: str = "") -> list[tuple[dict[str, Any], str]]:
    """List all JSON objects inside a value, each with its key, from the outside in."""
    if isinstance(value, dict):
        return [(value, under), *(found for key, inner in value.items() for found in objects(inner, key))]
    if isinstance(value, list):
        return [found for inner in value for found in objects(inner, under)]
    return []


def test_equal_values_give_equal_bytes() -> None:
    one = plan(engines=(Assignment(treatments={}), Assignment(treatments={"a": Treatment.DROP, "b": Treatment.MEAN})))
    two = plan(engines=(Assignment(treatments={}), Assignment(treatments={"b": Treatment.MEAN, "a": Treatment.DROP})))
    assert one == two
    assert one.to_json() == two.to_json()
    assert one.sha256() == two.sha256() != plan().sha256()


def estimate(mean: float = 1.0) -> Estimate:
    return Estimate(low=mean / 2, mean=mean, high=2 * mean)


def damage() -> Damage:
    return Damage(relative_l2=estimate(), psnr=estimate(), ssim=estimate())


MODEL = ModelReference(name="m", sha256="0" * 64, pipeline="p", denoiser="d")


def plan(**fields: Any) -> Plan:
    defaults: dict[str, Any] = {
        "unetc": "0",
        "model": MODEL,
        "profile_sha256": "0" * 64,
        "budget": 0.5,
        "max_engines": 2,
        "engines": (Assignment(treatments={}), Assignment(treatments={"a": Treatment.DROP})),
        "phases": (Phase(low=0.0, high=1.0, cycle=(0,)), Phase(low=1.0, high=2.0, cycle=(1,))),
        "prediction": Prediction(time_ratio=0.5, relative_l2=0.1, memory=1.5),
    }
    return Plan(**defaults | fields)


def phases(*ranges: tuple[float, float]) -> tuple[Phase, ...]:
    return tuple(Phase(low=low, high=high, cycle=(0,)) for low, high in ranges)


def component(name: str = "a", channels: int = 2) -> Component:
    return Component(name=name, kind="skip", owner="o", index=0, channels=channels, axis=1, nested=(), offset=0)


def effect(**fields: Any) -> Effect:
    defaults: dict[str, Any] = {
        "component": "a",
        "treatment": Treatment.DROP,
        "period": 1,
        "bin": 0,
        "measured": True,
        "relative_l2": estimate(),
    }
    return Effect(**defaults | fields)


def profile(**fields: Any) -> Profile:
    defaults: dict[str, Any] = {
        "unetc": "0",
        "model": MODEL,
        "scheduler": "ddim",
        "steps": 4,
        "samples": 1,
        "seed": 0,
        "target": "t",
        "threads": 1,
        "batch": 1,
        "sample_shape": (1, 2, 2),
        "components": (component(),),
        "bins": (Bin(low=0.0, high=1.0, steps=4),),
        "full_ms": estimate(),
        "full_bytes": 8,
        "costs": (Cost(component="a", saved_ms=estimate(), freed_bytes=2),),
        "effects": (effect(),),
        "samplings": 3.0,
        "means": (b"12345678",),
    }
    return Profile(**defaults | fields)


def bins(*ranges: tuple[float, float, int]) -> Profile:
    """Make a profile of bins, each from its low and high end and its steps."""
    return profile(
        bins=tuple(Bin(low=low, high=high, steps=steps) for low, high, steps in ranges),
        means=(b"12345678",) * len(ranges),
    )


def engines() -> tuple[BundleEngine, ...]:
    return tuple(
        BundleEngine(
            graph=f"{i}",
            unused_weights=(),
            treatments=assignment.treatments,
            step_ms=1.0,
            batch_ms=((1, 0.5), (2, 0.7)),
        )
        for i, assignment in enumerate(plan().engines)
    )


def level(**fields: Any) -> Level:
    defaults: dict[str, Any] = {
        "name": "27%",
        "plan": plan(),
        "engines": engines(),
        "measured": Measurement(time_ratio=0.5, damage=damage()),
        "evaluated": (Measurement(time_ratio=0.6, damage=damage()),),
    }
    return Level(**defaults | fields)


def manifest(**fields: Any) -> Manifest:
    defaults: dict[str, Any] = {
        "unetc": "0",
        "model": MODEL,
        "target": "t",
        "threads": 1,
        "sample_shape": (1, 2, 2),
        "denoiser_config": {},
        "inputs": (CallInput(name="sample", axes=(1, "height", "width")),),
        "predicted_channels": 1,
        "batch": 1,
        "steps": 4,
        "weights": "w",
        "profile": "p",
        "scheduler": SchedulerHeader(name="ddim", columns=(), clip=None, counts=()),
        "scheduler_file": "s",
        "full": engines()[0],
        "levels": (level(), level(name="40%")),
        "controls": (Control(name="c", description="d", plan=plan(), engines=engines()),),
        "pairs": (EnginePair(engines=(1, 2), alone=(3.0, 4.0), together=6.0),),
        "used_seeds": (0,),
        "notes": (),
        "files": tuple(FileRecord(path=name, bytes=0, sha256="0" * 64) for name in ("w", "p", "s", "0", "1")),
    }
    return Manifest(**defaults | fields)


def curve(**fields: Any) -> Pareto:
    defaults: dict[str, Any] = {
        "unetc": "0",
        "model": MODEL,
        "profile_sha256": "0" * 64,
        "target": "t",
        "environment": {},
        "steps": 4,
        "samples": 1,
        "seed": 0,
        "points": (point(0.5, 0.1),),
    }
    return Pareto(**defaults | fields)


def verification(**fields: Any) -> Verification:
    result = ControlResult(time_ratio=1.0, damage=damage(), description="a rule")
    compared = Converged(scheduler="s", steps=4, samples=1, full=damage(), plan=damage(), controls={"a": damage()})
    numbers = ("threads", "steps", "samples", "seed", "rounds", "disk_bytes", "full_disk_bytes")
    defaults: dict[str, Any] = {
        **dict.fromkeys(("unetc", "plan_sha256", "target", "scheduler"), "t"),
        **dict.fromkeys(numbers, 1),
        **dict.fromkeys(("budget", "full_ms", "time_ratio", "time_ratio_p10", "time_ratio_p90"), 0.5),
        "model": MODEL,
        "environment": {},
        "damage": damage(),
        "controls": {"a": result},
        "converged": compared,
        "engines": (),
    }
    return Verification(**defaults | fields)


def point(time_ratio: float, relative_l2: float) -> Point:
    changed = msgspec.structs.replace(damage(), relative_l2=estimate(relative_l2))
    return Point(budget=0.1, time_ratio=time_ratio, damage=changed, plan=plan())


def holding(*, emits: tuple[str, ...] = (), period: int = 2) -> Plan:
    """Make a plan whose engine 1 holds `a` and whose engine 0 emits the given branches."""
    engines = (Assignment(treatments={}, emits=emits), Assignment(treatments={"a": Treatment.HOLD}))
    return plan(engines=engines, phases=(Phase(low=0.0, high=1.0, cycle=(0, *[1] * (period - 1))),))


def file(path: str = "x", size: int = 0, sha256: str = "0" * 64) -> FileRecord:
    return FileRecord(path=path, bytes=size, sha256=sha256)


CONTRADICTIONS: dict[str, Callable[[], object]] = {
    "an estimate below its interval": lambda: Estimate(low=1.0, mean=0.5, high=2.0),
    "an estimate above its interval": lambda: Estimate(low=0.0, mean=3.0, high=2.0),
    "an estimate that is not a number": lambda: Estimate(low=0.0, mean=float("nan"), high=2.0),
    "a verification with less than no step made again": lambda: verification(non_finite_steps=-1),
    "a verification that loses to nothing known": lambda: verification(loses_to=("b",)),
    "a verification whose controls were compared in part": lambda: verification(controls={}),
    "a verification of a model without bytes": lambda: verification(full_disk_bytes=0),
    "an unbounded estimate": lambda: Estimate(low=0.0, mean=1.0, high=float("inf")),
    "an empty phase": lambda: Phase(low=1.0, high=1.0, cycle=(0,)),
    "a phase with swapped ends": lambda: Phase(low=1.0, high=0.0, cycle=(0,)),
    "an unbounded phase, which JSON cannot express": lambda: Phase(low=-float("inf"), high=0.0, cycle=(0,)),
    "a phase that begins at NaN": lambda: Phase(low=float("nan"), high=0.0, cycle=(0,)),
    "a phase without an engine": lambda: Phase(low=0.0, high=1.0, cycle=()),
    "an empty bin": lambda: Bin(low=1.0, high=1.0, steps=1),
    "an unbounded bin": lambda: Bin(low=0.0, high=float("inf"), steps=1),
    "an assignment that lists a kept component": lambda: Assignment(treatments={"a": Treatment.KEEP}),
    "phases that overlap": lambda: plan(phases=phases((0, 2), (1, 3))),
    "phases with a gap": lambda: plan(phases=phases((0, 1), (1.5, 3))),
    "phases out of order": lambda: plan(phases=phases((1, 2), (0, 1))),
    "no phase": lambda: plan(phases=()),
    "no engine": lambda: plan(engines=(), phases=(Phase(low=0.0, high=1.0, cycle=(0,)),)),
    "a first engine that is not the full model": lambda: plan(engines=plan().engines[::-1]),
    "an unknown engine": lambda: plan(phases=(Phase(low=0.0, high=1.0, cycle=(0, 2)),)),
    "a negative engine": lambda: plan(phases=(Phase(low=0.0, high=1.0, cycle=(-1,)),)),
    "a budget of 100 %": lambda: plan(budget=1.0),
    "a negative budget": lambda: plan(budget=-0.1),
    "a budget that is not a number": lambda: plan(budget=float("nan")),
    "a prediction that is not a number": lambda: plan(
        prediction=Prediction(time_ratio=float("nan"), relative_l2=0.0, memory=1.0)
    ),
    "a component with an unknown one nested in it": lambda: profile(
        components=(msgspec.structs.replace(component(), nested=("b",)),)
    ),
    "an effect of an unknown component": lambda: profile(components=(component("b"),)),
    "a cost of an unknown component": lambda: profile(components=(component("b"),), effects=()),
    "two components with the same name": lambda: profile(components=(component(),) * 2),
    "an effect in an unknown bin": lambda: profile(effects=(effect(bin=1),)),
    "an effect of dropping with period 0": lambda: effect(period=0),
    "an effect of keeping": lambda: effect(treatment=Treatment.KEEP),
    "a period for a dropped component": lambda: effect(period=2),
    "a period for a component replaced by its mean": lambda: effect(treatment=Treatment.MEAN, period=2),
    "a held component without refreshes": lambda: effect(treatment=Treatment.HOLD),
    "a forecast component without refreshes": lambda: effect(treatment=Treatment.FORECAST, period=1),
    "an engine that emits a dropped branch": lambda: Assignment(treatments={"a": Treatment.DROP}, emits=("a",)),
    "an engine that emits a held branch": lambda: Assignment(treatments={"a": Treatment.HOLD}, emits=("b", "a")),
    "an engine 0 that does not emit held branches": lambda: holding(),
    "an engine 0 that emits other branches": lambda: holding(emits=("b",)),
    "a curve without points": lambda: curve(points=()),
    "a point whose time is not a number": lambda: point(float("nan"), 0.1),
    "means of another width": lambda: profile(components=(component(channels=3),)),
    "means of another number of bins": lambda: profile(means=()),
    "bins with a gap": lambda: bins((0.0, 1.0, 4), (2.0, 3.0, 4)),
    "bins that overlap": lambda: bins((0.0, 1.0, 4), (0.5, 3.0, 4)),
    "bins out of order": lambda: bins((1.0, 2.0, 4), (0.0, 1.0, 4)),
    "bins without a step": lambda: bins((0.0, 1.0, 0), (1.0, 2.0, 0)),
    "a bin with less than no steps": lambda: bins((0.0, 1.0, -1), (1.0, 2.0, 2)),
    "no bins": lambda: profile(bins=(), means=(), effects=()),
    "a full model without weights": lambda: profile(full_bytes=0),
    "a removal that frees more bytes than exist": lambda: profile(full_bytes=1),
    "a removal that frees a negative number of bytes": lambda: profile(
        costs=(Cost(component="a", saved_ms=estimate(), freed_bytes=-1),)
    ),
    "a full model that takes no time": lambda: profile(full_ms=Estimate(low=-1.0, mean=0.0, high=1.0)),
    "a path that leads outside": lambda: file("../x"),
    "an absolute path": lambda: file("/x"),
    "a negative size": lambda: file(size=-1),
    "a hash that is too short": lambda: file(sha256="0" * 63),
    "a hash in capitals": lambda: file(sha256="A" * 64),
    "a graph that is not listed": lambda: manifest(files=manifest().files[:-1]),
    "a file listed twice": lambda: manifest(files=manifest().files + manifest().files[:1]),
    "two files that differ in case": lambda: manifest(files=(*manifest().files, file("W"))),
    "an engine without a graph": lambda: level(engines=engines()[:1]),
    "a bundle without a level": lambda: manifest(levels=()),
    "two levels of one name": lambda: manifest(levels=(level(), level())),
    "a level called full": lambda: level(name="full"),
    "a level without a name": lambda: level(name=""),
    "a time of no samples": lambda: msgspec.structs.replace(engines()[0], batch_ms=((0, 1.0),)),
    "times of batches in another order": lambda: msgspec.structs.replace(engines()[0], batch_ms=((2, 1.0), (1, 1.0))),
    "a call that takes no time": lambda: msgspec.structs.replace(engines()[0], batch_ms=((1, 0.0),)),
    "a time that is not a number": lambda: msgspec.structs.replace(engines()[0], batch_ms=((1, float("nan")),)),
    "a control without graphs": lambda: Control(name="c", description="d", plan=plan(), engines=()),
    "a control without a plan or a schedule": lambda: Control(name="c", description="d"),
    "a control of the full model with engines": lambda: Control(
        name="c", description="d", engines=engines(), table="t"
    ),
    "a control along a schedule that is not there": lambda: manifest(
        controls=(Control(name="c", description="d", table="t"),)
    ),
    "a converged schedule that is not there": lambda: manifest(converged="t"),
    "two schedules of one name": lambda: manifest(tables=(bundle_table(), bundle_table())),
    "a schedule whose file is not listed": lambda: manifest(tables=(bundle_table(file="t"),)),
    "a schedule of two numbers of steps": lambda: bundle_table(counts=2),
    "a bundle without seeds": lambda: manifest(used_seeds=()),
    "samples without pixels": lambda: manifest(sample_shape=(1, 0, 2)),
    "a sample without channels": lambda: manifest(inputs=(CallInput(name="sample", axes=()),)),
    "a decoder that makes nothing": lambda: BundleDecoder(graph="d", scale=0),
    "an encoder that divides by nothing": lambda: BundleEncoder(graph="e", scale=0),
    "prompts for images without pixels": lambda: Conditioning(
        file="c", prompts=("a",), used=1, guidance_scale=1.0, size=(0, 64)
    ),
}


def test_the_records_that_are_contradicted_below_are_valid() -> None:
    verification()
    along = manifest(controls=(Control(name="c", description="d", table="t"),), tables=(bundle_table(),), converged="t")
    for valid in (plan(), holding(emits=("a",)), profile(), manifest(), along, curve()):
        assert type(valid).from_json(valid.to_json(), "here") == valid
    file()
    verification()


@pytest.mark.parametrize("make", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictory_records_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bin(low=0.0, high=1.0, steps=1),
        lambda: Estimate(mean=0.5, low=0.0, high=1.0),
        lambda: CallInput(name="text", axes=(8, 64)),
    ],
)
def test_a_good_record_is_not_written_out(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An analysis that goes on reads tens of thousands of them."""
    monkeypatch.setattr(type(make()), "__repr__", lambda _: pytest.fail("it was written out"))
    make()


def test_a_bad_record_is_written_out() -> None:
    with pytest.raises(ValueError, match=r"must enclose its mean, got Estimate\(mean=2.0, low=0.0, high=1.0\)"):
        Estimate(mean=2.0, low=0.0, high=1.0)


def test_only_holding_and_forecasting_reuse() -> None:
    reuses = {"hold", "forecast", "hold_x0", "forecast_x0"}
    assert {treatment.value for treatment in Treatment if treatment.reuses} == reuses
    assignment = Assignment(treatments={name: Treatment(name) for name in ("drop", "mean", *reuses)})
    assert assignment.reused == reuses


@pytest.mark.parametrize(("together", "excess"), [(5.0, 1.0), (10.0, 2.0), (2.5, 0.5), (0.0, 0.0)])
def test_a_pair_is_compared_with_the_root_of_the_sum_of_squares(together: float, excess: float) -> None:
    assert EnginePair(engines=(1, 2), alone=(3.0, 4.0), together=together).excess == pytest.approx(excess)


def test_a_pair_that_does_nothing_adds_up() -> None:
    assert EnginePair(engines=(1, 2), alone=(0.0, 0.0), together=0.0).excess == 1


def test_no_point_beats_the_front_in_both_time_and_damage() -> None:
    best = [point(0.4, 0.3), point(0.5, 0.2), point(0.9, 0.0)]
    others = [point(0.4, 0.5), point(0.5, 0.3), point(0.6, 0.2), point(1.0, 0.0)]
    assert curve(points=(*others, *best[::-1])).front() == tuple(best)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=8))
def test_every_point_is_on_the_front_or_beaten_by_one_that_is(places: list[tuple[int, int]]) -> None:
    front = curve(points=tuple(point(*place) for place in places)).front()
    found = [(one.time_ratio, one.damage.relative_l2.mean) for one in front]
    assert all(fast < slow and more > less for (fast, more), (slow, less) in itertools.pairwise(found))
    assert {*found} <= {*places}
    assert all(any(time <= t and loss <= d for time, loss in found) for t, d in places)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"low": 0.5', b'"low": 1.5'),
        (b'"treatment": "drop"', b'"treatment": "explode"'),
        (b'"kind": "skip"', b'"kind": "attention"'),
        (b'"treatment": "drop"', b'"treatment": "hold"'),
        (b'"treatment": "drop"', b'"treatment": "keep"'),
        (b'"period": 1', b'"period": 2'),
        (b'"measured": true', b'"measured": 1'),
        (b'"bin": 0', b'"bin": 7'),
        (b'"bin": 0', b'"bin": 0.5'),
        (b'"steps": 4', b'"steps": "4"'),
        (b'"mean": 1.0', b'"mean": null'),
        (b'"mean": 1.0', b'"mean": 1e999'),
        (b"MTIzNDU2Nzg=", b"MTIzNDU2"),
        (b"MTIzNDU2Nzg=", b"!!!"),
    ],
)
def test_a_contradiction_in_a_file_is_a_corrupt_artifact(old: bytes, new: bytes) -> None:
    saved = profile().to_json()
    assert old in saved
    with pytest.raises(CorruptArtifactError, match="here is not a valid profile"):
        Profile.from_json(saved.replace(old, new), "here")


@every_kind
def test_another_schema_version_is_told_apart_from_damage(kind: str) -> None:
    artifact_class = CLASSES[kind]
    own = artifact_class.SCHEMA
    for other in (own - 1, own + 1):
        with pytest.raises(SchemaVersionError, match=f"schema {other}, this unetc reads schema {own}"):
            artifact_class.from_json(b'{"schema": %d, "whatever": []}' % other, "here")
    empty = b'{"schema": %d}' % own
    for damaged in (b"", b"{", b"{}", empty, b'{"schema": null}', b'{"schema": 1.5}', b"\xff", b"[" * 10**5):
        with pytest.raises(CorruptArtifactError, match="here is not a valid"):
            artifact_class.from_json(damaged, "here")


def test_a_plan_emits_nothing_by_default() -> None:
    def without_emits(whole: Plan) -> bytes:
        text = json.loads(whole.to_json())
        for engine in text["engines"]:
            del engine["emits"]
        return json.dumps(text).encode()

    assert Plan.from_json(without_emits(plan()), "here") == plan()
    with pytest.raises(CorruptArtifactError, match="engine 0 must emit"):
        Plan.from_json(without_emits(holding(emits=("a",))), "here")


def test_the_version_of_the_layout_is_saved() -> None:
    for saved, schema in ((plan(), 3), (profile(), 3), (manifest(), 8), (curve(), 3)):
        assert json.loads(saved.to_json())["schema"] == type(saved).SCHEMA == schema


def test_records_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        plan().budget = 0.1  # type: ignore[misc]
    assert msgspec.structs.replace(plan(), budget=0.1).budget == 0.1


def test_saving_and_loading(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "plan.json"
    plan().save(path)
    assert Plan.load(path) == plan()
    assert path.read_bytes() == plan().to_json()
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(path.parent) == ["plan.json"]


def test_an_unreadable_file_is_an_artifact_error(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as hole:
        hole.truncate(MAX_JSON_BYTES + 1)
    for name in ("missing", ".", "huge", "huge/below", "a" * 300):
        with pytest.raises(ArtifactError):
            Plan.load(tmp_path / name)
    (tmp_path / "pareto.json").write_bytes(curve().to_json())
    with pytest.raises(CorruptArtifactError, match=r"pareto\.json is not a valid plan"):
        Plan.load(tmp_path / "pareto.json")
    (tmp_path / "plan.json").write_bytes(plan().to_json())
    with pytest.raises(CorruptArtifactError, match=r"plan\.json is not a valid pareto"):
        Pareto.load(tmp_path / "plan.json")
    (tmp_path / "profile.json").write_bytes(profile().to_json())
    with pytest.raises(CorruptArtifactError, match=r"profile\.json is not a valid plan"):
        Plan.load(tmp_path / "profile.json")


def test_writing_replaces_a_file(tmp_path: Path) -> None:
    for data in (b"old", b"a longer one", b""):
        write_atomically(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=str)
@pytest.mark.parametrize("function", ["fsync", "replace", "fdopen", "fchmod"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, stop: BaseException
) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def fail(*arguments: Any, **options: Any) -> None:
        raise stop

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else ArtifactError):
        write_atomically(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_without_room_for_one_of_several_files_all_stay(tmp_path: Path) -> None:
    names = ("first", "second")
    for name in names:
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(ArtifactError, match=r"cannot write .*aaa"):
        write_together({**{tmp_path / name: b"new" for name in names}, tmp_path / ("a" * 300): b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(names, b"old")
    write_together({tmp_path / name: b"new" for name in names})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys(names, b"new")


WRITES = """
import os, sys
from pathlib import Path
from unetc.artifacts.record import write_atomically
os.fsync = lambda handle: (print("half", flush=True), sys.stdin.read())
write_atomically(Path(sys.argv[1]), b"half")
"""


def test_the_next_writer_deletes_the_file_of_a_killed_one_and_no_other(tmp_path: Path) -> None:
    path, others = tmp_path / "profile.json", (".profile.json.swp", ".profile.json", ".profile.json2.unetc-a")
    for name in others:
        (tmp_path / name).touch()
    command = [sys.executable, "-c", WRITES, str(path)]
    with contextlib.ExitStack() as running:
        killed, alive = (
            running.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            for _ in range(2)
        )
        for process in (killed, alive):
            assert process.stdout is not None
            assert process.stdout.readline() == b"half\n"
        killed.kill()
        killed.wait()
        assert len(os.listdir(tmp_path)) == len(others) + 2
        write_atomically(path, b"whole")
        (left,) = {*os.listdir(tmp_path)} - {*others, path.name}
        assert (tmp_path / left).read_bytes() in (b"", b"half")
        assert path.read_bytes() == b"whole"
    assert alive.returncode == 0
    assert {*os.listdir(tmp_path)} == {*others, path.name}


@pytest.mark.parametrize("write", [check_writable, partial(write_atomically, data=b"new")])
@pytest.mark.parametrize("place", ["folder", "file/below", "file/deep/below", "a" * 300, "a\0b"])
def test_an_unwritable_place_is_an_artifact_error(tmp_path: Path, write: Callable[[Path], None], place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="cannot write"):
        write(tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("write", [check_writable, partial(write_atomically, data=b"new")])
def test_pipes_and_devices_keep_their_place(tmp_path: Path, write: Callable[[Path], None]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        with pytest.raises(ArtifactError, match="it is a device or a pipe"):
            write(tmp_path / name)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("write", [check_writable, partial(write_atomically, data=b"new")])
def test_a_name_without_room_for_a_temporary_one_is_refused_before_any_work(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    with pytest.raises(ArtifactError, match="File name too long"):
        write(tmp_path / ("n" * 245))
    write(tmp_path / ("n" * 235))


def test_checking_a_place_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new" / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert os.listdir(tmp_path / "new") == []

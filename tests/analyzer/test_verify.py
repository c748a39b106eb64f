"""A verification compares every contender with the full model and with the converged trajectory, and names losers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from rich.console import Console

from tests.command import run
from unetc.analyzer import verify as verifying
from unetc.analyzer.report import write_report
from unetc.analyzer.verify import VerifyOptions, verify
from unetc.artifacts import Verification
from unetc.artifacts.profile import ModelReference
from unetc.artifacts.verification import WHICH_FIGURE, EngineUse
from unetc.backend import Array, Backend, Loader, Program, SerialisedGraph
from unetc.cli.summary import verification_table
from unetc.device import Device, Tensor
from unetc.errors import ArtifactError
from unetc.metrics.damage import measure_damage
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session

ROUNDS = 2


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def result(bundle: Bundle) -> Verification:
    return verify(bundle, VerifyOptions(rounds=ROUNDS))


def test_every_control_of_the_bundle_is_measured(bundle: Bundle, result: Verification) -> None:
    names = [control.name for control in bundle.manifest.controls]
    assert {"fewer_steps", "other_solver"} <= {*names}
    assert {*result.controls} == {"random" if name.startswith("random-") else name for name in names}
    descriptions = {control.name: control.description for control in bundle.manifest.controls}
    assert result.controls["fewer_steps"].description == descriptions["fewer_steps"]
    assert result.controls["random"].description.endswith("(3 plans)")
    assert result.loses_to == result.beaten_by()


def test_every_contender_is_compared_with_the_converged_trajectory(bundle: Bundle, result: Verification) -> None:
    converged = result.converged
    assert converged is not None
    assert converged.samples == result.samples
    assert converged.steps >= 500
    assert {*converged.controls} == {*result.controls}
    session = Session.of(bundle, open_backend("onnxruntime:cpu", threads=1))
    assert bundle.manifest.converged is not None
    truth = session.along(bundle.tables[bundle.manifest.converged])
    count = ROUNDS * bundle.manifest.batch
    reference = truth.sample(count, seed=result.seed, full_model=True)
    for own, sampled in (
        (converged.full, session.sample(count, seed=result.seed, full_model=True)),
        (converged.plan, session.sample(count, seed=result.seed)),
    ):
        expected = measure_damage(reference, sampled).relative_l2.mean
        np.testing.assert_allclose(own.relative_l2.mean, expected, rtol=1e-3)
    assert converged.full.relative_l2.mean > 0


def test_the_seed_of_verify_chooses_no_control(bundle: Bundle, result: Verification) -> None:
    again = verify(bundle, VerifyOptions(rounds=1, seed=result.seed + 1, converged=False))
    described = {name: control.description for name, control in result.controls.items()}
    assert {name: control.description for name, control in again.controls.items()} == described
    assert again.converged is None


def test_without_controls_fewer_steps_are_those_of_the_bundle(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = msgspec.structs.replace(bundle.manifest, controls=(), converged=None)
    monkeypatch.setattr(verifying, "_steps_of_equal_time", lambda session, sample: 3)
    plain = verify(replace(bundle, manifest=manifest), VerifyOptions(rounds=1))
    assert plain.converged is None
    text = plain.controls["fewer_steps"].description
    assert text == "the full model with fewer steps (3 of 4), from another noise level"


@pytest.mark.parametrize(("ratio", "expected"), [(0.1, 1), (0.5, 2), (0.99, 3), (2.5, 3)])
def test_fewer_steps_are_fewer_than_those_of_the_full_model(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, ratio: float, expected: int
) -> None:
    """Timings vary, so a plan that saves little may seem slower than the full model."""
    monkeypatch.setattr(verifying, "interleaved_ms", lambda *_, **__: np.array([[1.0, ratio]]))
    session = Session.of(bundle, open_backend("onnxruntime:cpu", threads=1))
    assert verifying._steps_of_equal_time(session, lambda **_: None) == expected


def test_one_step_has_no_control_of_fewer(bundle: Bundle) -> None:
    manifest = msgspec.structs.replace(bundle.manifest, controls=(), converged=None, steps=1)
    assert verify(replace(bundle, manifest=manifest), VerifyOptions(rounds=1)).controls == {}


def test_a_losing_plan_and_both_distances_are_printed(result: Verification) -> None:
    best = min(result.controls, key=lambda name: result.controls[name].damage.relative_l2.mean)
    faster = msgspec.structs.replace(result.controls[best], time_ratio=0.01)
    far = measure_damage(np.ones((2, 1, 12, 12), np.float32), np.zeros((2, 1, 12, 12), np.float32))
    converged = result.converged
    assert converged is not None
    compared = msgspec.structs.replace(converged, controls={best: converged.controls[best]})
    losing = msgspec.structs.replace(result, controls={best: faster}, loses_to=(best,), damage=far, converged=compared)
    assert losing.beaten_by() == (best,)
    console = Console(width=400, record=True)
    console.print(verification_table(losing))
    text = " ".join(console.export_text().split())
    assert f"The plan loses to {best}: less damage in no more time." in text
    assert WHICH_FIGURE in text
    winning = msgspec.structs.replace(result, controls={}, loses_to=(), converged=None)
    console.print(verification_table(winning))
    text = console.export_text()
    assert "loses" not in text
    assert "converged" not in text


@dataclass(frozen=True)
class Breaking:
    """A backend whose programs give NaN whenever they are called, except for those of some graphs."""

    inner: Backend
    sound: frozenset[bytes]

    @property
    def device(self) -> Device:
        return self.inner.device

    def open_weights(self, weights: bytes) -> Loader:
        loader = self.inner.open_weights(weights)

        def load(graph: SerialisedGraph) -> Program:
            program = loader.load(graph)

            def broken(inputs: Mapping[str, Tensor], output: Array) -> Mapping[str, Tensor]:
                emitted = program(inputs, output)
                output[0, 0, 0, 0] = np.nan
                return emitted

            return program if graph.graph in self.sound else broken

        return SimpleNamespace(load=load)


def test_steps_that_the_full_model_made_again_are_counted(
    bundle: Bundle, result: Verification, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = (bundle.path / bundle.manifest.full.graph).read_bytes()
    breaking = Breaking(open_backend("onnxruntime:cpu", threads=1), frozenset({full}))
    monkeypatch.setattr(verifying, "open_backend", lambda *_, **__: breaking)
    manifest = msgspec.structs.replace(bundle.manifest, controls=())
    found = verify(replace(bundle, manifest=manifest), VerifyOptions(rounds=1, converged=False))
    session = Session.of(bundle, open_backend("onnxruntime:cpu", threads=1))
    engines = (session.plan.engines[number] for number in session.schedule(bundle.manifest.steps))
    broken = sum(bool(engine.treatments) for engine in engines)
    assert 0 < found.non_finite_steps == 2 * broken
    assert found.made_again() is not None
    console = Console(width=400, record=True)
    console.print(verification_table(found))
    assert f"NaN or infinity in {2 * broken} of 8 steps. The full model made these again" in console.export_text()
    assert (result.non_finite_steps, result.made_again()) == (0, None)


def test_few_batches_are_compared_with_the_converged_trajectory(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "CONVERGED_ROUNDS", 1)
    some = verify(bundle, VerifyOptions(rounds=2, batch=1))
    assert some.samples == 2
    assert some.converged is not None
    assert some.converged.samples == 1


def test_a_report_takes_the_verification_of_its_bundle(tiny_bundle: Path, result: Verification, tmp_path: Path) -> None:
    write_report(tiny_bundle, tmp_path / "report.html", verification=Verification.from_json(result.to_json(), "v.json"))
    assert result.model.sha256 in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("field", "other", "told"),
    [
        (
            "model",
            ModelReference(name="m", sha256="0" * 64, pipeline="P", denoiser="D"),
            "model m with weights 000000000000",
        ),
        ("scheduler", "heun", "scheduler heun, the bundle has ddim"),
        ("steps", 50, "steps 50, the bundle has 4"),
        ("threads", 99, "threads 99, the bundle has 1"),
        ("plan_sha256", "0" * 64, "plan 000000000000, the bundle has"),
        (
            "engines",
            (EngineUse(step_ms=0.123456, steps=4, removed=0),),
            "milliseconds of the engines 0.123456, the bundle",
        ),
    ],
)
def test_a_verification_that_differs_from_the_bundle_in_one_fact_is_not_reported(
    tiny_bundle: Path, result: Verification, tmp_path: Path, field: str, other: object, told: str
) -> None:
    """The plan alone names no bundle: one plan may be built with several numbers of steps."""
    changed = msgspec.structs.replace(result, **{field: other})
    with pytest.raises(ArtifactError) as caught:
        write_report(tiny_bundle, tmp_path / "report.html", verification=changed)
    assert f"the verification is of another bundle: it has {told}" in str(caught.value)
    assert f"Run `unetc verify {tiny_bundle} -o FILE`" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_command_leaves_the_converged_trajectory_out(tiny_bundle: Path) -> None:
    printed = run("verify", tiny_bundle, "--rounds", 1, "--batch", 1, "--no-converged", "--json").json
    assert printed["converged"] is None
    assert isinstance(printed["loses_to"], list)

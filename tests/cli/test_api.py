"""The Python interface goes the whole way, with the functions that the commands call."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest

import unetc
from unetc.artifacts import Plan, Profile
from unetc.errors import ArtifactError, MissingDependency

SMALL = {"steps": 4, "samples": 2, "bins": 2, "batch": 2, "rounds": 2, "threads": 1}


@pytest.fixture(scope="module")
def profile(tiny_model: Path, cache: Path) -> Profile:
    return unetc.analyze(str(tiny_model), unetc.AnalysisOptions(**SMALL), cache=cache)


def test_a_model_is_analysed(profile: Profile, tiny_model: Path, cache: Path) -> None:
    assert (profile.steps, len(profile.bins), profile.model.name) == (4, 2, str(tiny_model))
    source = unetc.ModelSource(str(tiny_model))
    assert unetc.analyze(source, unetc.AnalysisOptions(**SMALL), cache=str(cache)) == profile


def test_a_profile_is_planned(profile: Profile) -> None:
    plan = unetc.plan(profile, unetc.PlanOptions(budget=0.2))
    assert plan.prediction.time_ratio <= 0.8 + 1e-6
    assert plan.profile_sha256 == profile.sha256()


def test_a_bundle_is_built_verified_reported_and_sampled(
    profile: Profile, tiny_model: Path, cache: Path, tmp_path: Path
) -> None:
    plan = unetc.plan(profile, unetc.PlanOptions(budget=0.2))
    options = unetc.BuildOptions(plan=unetc.PlanOptions(budget=0.2), steps=4, controls=False)
    seen: list[str] = []
    manifest = unetc.build(
        str(tiny_model),
        str(tmp_path / "bundle"),
        options,
        profile=profile,
        plan=plan,
        cache=cache,
        on_progress=lambda report: seen.append(report.stage),
    )
    assert manifest.plan == plan
    assert seen
    result = unetc.verify(str(tmp_path / "bundle"), unetc.VerifyOptions(rounds=1))
    assert result.plan_sha256 == plan.sha256()
    unetc.write_report(str(tmp_path / "bundle"), str(tmp_path / "report.html"), verification=result)
    assert "The most redundant components" in (tmp_path / "report.html").read_text()
    assert np.isfinite(unetc.load(str(tmp_path / "bundle")).sample(batch=2, seed=0)).all()


def test_a_build_without_a_profile_analyses_first(
    tiny_model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[unetc.AnalysisOptions] = []

    def analyze_model(model: object, options: unetc.AnalysisOptions, **_: object) -> None:
        seen.append(options)
        raise unetc.UnetcError("enough")

    monkeypatch.setattr("unetc.analyzer.analyze.analyze_model", analyze_model)
    options = unetc.BuildOptions(plan=unetc.PlanOptions(budget=0.2), steps=9)
    own = unetc.AnalysisOptions(**SMALL)
    for analysis in (None, own):
        with pytest.raises(unetc.UnetcError, match="enough"):
            unetc.build(str(tiny_model), tmp_path / "bundle", options, analysis=analysis, cache=cache)
    assert (seen[0].steps, seen[0].scheduler, seen[1]) == (9, "ddim", own)
    with pytest.raises(unetc.UnetcError, match="enough"):
        unetc.analyze(str(tiny_model), cache=cache)
    assert seen[2].steps == 50


def test_a_bad_destination_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unetc.models.find.find_model", lambda *_: pytest.fail("worked first"))
    (tmp_path / "mine").write_text("mine")
    options = unetc.BuildOptions(plan=unetc.PlanOptions(budget=0.2))
    with pytest.raises(ArtifactError, match="is not a bundle"):
        unetc.build("digits", tmp_path / "mine", options)


def test_a_curve_is_measured(profile: Profile, tiny_model: Path, cache: Path) -> None:
    options = unetc.ParetoOptions(budgets=1, steps=4, planner="exact", repair=unetc.RepairOptions(evaluations=1))
    curve = unetc.pareto(str(tiny_model), options, profile=profile, cache=cache)
    assert curve.front()
    assert isinstance(curve.points[0].plan, Plan)


def test_engines_are_compiled(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = unetc.CompileOptions(target="tensorrt-rtx")
    if importlib.util.find_spec("tensorrt_rtx") is None:
        with pytest.raises(MissingDependency, match=r"unetc\[rtx\]"):
            unetc.compile(tiny_bundle, options, cache=tmp_path)
    calls: list[tuple[object, ...]] = []

    def compile_bundle(bundle: Path, options: unetc.CompileOptions, *, cache: Path, **_: object) -> tuple[()]:
        calls.append((bundle, options, cache))
        return ()

    monkeypatch.setattr("unetc.compiler.tensorrt.compile_bundle.compile_bundle", compile_bundle)
    assert unetc.compile(str(tiny_bundle), options, cache=str(tmp_path)) == ()
    assert calls == [(tiny_bundle, options, tmp_path)]


def test_a_source_names_a_model_once() -> None:
    source = unetc.ModelSource("digits")
    assert (source.weights, source.loras, source.controlnet) == (None, (), False)
    assert unetc.ModelSource.of("digits") == source
    assert unetc.ModelSource.of(source) is source
    with pytest.raises(FrozenInstanceError):
        source.name = "other"  # type: ignore[misc]


def test_a_missing_library_is_named_with_its_extra(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    options = unetc.PlanOptions(budget=0.1)
    for module in [name for name in sys.modules if name.startswith(("unetc.compiler.planner", "scipy"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "scipy", None)  # type: ignore[arg-type]
    with pytest.raises(MissingDependency, match=r"scipy: pip install 'unetc\[compile\]'"):
        unetc.plan(profile, options)

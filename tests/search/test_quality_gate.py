"""A quality gate is read and printed exactly, and a build that fails it writes nothing and names a passing budget."""

from __future__ import annotations

import re
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unetc.artifacts import Damage, Estimate, Measurement, Plan, Profile
from unetc.compiler import build as building
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.bench import Measured
from unetc.compiler.search.pareto import ParetoOptions
from unetc.compiler.search.quality_gate import QualityGate
from unetc.compiler.search.repair import RepairOptions
from unetc.errors import PlanError, QualityGateError
from unetc.models.find import find_model
from unetc.progress import ignore


def estimate(mean: float) -> Estimate:
    return Estimate(low=mean - 1, mean=mean, high=mean + 1)


def damage(relative_l2: float = 0.1, psnr: float = 30.0, ssim: float = 0.9) -> Damage:
    return Damage(relative_l2=estimate(relative_l2), psnr=estimate(psnr), ssim=estimate(ssim))


@pytest.mark.parametrize(
    ("typed", "metric", "bound"),
    [
        ("psnr>=30", "psnr", 30.0),
        ("psnr >= 30.5", "psnr", 30.5),
        ("  ssim>=.9  ", "ssim", 0.9),
        ("ssim>=-1", "ssim", -1.0),
        ("ssim>=1", "ssim", 1.0),
        ("psnr>=100", "psnr", 100.0),
        ("psnr>=-5", "psnr", -5.0),
        ("relative-l2<=0", "relative-l2", 0.0),
        ("relative-l2<=0.05", "relative-l2", 0.05),
        ("relative-l2 <= 5e-2", "relative-l2", 0.05),
    ],
)
def test_a_gate_is_read_as_typed(typed: str, metric: str, bound: float) -> None:
    gate = QualityGate.parse(typed)
    assert (gate.metric, gate.bound) == (metric, bound)
    assert QualityGate.parse(str(gate)) == gate


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "psnr",
        "psnr>=",
        ">=30",
        "psnr>=thirty",
        "psnr>30",
        "psnr=30",
        "psnr<=30",
        "ssim<=0.9",
        "relative-l2>=0.05",
        "fid<=3",
        "PSNR>=30",
        "psnr>=30 dB",
        "psnr>=1e",
        "psnr>=--3",
        "psnr>=nan",
        "psnr>=inf",
        "psnr>=30\nssim>=1",
    ],
)
def test_what_is_no_gate_is_refused_with_examples(typed: str) -> None:
    with pytest.raises(PlanError, match=r"Expected psnr>=DB, ssim>=VALUE or relative-l2<=VALUE"):
        QualityGate.parse(typed)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("psnr>=100.1", "Expected at most 100, got 100.1"),
        ("psnr>=1e999", "Expected at most 100, got inf"),
        ("psnr>=-1e999", "Expected at most 100, got -inf"),
        ("ssim>=1.01", "Expected -1 to 1, got 1.01"),
        ("ssim>=-2", "Expected -1 to 1, got -2"),
        ("relative-l2<=-1", "Expected at least 0, got -1"),
        ("relative-l2<=1e999", "Expected at least 0, got inf"),
    ],
)
def test_a_bound_that_no_measurement_could_meet_or_miss_is_refused(typed: str, expected: str) -> None:
    with pytest.raises(PlanError, match=re.escape(expected)):
        QualityGate.parse(typed)


@pytest.mark.parametrize(("bound", "message"), [(nan, "bound is nan"), (inf, "at most 100"), (101.0, "at most 100")])
def test_a_gate_made_in_python_is_checked_too(bound: float, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        QualityGate(metric="psnr", bound=bound)
    with pytest.raises(PlanError, match=r"metric 'fid'\. Expected psnr, ssim or relative-l2"):
        QualityGate(metric="fid", bound=30.0)


@pytest.mark.parametrize(
    ("typed", "passes"),
    [
        ("psnr>=29.9", True),
        ("psnr>=30", True),
        ("psnr>=30.1", False),
        ("ssim>=0.89", True),
        ("ssim>=0.9", True),
        ("ssim>=0.91", False),
        ("relative-l2<=0.11", True),
        ("relative-l2<=0.1", True),
        ("relative-l2<=0.09", False),
    ],
)
def test_a_gate_bounds_the_mean_of_its_own_metric(typed: str, passes: bool) -> None:
    assert QualityGate.parse(typed).passes(damage()) is passes


@given(st.sampled_from(["psnr>=", "ssim>=", "relative-l2<="]), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_less_damage_never_fails_a_gate_that_more_passes(metric: str, one: float, two: float) -> None:
    worse, better = sorted([one, two], reverse=metric.startswith("relative"))
    gate = QualityGate.parse(f"{metric}0.5")
    if gate.passes(damage(worse, worse, worse)):
        assert gate.passes(damage(better, better, better))


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the scheduler tables that no test here looks at."""
    monkeypatch.setattr("unetc.compiler.prepare.STEP_COUNTS", (4,))


@pytest.mark.usefixtures("few_steps")
def test_a_build_that_no_budget_can_save_writes_nothing(
    tiny_model: Path, tiny_build: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(plan=PlanOptions(budget=0.2), steps=4, quality_gate=QualityGate.parse("psnr>=100"))
    monkeypatch.setattr(QualityGate, "passes", lambda gate, damage: False)  # small budgets may leave equal images
    profile, plan = Profile.load(tiny_build / "profile.json"), Plan.load(tiny_build / "plan.json")
    with pytest.raises(QualityGateError) as caught:
        build(find_model(str(tiny_model)), profile, tmp_path / "bundle", options, cache=cache, plan=plan)
    message = str(caught.value)
    assert "psnr>=100 fails at budget 0.3, which saves 30 %:" in message  # the budget of the plan that was given
    assert re.search(r"measured psnr is \d", message)
    assert re.search(r"No budget above 0\.0\d+ passes", message)
    assert "Nothing was written" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("few_steps")
def test_a_failed_gate_leaves_an_older_bundle_alone(
    tiny_model: Path, tiny_build: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, plan = Profile.load(tiny_build / "profile.json"), Plan.load(tiny_build / "plan.json")
    common: dict[str, Any] = {"cache": cache, "plan": plan}
    model = find_model(str(tiny_model))
    passing = BuildOptions(
        plan=PlanOptions(budget=0.2), steps=4, quality_gate=QualityGate.parse("psnr>=1"), controls=False
    )
    manifest = build(model, profile, tmp_path / "bundle", passing, **common)
    assert manifest.controls == ()
    before = (tmp_path / "bundle" / "manifest.json").read_bytes()
    monkeypatch.setattr(building, "QUALITY_GATE_SEARCH_STEPS", 0)
    failing = BuildOptions(plan=PlanOptions(budget=0.2), steps=4, quality_gate=QualityGate.parse("relative-l2<=0.001"))
    with pytest.raises(QualityGateError):
        build(model, profile, tmp_path / "bundle", failing, **common)
    assert (tmp_path / "bundle" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("best", [0.0, 0.03, 0.1, 0.24, 0.299])
@pytest.mark.parametrize("refused", [0.05, 1.0])
def test_the_largest_budget_that_passes_is_found(monkeypatch: pytest.MonkeyPatch, best: float, refused: float) -> None:
    """Let damage grow with the budget; some budgets have no plan at all, which counts as not passing."""
    tried: list[float] = []

    def fit_plan(
        workbench: object, options: PlanOptions, notes: list[str], *, correction: float
    ) -> tuple[float, float]:
        tried.append(options.budget)
        assert correction == 1.5
        if options.budget > refused:
            raise PlanError("no plan")
        return options.budget, correction

    def measure(candidate: float, *, seed: int) -> Measured:
        assert seed == 8  # not the seed of the search
        measurement = Measurement(time_ratio=1 - candidate, damage=damage(relative_l2=candidate))
        return Measured(measurement=measurement, non_finite_steps=0)

    def repair(workbench: object, candidate: float, budget: float, *others: object) -> SimpleNamespace:
        assert candidate == budget
        return SimpleNamespace(candidate=candidate)

    monkeypatch.setattr(building, "fit_plan", fit_plan)
    monkeypatch.setattr(building, "repair", repair)
    failed = building._Fitted(
        candidate=SimpleNamespace(),  # type: ignore[arg-type]
        correction=1.5,
        measured=measure(0.3, seed=8).measurement,
        plain=None,
        evaluated=(),
    )
    gate = QualityGate.parse(f"relative-l2<={best}")
    error = building._quality_gate_failed(
        SimpleNamespace(measure=measure),  # type: ignore[arg-type]
        PlanOptions(budget=0.3),
        gate,
        failed,
        7,
        lambda progress: None,
        tune=True,
    )
    assert len(tried) == building.QUALITY_GATE_SEARCH_STEPS
    expected, width = min(best, refused), 0.3 / 2**building.QUALITY_GATE_SEARCH_STEPS
    assert f"(searched to ±{width:.3f})" in str(error)
    if expected < width:
        assert f"No budget above {width:.3f} passes" in str(error)
    else:
        (found,) = re.findall(r"The largest budget that passes is about (\S+) ", str(error))
        assert expected - width - 5e-4 <= float(found) <= expected + 5e-4


def test_a_plan_that_passes_only_on_the_samples_of_the_search_is_not_taken(
    tiny_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four plans pass in the search; fresh samples are worse, so the fastest two fail."""
    gate, given = QualityGate.parse("psnr>=30"), Plan.load(tiny_build / "plan.json")
    found = {0.5: 30.5, 0.6: 30.2, 0.7: 31.5, 0.8: 33.0}
    points = [SimpleNamespace(time_ratio=time, damage=damage(psnr=psnr), plan=given) for time, psnr in found.items()]
    taken: list[float] = []
    traced: list[ParetoOptions] = []
    loss = 1.0

    def measure(workbench: object, plan: Plan, options: object, seed: int, notes: list[str]) -> SimpleNamespace:
        taken.append(round(1 - plan.budget, 2))
        notes.append(f"measured {taken[-1]}")
        return SimpleNamespace(measured=SimpleNamespace(damage=damage(psnr=found[taken[-1]] - loss)))

    monkeypatch.setattr(building, "trace", lambda setup, options, on_progress: traced.append(options))
    monkeypatch.setattr(building, "refine", lambda *arguments: SimpleNamespace(points=points))
    monkeypatch.setattr(building, "_measure", measure)
    repair = RepairOptions(evaluations=3, tune=False)
    options = BuildOptions(plan=PlanOptions(budget=0.2), steps=4, at=gate, repair=repair)
    notes: list[str] = []
    setup: Any = SimpleNamespace(workbench=SimpleNamespace(compile=lambda plan: plan))
    chosen = building._search(setup, options, gate, notes, 7, ignore)
    assert chosen.measured.damage.psnr.mean == 30.5
    assert taken == [0.5, 0.7], "0.6 is no better than 0.5, which failed"
    assert notes == ["measured 0.7"]
    assert not traced[0].repair.tune
    assert traced[0].repair.evaluations == 3
    taken.clear()
    second = replace(options, quality_gate=QualityGate.parse("psnr>=32"))
    assert building._search(setup, second, gate, [], 7, ignore).measured.damage.psnr.mean == 32.0
    assert taken == [0.8], "the others fail the second gate on the samples of the search"
    impossible = replace(options, quality_gate=QualityGate.parse("psnr>=50"))
    with pytest.raises(QualityGateError, match=r"no plan of the curve passes psnr>=30 and psnr>=50"):
        building._search(setup, impossible, gate, [], 7, ignore)
    loss = 10.0
    with pytest.raises(QualityGateError, match=r"3 plans pass psnr>=30 on the samples .* none does on fresh ones.*23"):
        building._search(setup, options, gate, notes, 7, ignore)

"""Controls are the strongest simpler ways to take a plan's time, on the tiny model with times set by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.analyzer.sweeps import estimate_of
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.artifacts.plan import Plan
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.planner.restriction import Restriction
from unetc.compiler.schedulers.extract import extract
from unetc.compiler.schedulers.make import scheduler_for
from unetc.compiler.schedulers.same_start import CONVERGED_STEPS, from_same_start
from unetc.compiler.search import bench
from unetc.compiler.search.bench import SearchBench
from unetc.compiler.search.candidate import Candidate
from unetc.compiler.search.controls import make_controls
from unetc.compiler.search.find_plan import choose_again, find_plan
from unetc.compiler.search.fit import TOLERANCE, hold_everywhere
from unetc.compiler.search.jobs import Judge, Judged
from unetc.compiler.search.repair import RepairOptions, repair_all
from unetc.compiler.search.restricted import _spend, fit_restricted
from unetc.compiler.search.schedules import fewer_steps, other_solver
from unetc.compiler.search.set_up import Setup, set_up
from unetc.compiler.search.workbench import TUNED_BATCHES, Workbench
from unetc.errors import PlanError
from unetc.jobs import Advance
from unetc.models.find import find_model
from unetc.progress import ignore
from unetc.sampler.table import SchedulerTables
from unetc.treatments import Treatment

STEPS = 8
ANALYSIS = AnalysisOptions(steps=STEPS, samples=2, bins=4, batch=2, rounds=2, threads=1, decisive=4)
SEED = 1
NO_REPAIR = RepairOptions(evaluations=0)


@pytest.fixture(scope="module")
def setup(tiny_model: Path, cache: Path) -> Iterator[Setup]:
    """Let an engine that holds or forecasts the step take no time, and every other engine as much as the full model."""
    compile_plan = Workbench.compile

    def timed(self: Workbench, plan: Plan) -> Candidate:
        candidate = compile_plan(self, plan)
        step_ms = tuple(0.0 if "step" in engine.treatments else 1.0 for engine in plan.engines)
        used = self.schedule(candidate)
        return replace(
            candidate, full_ms=1.0, step_ms=step_ms, time_ratio=sum(step_ms[engine] for engine in used) / len(used)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "ENGINE_SECONDS", 0.0)
        patch.setattr(bench, "ENGINE_ROUNDS", 1)
        patch.setattr(Workbench, "compile", timed)
        model = find_model(str(tiny_model))
        with set_up(model, analyze_model(model, ANALYSIS, cache=cache), steps=STEPS, cache=cache) as setup:
            yield setup


def restricted(setup: Setup, restriction: Restriction, target: float, repair: RepairOptions = NO_REPAIR) -> Candidate:
    limits = PlanOptions(budget=target)
    search = fit_restricted(setup.workbench, restriction, target, 1.0, SEED, limits=limits, options=repair)
    repair_all(setup.workbench, (search,), ignore)
    return search.repaired.candidate


@pytest.mark.parametrize("restriction", [Restriction.STEPS_ONLY, Restriction.CHOSEN_STEPS])
@pytest.mark.parametrize("target", [0.25, 0.27, 0.375])
def test_a_control_of_whole_steps_takes_the_time_and_no_less(
    setup: Setup, restriction: Restriction, target: float
) -> None:
    found = restricted(setup, restriction, target)
    assert target * (1 - TOLERANCE) <= found.saving < target + 1 / STEPS
    used = {pair for engine in found.plan.engines for pair in engine.treatments.items()}
    assert {name for name, _ in used} == {"step"}
    if restriction is Restriction.CHOSEN_STEPS:
        assert {treatment for _, treatment in used} == {Treatment.HOLD}


def test_a_control_is_repaired_as_the_plan_is(setup: Setup) -> None:
    plain, repaired = (
        setup.workbench.damage(restricted(setup, Restriction.STEPS_ONLY, 0.25, one), seed=SEED).relative_l2.mean
        for one in (NO_REPAIR, RepairOptions(evaluations=15, patience=15))
    )
    assert repaired < plain


def test_time_that_is_left_goes_to_the_last_calls_however_many_calls_a_step_has() -> None:
    """Two steps of a scheduler with several calls per step: the schedule has six."""

    def rescheduled(candidate: Any, schedule: Sequence[int]) -> Any:
        return SimpleNamespace(schedule=tuple(schedule), saving=sum(schedule) / len(schedule))

    workbench: Any = SimpleNamespace(steps=2, schedule=lambda candidate: candidate.schedule, reschedule=rescheduled)
    spent: Any = _spend(workbench, rescheduled(None, (0, 1, 0, 1, 0, 1)), 1 / 3)
    assert spent.schedule == (0, 1, 0, 1, 0, 0)


def test_a_control_that_cannot_save_enough_is_refused(setup: Setup) -> None:
    with pytest.raises(PlanError, match=r"no plan of this kind saves 30 % of the time; the most that was saved is 0 %"):
        restricted(setup, Restriction.REMOVAL_ONLY, 0.3)  # engines that remove components take as long, see `setup`


def test_fewer_steps_are_the_best_of_all_spacings(setup: Setup) -> None:
    workbench, model = setup.workbench, setup.prepared.model
    found = fewer_steps(workbench, model, 0.6, SEED)
    full = workbench.scheduler.table(STEPS)
    choices = from_same_start(model, workbench.scheduler.name, full, 5)
    assert len(choices) > 2
    schedules = [SchedulerTables(name="x", tables=(table,)) for table in choices.values()]
    damages = dict(zip(choices, workbench.damages_along(schedules, seed=SEED), strict=True))
    losses = {spacing: damage.relative_l2.mean for spacing, damage in damages.items() if damage is not None}
    best = min(losses, key=lambda spacing: losses[spacing])
    assert found.scheduler.counts == (5,)
    assert f"(5 of 8); spacing {best}, the best of {len(choices)}" in found.description
    assert workbench.damages_along([found.scheduler], seed=SEED) == [damages[best]]


def test_a_full_schedule_is_no_control(setup: Setup) -> None:
    found = fewer_steps(setup.workbench, setup.prepared.model, 0.99, SEED)
    assert found.scheduler.counts == (STEPS - 1,)


def test_the_better_of_two_solvers_is_named(setup: Setup) -> None:
    found = other_solver(setup.workbench, setup.prepared.model, 0.5, SEED)
    assert found.scheduler.name in ("dpmsolver++", "unipc")
    assert found.scheduler.tables[0].steps == 4
    assert ("DPM-Solver++ 2M" in found.description) == (found.scheduler.name == "dpmsolver++")
    assert found.scheduler.tables[0].starts_like(setup.workbench.scheduler.table(STEPS))


def test_another_solver_makes_no_more_calls_than_the_full_model(setup: Setup) -> None:
    found = other_solver(setup.workbench, setup.prepared.model, 1.3, SEED)
    assert found.scheduler.tables[0].steps == STEPS


def test_another_solver_follows_no_stochastic_trajectory(setup: Setup) -> None:
    model = setup.prepared.model
    table = extract(scheduler_for("ddpm", model), STEPS)
    workbench: Any = SimpleNamespace(scheduler=SchedulerTables(name="ddpm", tables=(table,)), steps=STEPS)
    with pytest.raises(PlanError, match="ddpm adds noise in every step, so another scheduler follows another"):
        other_solver(workbench, model, 0.5, SEED)


def test_all_controls_are_made_and_the_others_are_noted(setup: Setup) -> None:
    workbench = setup.workbench
    plan = workbench.compile(hold_everywhere(setup.profile, "step", 2))
    notes: list[str] = []
    controls = make_controls(
        workbench,
        setup.prepared.model,
        plan,
        1.0,
        notes,
        SEED,
        ignore,
        time_ratio=plan.time_ratio,
        whole_steps=None,
        limits=PlanOptions(budget=0.5),
        repair=NO_REPAIR,
        random_plans=1,
    )
    names = [one.name for one in controls.made]
    assert names[:4] == ["fewer_steps", "other_solver", "steps_only", "chosen_steps"]
    assert {"random-1"} <= {*names}
    assert "removal_only" not in names
    assert any(note.startswith("left out the control removal_only: no plan of this kind saves") for note in notes)
    assert all((one.candidate is None) != (one.scheduler is None) for one in controls.made)
    assert controls.converged is not None
    assert controls.converged.tables[0].steps >= CONVERGED_STEPS


@pytest.mark.parametrize("tune", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_plan_is_never_worse_than_its_control_of_whole_steps(setup: Setup, tune: bool) -> None:
    """Both are judged on more batches than the search sees, and the control is the best that the search found."""
    workbench, options, notes = setup.workbench, RepairOptions(evaluations=20, patience=20, tune=tune), list[str]()
    found = find_plan(workbench, PlanOptions(budget=0.25), options, notes, SEED, ignore)
    assert found.whole_steps is not None
    assert found.candidate.saving >= 0.25
    assert found.whole_steps.saving >= 0.25
    assert {name for engine in found.whole_steps.plan.engines for name in engine.treatments} == {"step"}
    (_, plan), (_, whole) = workbench.judge(
        (found.candidate, found.whole_steps), seed=SEED, batches=TUNED_BATCHES, tune=tune
    )
    assert plan.relative_l2.mean <= whole.relative_l2.mean
    assert any(note.startswith("judged the best") for note in notes)
    controls = make_controls(
        workbench,
        setup.prepared.model,
        found.candidate,
        1.0,
        notes,
        SEED,
        ignore,
        time_ratio=found.candidate.time_ratio,
        whole_steps=found.whole_steps,
        limits=PlanOptions(budget=0.25),
        repair=replace(NO_REPAIR, tune=tune),
        random_plans=0,
    )
    (control,) = (one.candidate for one in controls.made if one.name == "steps_only")
    assert control is not None
    assert workbench.schedule(control) == workbench.schedule(found.whole_steps)


def test_the_final_judgement_corrects_a_search_that_saw_one_batch(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one batch the worst schedule looks best; on more batches it does not."""
    workbench, options = setup.workbench, RepairOptions(evaluations=20, patience=20)
    run = Judge.run

    def flatter(self: Judge, bench: SearchBench, advance: Advance) -> Judged:
        judged = run(self, bench, advance)
        shown = estimate_of(1 / (1e-9 + judged.damage.relative_l2.mean))
        flattered = replace(judged, damage=msgspec.structs.replace(judged.damage, relative_l2=shown))
        return flattered if self.batches == 1 else judged

    def true(candidate: Candidate) -> float:
        return workbench.tune(candidate, seed=SEED, batches=TUNED_BATCHES)[1].relative_l2.mean

    monkeypatch.setattr(Judge, "run", flatter)
    found = find_plan(workbench, PlanOptions(budget=0.25), options, [], SEED, ignore)
    saving = [one for one in found.evaluated if one.candidate.saving >= 0.25]
    looked_best, second, *_ = sorted(saving, key=lambda one: one.damage.relative_l2.mean)
    assert true(found.candidate) <= min(true(looked_best.candidate), true(second.candidate)) * (1 + 1e-6)


def test_a_plan_that_saves_too_little_is_chosen_again_from_what_was_sampled(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    workbench, options = setup.workbench, RepairOptions(evaluations=20, patience=20)
    found = find_plan(workbench, PlanOptions(budget=0.25), options, [], SEED, ignore)
    monkeypatch.setattr("unetc.compiler.search.find_plan.repair_all", None)  # nothing is searched again
    savings = sorted({one.candidate.saving for one in found.evaluated})
    for budget in (*savings, savings[-1] + 0.01):
        again = choose_again(workbench, found, budget, options, [], SEED, ignore)
        if budget > savings[-1]:
            assert again is None
            continue
        assert again is not None
        assert again.candidate.saving >= budget
        assert again.candidate.plan.budget == budget
        assert again.evaluated == found.evaluated
        schedules = {workbench.schedule(one.candidate) for one in found.evaluated}
        assert workbench.schedule(again.candidate) in schedules

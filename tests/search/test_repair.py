"""Local search on measured damage, pairs of engines and the curve, on the tiny model."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.analyzer.sweeps import estimate_of
from tests.every_day import every_nth
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.artifacts.pareto import Pareto
from unetc.artifacts.plan import Assignment
from unetc.artifacts.profile import Profile
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.additivity import check_pairs
from unetc.compiler.search.bench import RUINED, SearchBench
from unetc.compiler.search.candidate import Candidate
from unetc.compiler.search.fit import fit_deep_hold, fit_plan, fit_random, hold_everywhere
from unetc.compiler.search.pareto import ParetoOptions, fastest_passing, refine, trace
from unetc.compiler.search.quality_gate import QualityGate
from unetc.compiler.search.repair import RepairOptions, Search, repair, repair_all
from unetc.compiler.search.set_up import Setup, set_up
from unetc.compiler.search.workbench import Workbench
from unetc.errors import QualityGateError
from unetc.jobs import InProcess, Workers
from unetc.models.find import find_model
from unetc.progress import ignore
from unetc.report.curve import draw
from unetc.treatments import Treatment

STEPS = 8
ANALYSIS = AnalysisOptions(steps=STEPS, samples=2, bins=4, batch=2, rounds=2, threads=1, decisive=4)


@pytest.fixture(scope="module")
def setup(tiny_model: Path, cache: Path) -> Iterator[Setup]:
    model = find_model(str(tiny_model))
    with set_up(model, analyze_model(model, ANALYSIS, cache=cache), steps=STEPS, cache=cache) as setup:
        yield setup


def test_time_is_measured_against_a_model_that_emits_nothing(setup: Setup) -> None:
    plan = hold_everywhere(setup.profile, "step", 2)
    emitting = setup.workbench.compile(plan)
    assert b"computed." in emitting.graphs[0].graph
    assert b"computed." not in setup.workbench.full.graph
    always = setup.workbench.reschedule(emitting, [0] * STEPS)
    assert always.time_ratio == pytest.approx(
        emitting.time_ratio
        + (STEPS * emitting.step_ms[0] - sum(emitting.step_ms[e] for e in setup.workbench.schedule(emitting)))
        / (STEPS * emitting.full_ms)
    )
    silent = msgspec.structs.replace(plan, engines=(Assignment(treatments={}),), phases=always.plan.phases)
    full = setup.workbench.compile(silent)
    assert full.graphs == (setup.workbench.full,)
    assert full.time_ratio == 1
    assert full.step_ms == (full.full_ms,)


def timed_by_hand(workbench: Workbench, candidate: Candidate) -> Candidate:
    """Let a forecasting engine take no time: on a busy machine, measured times would decide how far repair may go."""
    schedule = workbench.schedule(candidate)
    taken = schedule.count(0) / len(schedule)
    return replace(candidate, full_ms=1.0, step_ms=(1.0,) + (0.0,) * (len(candidate.step_ms) - 1), time_ratio=taken)


def test_repair_never_does_more_damage_and_keeps_the_budget(setup: Setup) -> None:
    candidate = timed_by_hand(setup.workbench, setup.workbench.compile(hold_everywhere(setup.profile, "step", 2)))
    found = repair(setup.workbench, candidate, 0.25, 1, RepairOptions(evaluations=20, patience=20), ignore)
    damages = [one.damage.relative_l2.mean for one in found.evaluated]
    assert found.damage.relative_l2.mean == min(damages) < damages[0]  # half of the steps need not be forecast
    again = setup.workbench.damage(found.candidate, seed=1)  # a session sums a step in another order than the tuner
    assert found.damage.relative_l2.mean == pytest.approx(again.relative_l2.mean, rel=1e-4)
    assert min(one.candidate.saving for one in found.evaluated) == 3 / 8  # 2 / 8 is an edge, missed half of the time
    schedules = [setup.workbench.schedule(one.candidate) for one in found.evaluated]
    assert len(set(schedules)) == len(schedules) > 3
    assert all(schedule[0] == 0 for schedule in schedules)


def test_a_plan_with_nan_is_the_worst_although_the_full_model_makes_its_steps_again(
    setup: Setup, tiny_model: Path, cache: Path
) -> None:
    level = next(component for component in setup.profile.components if component.kind == "level")
    means = [np.frombuffer(row, "<f4").copy() for row in setup.profile.means]
    for row in means:  # two infinite sums of opposite signs
        row[level.offset : level.offset + level.channels : 2] = 3e38
        row[level.offset + 1 : level.offset + level.channels : 2] = -3e38
    spoilt = msgspec.structs.replace(setup.profile, means=tuple(row.tobytes() for row in means))
    engines = (Assignment(treatments={}), Assignment(treatments={level.name: Treatment.MEAN}))
    plan = hold_everywhere(spoilt, "step", 2)
    plan = msgspec.structs.replace(plan, engines=engines)
    with set_up(find_model(str(tiny_model)), spoilt, steps=STEPS, cache=cache) as other:
        candidate = other.workbench.compile(plan)
        assert other.workbench.damage(candidate, seed=1) == RUINED
        tuned, damage = other.workbench.tune(candidate, seed=1, batches=1)
        assert (tuned.tuned, damage) == (None, RUINED)
        measured = other.workbench.measure(candidate, seed=2)
    assert measured.non_finite_steps > 0
    assert measured.measurement.damage.relative_l2.mean < 1e-3


def test_repair_asks_for_no_more_than_the_plan_saves(setup: Setup) -> None:
    candidate = timed_by_hand(setup.workbench, setup.workbench.compile(hold_everywhere(setup.profile, "step", 2)))
    found = repair(setup.workbench, candidate, 0.5, 1, RepairOptions(evaluations=6, patience=6), ignore)
    assert candidate.saving == min(one.candidate.saving for one in found.evaluated) == 0.5
    assert len(found.evaluated) > 1


def test_repair_is_repeatable_and_can_be_switched_off(setup: Setup) -> None:
    candidate = setup.workbench.compile(hold_everywhere(setup.profile, "step", 2))
    options = RepairOptions(evaluations=5, patience=5)
    first, second = (repair(setup.workbench, candidate, 0.2, 1, options, ignore) for _ in range(2))
    assert first.candidate.plan == second.candidate.plan
    none = repair(setup.workbench, candidate, 0.2, 1, RepairOptions(evaluations=0), ignore)
    assert none.candidate.plan is candidate.plan
    assert len(none.evaluated) == 1


@dataclass(frozen=True, kw_only=True)
class OutOfOrder(Workers[SearchBench]):
    """Workers in one process that end their jobs in a random order."""

    bench: SearchBench
    count: int
    machine: str = "this machine"
    notes: tuple[str, ...] = ()
    busy: list[int] = field(default_factory=list)
    """Number of jobs that were running whenever one ended."""

    def run(self, jobs: Iterable[Any], **how: Any) -> Iterator[tuple[int, Any]]:
        generator, fresh, running, given = random.Random(self.count), iter(jobs), dict[int, Any](), 0
        while True:
            while len(running) < self.count and (job := next(fresh, None)) is not None:
                running[given] = job
                given += 1
            if not running:
                return
            self.busy.append(len(running))
            ended = generator.choice([*running])
            yield ended, running.pop(ended).run(self.bench, lambda done: None)

    def run_alone(self, job: Any, advance: Any = None) -> Any:
        raise AssertionError("a search of schedules times nothing")

    def sharing(self, shared: Any) -> Any:
        raise AssertionError("a search shares nothing")


@pytest.mark.parametrize(("count", "tune"), every_nth(5, [2, 3, 8], [True, False]))
def test_searches_on_many_workers_sample_and_find_the_same(setup: Setup, count: int, tune: bool) -> None:
    workbench, options = setup.workbench, RepairOptions(evaluations=14, patience=6, tune=tune)
    candidates = [
        timed_by_hand(workbench, workbench.compile(hold_everywhere(setup.profile, "step", period))) for period in (2, 3)
    ]

    def searched(workers: Workers[SearchBench], *, together: bool) -> list[Search]:
        bench = replace(workbench, workers=workers)
        searches = [Search(bench, candidate, 0.25, 1, options) for candidate in candidates]
        for group in [searches] if together else [[search] for search in searches]:
            repair_all(bench, group, ignore)
        return searches

    def sampled(search: Search) -> list[tuple[object, ...]]:
        evaluated = search.repaired.evaluated
        return [(workbench.schedule(one.candidate), one.candidate.time_ratio, one.damage) for one in evaluated]

    assert isinstance(workbench.workers, InProcess)
    many = OutOfOrder(bench=workbench.workers.bench, count=count)
    expected = searched(workbench.workers, together=False)
    for found in (searched(many, together=True), searched(many, together=False)):
        assert [sampled(search) for search in found] == [sampled(search) for search in expected]
        assert [search.repaired.damage for search in found] == [search.repaired.damage for search in expected]
    assert max(many.busy) == count, "no worker is idle while there is a schedule to sample"


def test_pairs_of_engines_are_measured_alone_and_together(setup: Setup) -> None:
    candidate, _ = fit_plan(setup.workbench, PlanOptions(budget=0.2, max_engines=3), [])
    used = {*setup.workbench.schedule(candidate)} - {0}
    pairs = check_pairs(setup.workbench, candidate, 1, ignore)
    assert len(pairs) == len(used) * (len(used) - 1) // 2
    for pair in pairs:
        assert set(pair.engines) <= used
        assert min(*pair.alone, pair.together) > 0
        assert pair.together <= sum(pair.alone) * 1.5
        assert pair.excess > 0


def test_the_rule_of_deepcache_holds_one_level_with_one_period(setup: Setup) -> None:
    candidate = fit_deep_hold(setup.workbench, 0.15, seed=1)
    (phase,) = candidate.plan.phases
    assert phase.cycle[0] == 0
    assert {*phase.cycle[1:]} == {1}
    (name,) = candidate.plan.engines[1].treatments
    assert name.startswith("level:")


def test_random_plans_differ_and_repeat(setup: Setup) -> None:
    plans = [fit_random(setup.workbench, 0.2, 1.0, seed, max_engines=3).plan for seed in (0, 1)]
    assert plans[0].engines != plans[1].engines


@pytest.fixture(scope="module")
def curve(setup: Setup) -> Pareto:
    options = ParetoOptions(budgets=3, steps=STEPS, repair=RepairOptions(evaluations=3, patience=3))
    return trace(setup, options, ignore)


def test_the_curve_keeps_every_plan_that_was_sampled(curve: Pareto, setup: Setup) -> None:
    assert len(curve.points) >= 3
    assert {point.budget for point in curve.points} <= {0.1, 0.45, 0.8}
    assert all(point.time_ratio <= 1 - point.budget + 1e-9 for point in curve.points)
    assert all(point.plan.profile_sha256 == curve.profile_sha256 for point in curve.points)
    front = curve.front()
    times = [point.time_ratio for point in front]
    damages = [point.damage.relative_l2.mean for point in front]
    assert times == sorted(times)
    assert damages == sorted(damages, reverse=True)
    for point in curve.points:
        assert any(
            p.time_ratio <= point.time_ratio and p.damage.relative_l2.mean <= point.damage.relative_l2.mean
            for p in front
        )
    assert Pareto.from_json(curve.to_json(), "curve") == curve
    assert isinstance(setup.profile, Profile)


def test_the_fastest_point_that_passes_is_picked(curve: Pareto) -> None:
    front = curve.front()
    middle = front[len(front) // 2]
    gate = QualityGate(metric="relative-l2", bound=middle.damage.relative_l2.mean)
    assert fastest_passing(curve, gate) == middle
    with pytest.raises(QualityGateError, match="no point"):
        fastest_passing(curve, QualityGate(metric="psnr", bound=99.0))


def test_a_gate_on_another_metric_is_not_held_to_the_front(curve: Pareto) -> None:
    """A point with a higher PSNR may do more damage in relative L2, and be slower."""
    point = curve.front()[0]
    better = msgspec.structs.replace(point.damage.psnr, low=99.0, mean=99.5, high=100.0)
    worse = msgspec.structs.replace(point.damage.relative_l2, mean=point.damage.relative_l2.high)
    own = msgspec.structs.replace(
        point,
        time_ratio=point.time_ratio + 0.01,
        damage=msgspec.structs.replace(point.damage, psnr=better, relative_l2=worse),
    )
    both = msgspec.structs.replace(curve, points=(*curve.points, own))
    assert own not in both.front()
    assert fastest_passing(both, QualityGate(metric="psnr", bound=99.2)) == own
    with pytest.raises(QualityGateError, match=r"the best has psnr 99.5 "):
        fastest_passing(both, QualityGate(metric="psnr", bound=100.0))


def test_the_gap_behind_the_fastest_point_that_passes_is_searched(curve: Pareto, setup: Setup) -> None:
    front = curve.front()
    gate = QualityGate(metric="relative-l2", bound=front[len(front) // 2].damage.relative_l2.mean)
    options = ParetoOptions(budgets=3, steps=STEPS, repair=RepairOptions(evaluations=1))
    refined = refine(setup, curve, gate, options, ignore)
    assert refined.points[: len(curve.points)] == curve.points
    assert len(refined.points) > len(curve.points)
    assert fastest_passing(refined, gate).time_ratio <= fastest_passing(curve, gate).time_ratio


def test_the_curve_is_drawn_and_labelled_where_there_is_room(curve: Pareto) -> None:
    some = curve.points[0]

    def labels(*times: float) -> int:
        """Draw points at rising times that no machine has measured; the slower, the less damage."""
        points = [
            msgspec.structs.replace(
                some, time_ratio=time, damage=msgspec.structs.replace(some.damage, relative_l2=loss)
            )
            for time, loss in zip(times, map(estimate_of, np.linspace(0.5, 0.1, len(times)).tolist()), strict=True)
        ]
        picture = draw(msgspec.structs.replace(curve, points=tuple(points)))
        assert picture.startswith("<svg")
        return picture.count(" dB")

    assert labels(0.1, 0.4, 0.7, 1.0) == 4
    assert labels(0.1, 0.1001, 0.1002, 1.0) == 2
    assert draw(curve).startswith("<svg")


def test_a_single_step_leaves_nothing_to_repair(tiny_model: Path, setup: Setup, cache: Path) -> None:  # G1
    with set_up(find_model(str(tiny_model)), setup.profile, steps=1, cache=cache) as short:
        candidate = short.workbench.compile(hold_everywhere(setup.profile, "step", 2))
        assert len(repair(short.workbench, candidate, 0.0, 0, RepairOptions(), ignore).evaluated) == 1

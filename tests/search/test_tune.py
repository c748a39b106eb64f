"""Rows tuned to a plan: less damage on new samples, the same table everywhere, and nothing changed without a plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.search.sessions import session_of
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.fit import hold_everywhere
from unetc.compiler.search.repair import RepairOptions
from unetc.compiler.search.set_up import Setup, set_up
from unetc.compiler.search.tune import record, tune
from unetc.models.find import find_model
from unetc.runtime.session import Session, load
from unetc.sampler.table import SchedulerTable

STEPS = 8
SEED, NEW = 5, 6


@pytest.fixture(scope="module", params=["dpmsolver++", pytest.param("ddpm", marks=pytest.mark.nightly)])
def setup(request: pytest.FixtureRequest, tiny_model: Path, cache: Path) -> Iterator[Setup]:
    model = find_model(str(tiny_model))
    options = AnalysisOptions(
        scheduler=request.param, steps=STEPS, samples=2, bins=2, batch=2, rounds=2, threads=1, decisive=1
    )
    with set_up(model, analyze_model(model, options, cache=cache), steps=STEPS, cache=cache) as setup:
        yield setup


def error(session: Session, seed: int, batch: int = 4) -> float:
    full = session.sample(batch, seed=seed, full_model=True, latents=True)
    return float(np.linalg.norm(session.sample(batch, seed=seed, latents=True) - full) / np.linalg.norm(full))


def test_tuned_rows_do_less_damage_on_new_samples(setup: Setup) -> None:
    workbench = setup.workbench
    plain = workbench.compile(hold_everywhere(setup.profile, "step", 2))
    tuned, damage = workbench.tune(plain, seed=SEED, batches=2)
    with_tuned, with_plain = session_of(workbench, tuned), session_of(workbench, plain)
    assert error(with_tuned, NEW) < error(with_plain, NEW)
    assert damage.relative_l2.mean < workbench.damage(plain, seed=SEED, batches=2).relative_l2.mean
    assert error(session_of(workbench, workbench.plain(tuned)), NEW) == error(with_plain, NEW)


def test_a_session_samples_what_was_tuned(setup: Setup) -> None:
    """The tuner makes the steps by itself, and a session through its loop: both agree on the damage."""
    tuned, damage = setup.workbench.tune(
        setup.workbench.compile(hold_everywhere(setup.profile, "step", 2)), seed=SEED, batches=2
    )
    measured = setup.workbench.damage(tuned, seed=SEED, batches=2)
    assert measured.relative_l2.mean == pytest.approx(damage.relative_l2.mean, rel=1e-3)


def test_rows_before_the_first_treated_step_stay(setup: Setup) -> None:
    plan = setup.workbench.compile(hold_everywhere(setup.profile, "step", 2))
    late = setup.workbench.reschedule(plan, [0] * (STEPS - 2) + [1, 0])
    tuned, _ = setup.workbench.tune(late, seed=SEED, batches=1)
    table, plain = tuned.tuned, setup.workbench.scheduler.table(STEPS)
    assert table is not None
    for name in ("sample_coefficients", "prediction_coefficients"):
        before = getattr(table, name)[: STEPS - 2]
        assert np.array_equal(before[:, : plain.window], getattr(plain, name)[: STEPS - 2])
        assert not before[:, plain.window :].any()
    assert not np.array_equal(table.sample_coefficients[-1, : plain.window], plain.sample_coefficients[-1])


def test_the_full_model_keeps_its_rows(setup: Setup) -> None:
    bench = setup.workbench
    full = bench.reschedule(bench.compile(hold_everywhere(setup.profile, "step", 2)), [0] * STEPS)
    same, damage = bench.tune(full, seed=SEED, batches=1)
    assert same.tuned is None
    assert damage.relative_l2.mean < 1e-5


def recovered(session: Session, table: SchedulerTable) -> SchedulerTable:
    recordings = [record(session, range(first, first + 2), seed=SEED, steps=STEPS) for first in (0, 2)]
    return tune(session, table, recordings).table


def test_rows_that_are_right_are_not_changed(setup: Setup) -> None:
    """Where the plan predicts what the full model does, nothing is left to correct."""
    bench = setup.workbench
    plan = bench.compile(hold_everywhere(setup.profile, "step", 2))
    harmless = session_of(bench, bench.reschedule(plan, [0] * STEPS))
    schedule = iter([1] * STEPS)
    harmless.schedule = lambda steps: tuple(next(schedule) for _ in range(steps))  # type: ignore[method-assign]
    plain = bench.scheduler.table(STEPS)
    found = recovered(harmless, plain)
    window = plain.window
    assert np.allclose(found.sample_coefficients[:, :window], plain.sample_coefficients, atol=2e-3)
    assert np.allclose(found.prediction_coefficients[:, :window], plain.prediction_coefficients, atol=2e-3)


@pytest.mark.nightly
def test_a_bundle_keeps_tuned_rows_for_its_own_number_of_steps(tiny_model: Path, cache: Path, tmp_path: Path) -> None:
    model = find_model(str(tiny_model))
    analysis = AnalysisOptions(steps=STEPS, samples=2, bins=2, batch=2, rounds=2, threads=1, decisive=1)
    profile = analyze_model(model, analysis, cache=cache)
    plan = hold_everywhere(profile, "step", 2)
    options = BuildOptions(plan=PlanOptions(budget=0.0), steps=STEPS, controls=False, text=False)
    manifest = build(model, profile, tmp_path / "bundle", options, cache=cache, plan=plan)
    level = manifest.levels[0]
    assert level.tuned is not None
    assert level.plain_damage is not None
    assert level.measured.damage.relative_l2.mean < level.plain_damage.relative_l2.mean
    session = load(tmp_path / "bundle")
    assert session.tuned is not None
    own, other = session.start(1), session.start(1, steps=STEPS - 1)
    assert own.table is session.tuned
    assert other.table is session.scheduler.table(STEPS - 1)
    assert session.start(1, full_model=True).table is session.scheduler.table(STEPS)
    image = np.zeros((1, *session.sample_shape), np.float32)
    assert session.start(image=image, strength=0.5).table is session.scheduler.table(STEPS)
    untuned = BuildOptions(
        plan=PlanOptions(budget=0.0), steps=STEPS, controls=False, text=False, repair=RepairOptions(tune=False)
    )
    manifest = build(model, profile, tmp_path / "plain", untuned, cache=cache, plan=plan)
    assert manifest.levels[0].tuned is None
    assert manifest.tables == ()
    assert load(tmp_path / "plain").tuned is None

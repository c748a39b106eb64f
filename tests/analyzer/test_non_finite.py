"""Ablations that end in NaN or infinity are named, never chosen, and leave all others as they are."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.numpy import load_file, save_file

from tests.analyzer.sweeps import (
    REFERENCE,
    SHAPE,
    along,
    backend,
    estimate_of,
    everything,
    here,
    made_up_costs,
    sweep_of,
    table_of,
    tiny,
)
from unetc.analyzer.ablation import entry_of
from unetc.analyzer.analysis import AnalysisOptions, analyze
from unetc.analyzer.denoiser import GatedDenoiser
from unetc.analyzer.ranking import rank
from unetc.analyzer.screen import choose, estimate_rest, run_screen
from unetc.analyzer.sweep import FullTrajectory, Sweep, run_base, run_sweep
from unetc.artifacts.profile import Cost, Profile
from unetc.cli.summary import profile_facts, profile_table
from unetc.compiler.planner.planner import PlanOptions, make_plan
from unetc.errors import ProfileError
from unetc.progress import ignore
from unetc.report import heatmap
from unetc.treatments import Treatment

BROKEN = "down_blocks.0.resnets.0"
HUGE = 3e38
"""Mean of a branch that is a number of float32, and whose square is none: the next norm makes NaN of it."""


def with_huge_means(sweep: Sweep, base: FullTrajectory) -> FullTrajectory:
    """Replace the means of one component; only its ablation with a mean reads them."""
    (component,) = (one for one in sweep.components if one.name == BROKEN)
    means = base.means.copy()
    means[:, component.offset : component.offset + component.channels] = HUGE
    return dataclasses.replace(base, means=means)


@functools.cache
def swept() -> tuple[Sweep, FullTrajectory]:
    sweep = sweep_of("ddim")
    return sweep, run_base(sweep, ignore)


def removals(sweep: Sweep) -> list[Any]:
    return [(own, b) for own, b in everything(sweep) if not own.periodic.treatment.reuses]


def test_they_have_no_effect_and_the_others_keep_theirs(tmp_path: Path) -> None:
    sweep, base = swept()
    sound = run_sweep(along(sweep, base), sweep, removals(sweep), tmp_path / "sound", ignore)
    broken = run_sweep(along(sweep, with_huge_means(sweep, base)), sweep, removals(sweep), tmp_path / "broken", ignore)
    assert sound.non_finite == ()
    assert {(one.component, one.treatment) for one in broken.non_finite} == {(BROKEN, Treatment.MEAN)}
    assert {one.bin for one in broken.non_finite} == {0, 1}
    without = {entry_of(one) for one in broken.non_finite}
    assert broken.effects == tuple(effect for effect in sound.effects if entry_of(effect) not in without)


def test_they_are_read_again_from_partial_results(tmp_path: Path) -> None:
    sweep, base = swept()
    huge = with_huge_means(sweep, base)
    first = run_sweep(along(sweep, huge), sweep, removals(sweep), tmp_path, ignore)
    assert run_sweep(along(sweep, base), sweep, removals(sweep), tmp_path, ignore) == first, (
        "a finished job is not run again"
    )


def test_the_screen_names_them_and_chooses_others(tmp_path: Path) -> None:
    sweep, base = swept()
    screen = run_screen(along(sweep, with_huge_means(sweep, base)), sweep, tmp_path, ignore)
    assert {(one.component, one.treatment, one.bin) for one in screen.non_finite} == {
        (BROKEN, Treatment.MEAN, b) for b in (0, 1)
    }
    broken = {*map(entry_of, screen.non_finite)}
    assert not broken & {*screen.errors}
    costs = [Cost(component=one.name, saved_ms=estimate_of(1.0), freed_bytes=0) for one in sweep.components]
    assert not broken & {*choose(screen, costs, 80.0, None)}
    assert run_screen(along(sweep, base), sweep, tmp_path, ignore) == screen, "a finished bin is not probed again"


def test_nothing_is_estimated_for_them(tmp_path: Path) -> None:
    """The screen may find nothing wrong at one step, and the trajectory may still end in NaN."""
    sweep, base = swept()
    screen = run_screen(along(sweep, base), sweep, tmp_path / "screen", ignore)
    broken = run_sweep(along(sweep, with_huge_means(sweep, base)), sweep, removals(sweep), tmp_path / "sweep", ignore)
    rest = estimate_rest(screen, broken.effects, broken.non_finite)
    assert {entry_of(one) for one in broken.non_finite} <= {*screen.errors}
    assert not {entry_of(one) for one in broken.non_finite} & {*map(entry_of, rest)}


def broken_profile(work: Path, monkeypatch: pytest.MonkeyPatch, **effort: Any) -> Profile:
    """Analyse the tiny model with means that break one ablation in every bin."""
    monkeypatch.setattr("unetc.analyzer.cost.measure_costs", made_up_costs)
    monkeypatch.setattr("unetc.analyzer.sweep.run_base", lambda own, say: with_huge_means(own, run_base(own, say)))
    options = AnalysisOptions(scheduler="ddim", steps=5, samples=2, bins=2, batch=2, rounds=1, threads=1, **effort)
    gated, table = tiny().gated, table_of("ddim")
    workers = here(gated, backend(), table, options.samples)
    return analyze(gated, REFERENCE, table, workers, sample_shape=SHAPE, options=options, work=work)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    with pytest.MonkeyPatch.context() as patch:
        return broken_profile(tmp_path_factory.mktemp("broken"), patch, decisive=4)


def test_a_profile_names_them_and_no_plan_has_them(profile: Profile) -> None:
    assert {(one.component, one.treatment, one.bin) for one in profile.broken} == {
        (BROKEN, Treatment.MEAN, b) for b in (0, 1)
    }
    again = Profile.from_json(profile.to_json(), "the profile")
    assert again == profile
    for budget in (0.05, 0.1, 0.2):
        plan = make_plan(profile, PlanOptions(budget=budget))
        assert all(engine.treatments.get(BROKEN) != Treatment.MEAN for engine in plan.engines)
    assert not any(
        own.component == BROKEN and own.treatment == Treatment.MEAN
        for ranked in (rank(profile).overall, *rank(profile).bins)
        for own in ranked
    )


def test_an_exhaustive_analysis_with_a_time_limit_names_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The screen finds them, and they are carried to the final output as well."""
    profile = broken_profile(tmp_path, monkeypatch, decisive=None, time_limit_s=1e6)
    assert [(one.component, one.treatment, one.bin) for one in profile.broken] == [
        (BROKEN, Treatment.MEAN, b) for b in (0, 1)
    ]


def test_commands_and_the_map_show_them(profile: Profile) -> None:
    facts = profile_facts(profile, Path("profile.json"))
    assert [one["component"] for one in facts["non_finite"]] == [BROKEN] * 2
    json.dumps(facts, allow_nan=False)
    table: Any = profile_table(profile)
    assert "2 ablations end in NaN or infinity" in str(table.renderables[0].title)
    plan = make_plan(profile, PlanOptions(budget=0.1))
    assert "NaN or infinity" in heatmap.draw(profile, plan)
    sound = msgspec.structs.replace(profile, non_finite=msgspec.UNSET)
    assert "NaN or infinity" not in heatmap.draw(sound, plan)


def test_a_profile_without_them_keeps_its_form(profile: Profile) -> None:
    sound = msgspec.structs.replace(profile, non_finite=msgspec.UNSET)
    assert b"non_finite" not in sound.to_json()
    with pytest.raises(ValueError, match="has an effect, and is not finite"):
        msgspec.structs.replace(
            profile, non_finite=(msgspec.structs.replace(profile.broken[0], treatment=Treatment.DROP),)
        )


@pytest.mark.parametrize("part", ["down_blocks.0.resnets.0", "mid_block.resnets.1"])
def test_a_full_model_that_is_not_finite_is_refused_with_its_step_and_component(tmp_path: Path, part: str) -> None:
    gated = tiny().gated
    weights = load_file(gated.weights)
    weights[f"model.{part}.conv2.weight"].fill(HUGE)
    save_file(weights, tmp_path / gated.weights.name)
    denoiser = GatedDenoiser(dataclasses.replace(gated, folder=tmp_path), backend())
    sweep = dataclasses.replace(sweep_of("ddim"), denoiser=denoiser)
    message = rf"at step 1 of 5 \(timestep \d+\), first in {re.escape(part)}\. Check that the weights"
    with pytest.raises(ProfileError, match=message):
        run_base(sweep, ignore)


def test_the_machine_is_shown_where_it_is_known(profile: Profile) -> None:
    older = msgspec.structs.replace(profile, timed_on=msgspec.UNSET)
    assert b"timed_on" not in older.to_json()
    assert Profile.from_json(older.to_json(), "the profile") == older
    for own, said in ((profile, "this machine"), (older, None)):
        assert profile_facts(own, Path("profile.json"))["timed_on"] == said
        table: Any = profile_table(own)
        assert ("; timed on this machine" in str(table.renderables[0].title)) == bool(said)

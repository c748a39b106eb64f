from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from unetc.artifacts.plan import Plan
from unetc.artifacts.profile import STEP, Bin, Component, Cost, Damage, Effect, Estimate, ModelReference, Profile
from unetc.compiler.planner.planner import PlanOptions, make_plan
from unetc.compiler.search.candidate import Candidate
from unetc.compiler.search.fit import (
    ATTEMPTS,
    LONGEST_PERIOD,
    TOLERANCE,
    aim_again,
    budget_of,
    fit_deep_hold,
    fit_plan,
    fit_random,
    fit_uniform,
    hold_everywhere,
    middle_of,
)
from unetc.compiler.search.workbench import Workbench
from unetc.errors import PlanError
from unetc.percent import percent
from unetc.treatments import Treatment

REMOVALS = ((Treatment.DROP, 1), (Treatment.MEAN, 1))
REUSES = tuple((treatment, period) for treatment in (Treatment.HOLD, Treatment.FORECAST) for period in (2, 4))
SHARE = 0.04
"""Saving of one small component."""


def point(value: float) -> Estimate:
    return Estimate(mean=value, low=value, high=value)


def profile(components: int = 12, bins: int = 4, levels: Sequence[float] = (), *, step: bool = False) -> Profile:
    """Make components that save 4 % each, and some that save more, with seeded random damages.

    Args:
        components: Number of small components.
        bins: Number of bins, of four steps each.
        levels: Share that each level saves; the first components are nested in the first level and so on.
        step: Whether there is a component that is the whole call. All but residuals are known to be reused only.
    """
    generator = np.random.default_rng(3)
    names = [*(f"c{i}" for i in range(components)), *(f"level{i}" for i in range(len(levels))), *[STEP] * step]
    shares = [*[SHARE] * components, *levels, *[1.0] * step]
    nested = {f"level{i}": (f"c{i}",) for i in range(len(levels))} | {STEP: tuple(names[:-1])}
    parts = tuple(
        Component(
            name=name,
            kind="step" if name == STEP else "level" if name.startswith("level") else "residual",
            owner=name,
            index=i,
            channels=1,
            axis=1,
            nested=nested.get(name, ()),
            offset=i,
        )
        for i, name in enumerate(names)
    )
    return Profile(
        unetc="test",
        model=ModelReference(name="m", sha256="0" * 64, pipeline="P", denoiser="D"),
        scheduler="ddim",
        steps=4 * bins,
        samples=2,
        seed=0,
        target="null",
        threads=1,
        batch=1,
        sample_shape=(1, 4, 4),
        components=parts,
        bins=tuple(Bin(low=float(b), high=float(b + 1), steps=4) for b in range(bins)),
        full_ms=point(100.0),
        full_bytes=1,
        costs=tuple(
            Cost(component=name, saved_ms=point(100 * share), freed_bytes=0)
            for name, share in zip(names, shares, strict=True)
        ),
        effects=tuple(
            Effect(
                component=part.name,
                treatment=treatment,
                period=period,
                bin=b,
                measured=True,
                relative_l2=point(float(generator.uniform(0.01, 1))),
            )
            for part in parts
            for treatment, period in (*REMOVALS, *(REUSES if levels or step else ()))
            if part.kind == "residual" or period > 1
            for b in range(bins)
        ),
        samplings=1.0,
        means=(b"\0" * 4 * len(names),) * bins,
    )


@dataclass
class Machine:
    """A machine on which a component saves `truth` times its cost in the profile; a whole step saves everything."""

    truth: float
    profile: Profile = field(default_factory=profile)
    compiled: list[Plan] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    """Relative L2 of engines that reuse a component, whatever the schedule."""

    @property
    def steps(self) -> int:
        return sum(bin.steps for bin in self.profile.bins)

    def compile(self, plan: Plan) -> Candidate:
        self.compiled.append(plan)
        saving = float(np.mean([self.saved_by(plan, engine) for engine in self.schedule_of(plan)]))
        return Candidate(plan=plan, graphs=(), full_ms=1.0, step_ms=(), time_ratio=1 - saving)

    def schedule_of(self, plan: Plan) -> tuple[int, ...]:
        return plan.schedule([bin.low + i / bin.steps for bin in self.profile.bins for i in range(bin.steps)])

    def schedule(self, candidate: Candidate) -> tuple[int, ...]:
        return self.schedule_of(candidate.plan)

    def saved_by(self, plan: Plan, engine: int) -> float:
        """Return the share of a call that an engine saves; nested components save nothing more."""
        treatments = plan.engines[engine].treatments
        inner = {name for part in self.profile.components if part.name in treatments for name in part.nested}
        shares = {cost.component: cost.saved_ms.mean / 100 for cost in self.profile.costs}
        return sum(shares[name] * (1 if name == STEP else self.truth) for name in treatments.keys() - inner)

    def damage_of(self, candidate: Candidate) -> Damage:
        (name,) = candidate.plan.engines[1].treatments
        return Damage(relative_l2=point(self.losses[name]), psnr=point(20), ssim=point(0.9))

    def damages(self, candidates: Sequence[Candidate], *, seed: int) -> list[Damage]:
        return [self.damage_of(candidate) for candidate in candidates]


def bench(machine: Machine) -> Workbench:
    return cast(Workbench, machine)


@pytest.mark.parametrize("planner", ["fast", "exact"])
@pytest.mark.parametrize("truth", [0.6, 0.9, 1.0, 1.3, 1.7])
def test_the_measured_saving_meets_the_budget_whatever_the_profile_got_wrong(truth: float, planner: str) -> None:
    notes: list[str] = []
    machine = Machine(truth)
    candidate, correction = fit_plan(bench(machine), PlanOptions(budget=0.2, planner=planner), notes)
    assert 0.2 <= candidate.saving <= 0.2 * (1 + TOLERANCE) + SHARE * truth  # the grain
    assert len(machine.compiled) <= ATTEMPTS
    assert candidate.plan.budget == 0.2
    assert candidate.plan.phases in [plan.phases for plan in machine.compiled]
    if abs(truth - 1) > 0.15:
        assert notes
        assert correction == pytest.approx(truth, rel=0.2)


@pytest.mark.parametrize("budget", [0.2, 0.5])
@pytest.mark.parametrize("truth", [0.7, 1.0, 1.4])
def test_a_plan_of_whole_steps_meets_the_budget_too(truth: float, budget: float) -> None:
    machine = Machine(truth, profile(bins=8, levels=(0.3,), step=True))
    candidate, _ = fit_plan(bench(machine), PlanOptions(budget=budget), [])
    # a step is the grain of this schedule of 32
    assert budget <= candidate.saving <= budget * (1 + TOLERANCE) + 2 / 32


def test_of_those_that_meet_the_budget_the_one_that_saves_least_is_taken() -> None:
    machine = Machine(1.7)
    candidate, _ = fit_plan(bench(machine), PlanOptions(budget=0.2), [])
    again = Machine(1.7)
    savings = [again.compile(plan).saving for plan in machine.compiled]
    assert len(savings) > 1
    assert candidate.saving == min(saving for saving in savings if saving >= 0.2)


def test_every_attempt_but_the_last_is_noted_with_what_was_planned_and_measured() -> None:
    notes: list[str] = []
    machine = Machine(1.7)
    fit_plan(bench(machine), PlanOptions(budget=0.2), notes)
    assert len(notes) >= len(machine.compiled) - 1
    for i, (note, plan) in enumerate(zip(notes, machine.compiled, strict=False)):
        saving = Machine(1.7).compile(plan).saving
        assert note.startswith(
            f"attempt {i + 1}: planned to save {percent(1 - plan.prediction.time_ratio)}, measured {percent(saving)}"
        )


def test_a_fit_continues_from_a_correction() -> None:
    first, second = Machine(1.5), Machine(1.5)
    _, correction = fit_plan(bench(first), PlanOptions(budget=0.2), [])
    fit_plan(bench(second), PlanOptions(budget=0.2), [], correction=correction)
    assert len(second.compiled) < len(first.compiled)


def test_a_budget_that_no_plan_meets_is_refused_with_the_most_that_was_saved() -> None:
    with pytest.raises(PlanError, match=r"most that .*\d"):
        fit_plan(bench(Machine(0.2)), PlanOptions(budget=0.3), [])


def test_a_budget_just_below_the_most_that_can_be_saved_is_met() -> None:
    machine = Machine(1.0)
    with pytest.raises(PlanError) as refused:
        make_plan(machine.profile, PlanOptions(budget=0.99))
    (most,) = re.findall(r"saves is ([\d.]+) %", str(refused.value))
    budget = float(most) / 100 - 0.001
    assert middle_of(budget) > float(most) / 100, "no plan aims at the middle of the accepted savings"
    candidate, _ = fit_plan(bench(machine), PlanOptions(budget=budget), [])
    assert candidate.saving >= budget
    with pytest.raises(PlanError, match=r"no plan saves 99 % of the time"):
        fit_plan(bench(machine), PlanOptions(budget=0.99), [])


def test_budget_zero_is_the_full_model_and_measures_once() -> None:
    machine = Machine(1.0)
    candidate, _ = fit_plan(bench(machine), PlanOptions(budget=0), [])
    assert len(machine.compiled) == 1
    assert candidate.plan.schedule([0.5, 2.5]) == (0, 0)


def test_the_uniform_control_has_one_assignment_and_the_time_of_the_plan() -> None:
    candidate = fit_uniform(bench(Machine(0.8)), 0.2, correction=1.0)
    assert len(candidate.plan.phases) == 1
    assert len(candidate.plan.engines) == 2
    assert candidate.saving == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("truth", [0.5, 0.7, 0.8, 1.1])
def test_no_control_is_timed_twice(truth: float) -> None:
    machine = Machine(truth)
    fit_uniform(bench(machine), 0.2, correction=1.0)
    for seed in range(3):
        fit_random(bench(machine), 0.2, 1.0, seed, max_engines=3)
    timed = [msgspec.json.encode((plan.engines, plan.phases)) for plan in machine.compiled]
    assert len(set(timed)) == len(timed) > 4


@pytest.mark.parametrize("reuse", [False, True])
def test_random_controls_have_the_time_of_the_plan_and_differ(reuse: bool) -> None:
    machine = Machine(0.8, profile(levels=(0.1,), step=True) if reuse else profile())
    _, correction = fit_plan(bench(machine), PlanOptions(budget=0.2), [])
    randoms = [fit_random(bench(machine), 0.2, correction, seed, max_engines=3) for seed in range(3)]
    if not reuse:  # a whole bin of a held step is too coarse to meet the time
        assert all(candidate.saving == pytest.approx(0.2, abs=0.03) for candidate in randoms)
    assert all(candidate.saving > 0 for candidate in randoms)
    assert all(len(candidate.plan.engines) <= 1 + 3 for candidate in randoms)
    assert len({candidate.plan.to_json() for candidate in randoms}) == 3
    again = fit_random(bench(machine), 0.2, correction, 1, max_engines=3)
    assert again.plan.to_json() == randoms[1].plan.to_json()


@pytest.mark.parametrize("max_engines", [1, 2, 4, 9])
def test_random_controls_keep_to_the_engines_of_the_plan(max_engines: int) -> None:
    candidate = fit_random(bench(Machine(1.0)), 0.2, 1.0, 0, max_engines=max_engines)
    assert len(candidate.plan.engines) <= 1 + max_engines
    assert len(candidate.plan.phases) <= max_engines


@pytest.mark.parametrize("period", [2, 3, 10])
def test_a_component_can_be_held_everywhere(period: int) -> None:
    own = profile(levels=(0.3,))
    plan = hold_everywhere(own, "level0", period)
    assert [(engine.treatments, engine.emits) for engine in plan.engines] == [
        ({}, ("level0",)),
        ({"level0": Treatment.HOLD}, ()),
    ]
    assert (plan.phases[0].low, plan.phases[-1].high) == (own.bins[0].low, own.bins[-1].high)
    schedule = plan.schedule([i / 4 for i in range(16)])
    assert schedule == tuple(0 if i % period == 0 else 1 for i in range(16))
    assert plan.profile_sha256 == own.sha256()


@pytest.mark.parametrize(("target", "period"), [(0.05, 2), (0.19, 2), (0.21, 3), (0.28, 4), (0.315, 5)])
def test_deep_hold_takes_the_shortest_period_that_saves_enough(target: float, period: int) -> None:
    machine = Machine(1.0, profile(levels=(0.4,), bins=30), losses={"level0": 0.5})
    candidate = fit_deep_hold(bench(machine), target, seed=0)
    assert [phase.cycle for phase in candidate.plan.phases] == [(0, *[1] * (period - 1))]
    assert candidate.saving >= (1 - TOLERANCE) * target
    assert len(machine.compiled) == 1


@pytest.mark.parametrize("best", [0, 1])
def test_deep_hold_takes_the_level_that_does_the_least_damage(best: int) -> None:
    losses = {f"level{i}": 0.2 if i == best else 0.3 for i in range(3)} | {"level2": 0.0}  # which saves too little
    machine = Machine(1.0, profile(levels=(0.4, 0.5, 0.1)), losses=losses)
    candidate = fit_deep_hold(bench(machine), 0.2, seed=0)
    assert candidate.plan.engines[1].treatments == {f"level{best}": Treatment.HOLD}


def test_deep_hold_goes_on_to_longer_periods_when_measured_time_falls_short() -> None:
    machine = Machine(0.7, profile(levels=(0.4,), bins=30), losses={"level0": 0.5})
    candidate = fit_deep_hold(bench(machine), 0.2, seed=0)
    assert candidate.saving >= (1 - TOLERANCE) * 0.2
    assert [len(plan.phases[0].cycle) for plan in machine.compiled] == [2, 3, 4]


def test_deep_hold_that_cannot_save_enough_saves_the_most_it_can() -> None:
    machine = Machine(1.0, profile(levels=(0.1, 0.2)))
    candidate = fit_deep_hold(bench(machine), 0.5, seed=0)
    assert candidate.plan.engines[1].treatments == {"level1": Treatment.HOLD}
    assert len(candidate.plan.phases[0].cycle) == LONGEST_PERIOD


def test_a_model_without_levels_has_no_deep_hold() -> None:
    with pytest.raises(PlanError, match="no level"):
        fit_deep_hold(bench(Machine(1.0)), 0.2, seed=0)


def test_the_fitted_plan_remembers_the_limits_it_was_made_for() -> None:
    candidate, _ = fit_plan(bench(Machine(1.2)), PlanOptions(budget=0.2, max_engines=2), [])
    assert candidate.plan.max_engines == 2
    assert len(candidate.plan.engines) <= 3
    assert msgspec.structs.replace(candidate.plan, budget=0.2).phases == candidate.plan.phases


@given(st.floats(0.01, 0.9), st.floats(-0.2, 0.2))
@example(0.27, -0.05)
def test_an_aim_makes_up_for_what_the_times_of_engines_miss(budget: float, offset: float) -> None:
    """With a plan for every saving, one correction suffices."""
    by_engines = middle_of(budget)
    aim = aim_again(budget, by_engines, by_engines + offset)
    if aim is None:
        assert by_engines + offset > budget
        return
    assert aim > by_engines
    assert aim + offset == pytest.approx(middle_of(budget))
    assert aim_again(budget, aim, aim + offset) is None
    assert middle_of(budget_of(aim)) == pytest.approx(aim)


def test_at_the_edge_another_plan_is_wanted_and_without_a_budget_none() -> None:
    assert aim_again(0.2, 0.2005, 0.2005) == pytest.approx(middle_of(0.2))
    assert aim_again(0.2, 0.2098, 0.2098) is None
    assert aim_again(0.0, 0.0, -0.1) is None

"""Plans keep their promises, are the best there are, and come out the same every time."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unetc.artifacts.plan import Phase, Plan
from unetc.artifacts.profile import GUIDANCE, STEP, Bin, Component, Cost, Effect, Estimate, ModelReference, Profile
from unetc.compiler.planner.choices import TOLERANCE, BinRun, Choices, TreatedRun
from unetc.compiler.planner.dynamic import solve_fast
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.planner.exact import most_saved, solve_exactly
from unetc.compiler.planner.planner import TIME_LIMIT_S, PlanOptions, assemble, limits_of, make_plan
from unetc.compiler.planner.schedule import phases_of
from unetc.errors import PlanError
from unetc.percent import percent
from unetc.treatments import Treatment

SLACK = 2 * TOLERANCE
"""Plans may miss a limit by the tolerance, and HiGHS by as much again."""
GAP = 1e-3
"""How far from the best a plan may be, relative; the planner is asked for 1e-4."""

FULL_MS = 80.0
FULL_BYTES = 1_000_000
DROP, MEAN, HOLD, FORECAST = (Treatment.DROP, 1), (Treatment.MEAN, 1), (Treatment.HOLD, 2), (Treatment.FORECAST, 2)
KINDS = (DROP, MEAN, HOLD, FORECAST, (Treatment.HOLD, 4))
"""Treatments with their periods, in the order that test profiles give damages for."""


def exactly(value: float) -> Estimate:
    return Estimate(mean=value, low=value, high=value)


def make_profile(
    upper: NDArray[np.float64],
    saved: Sequence[float] | NDArray[np.float64],
    *,
    steps: Sequence[int] | None = None,
    nested: Mapping[int, Sequence[int]] | None = None,
    freed: Sequence[int] | None = None,
    mean_share: float = 0.5,
    step: bool = False,
    guidance: bool = False,
) -> Profile:
    """Make a profile.

    Args:
        upper: Upper bounds of the relative L2 damage, [kind (the first of `KINDS`), bin, component]; NaN where nothing
            is known.
        saved: Share of the full time that each component's removal saves.
        steps: Steps of each bin; 3 when not given.
        nested: Which components go with which.
        freed: Of the `FULL_BYTES`, how many each component's removal frees; none when not given.
        mean_share: The mean of every damage as a share of its upper bound.
        step: Whether the last component is the whole call, which only reuse is known of.
        guidance: Whether the component before the step is guidance, which has no mean.
    """
    kinds, bins, count = upper.shape
    names = [f"c{c}" for c in range(count)]
    nested = dict(nested or {})
    if step:
        names[-1] = STEP
        nested[count - 1] = range(count - 1)
    if guidance:
        names[-2] = GUIDANCE
    components = tuple(
        Component(
            name=name,
            kind="step" if name == STEP else "guidance" if name == GUIDANCE else "residual",
            owner=name,
            index=c,
            channels=1,
            axis=1,
            offset=c,
            nested=tuple(names[inner] for inner in nested.get(c, ())),
        )
        for c, name in enumerate(names)
    )
    effects = tuple(
        Effect(
            component=name,
            treatment=treatment,
            period=period,
            bin=b,
            measured=True,
            relative_l2=Estimate(mean=mean_share * float(upper[k, b, c]), low=0.0, high=float(upper[k, b, c])),
        )
        for k, (treatment, period) in enumerate(KINDS[:kinds])
        for b in range(bins)
        for c, name in enumerate(names)
        if not np.isnan(upper[k, b, c]) and (treatment.reuses or name != STEP)
        if name != GUIDANCE or treatment is not Treatment.MEAN
    )
    return Profile(
        unetc="0",
        model=ModelReference(name="m", sha256="0" * 64, pipeline="DDPMPipeline", denoiser="UNet2DModel"),
        scheduler="ddim",
        steps=sum(steps or [3] * bins),
        samples=4,
        seed=0,
        target="null",
        threads=1,
        batch=8,
        sample_shape=(1, 16, 16),
        components=components,
        bins=tuple(Bin(low=float(b), high=float(b + 1), steps=(steps or [3] * bins)[b]) for b in range(bins)),
        full_ms=exactly(FULL_MS),
        full_bytes=FULL_BYTES,
        costs=tuple(
            Cost(component=name, saved_ms=exactly(FULL_MS * float(share)), freed_bytes=own)
            for name, share, own in zip(names, saved, freed or [0] * count, strict=True)
        ),
        effects=effects,
        samplings=1.0,
        means=tuple(np.zeros(count - guidance, "<f4").tobytes() for _ in range(bins)),
    )


def random_profile(count: int, bins: int, seed: int, *, kinds: int = 2, decades: float = 2.0) -> Profile:
    """Make a profile whose damages spread over some decades and whose savings add up to less than all there is."""
    generator = np.random.default_rng(seed)
    upper = 10 ** -generator.uniform(0, decades, (kinds, bins, count))
    saved, freed = 0.9 * generator.dirichlet(np.ones(count), size=2)
    return make_profile(upper, saved, freed=(FULL_BYTES * freed).astype(int).tolist())


@st.composite
def profiles(draw: st.DrawFn, *, components: int = 6, bins: int = 5) -> Profile:
    """Draw profiles with nesting, some components without savings and some without damage; half have a step."""
    step = draw(st.booleans())
    guidance = step and draw(st.booleans())
    count, cuts = draw(st.integers(2 + step + guidance, components)), draw(st.integers(1, bins))
    kinds = draw(st.sampled_from([2, 2 + step, 4, 5]))
    amount = st.one_of(st.floats(-4, 0.2).map(lambda decade: 10.0**decade), st.just(0.0))
    size = kinds * cuts * count
    upper = np.reshape(draw(st.lists(amount, min_size=size, max_size=size)), (kinds, cuts, count))
    steps = draw(st.lists(st.integers(1, 5), min_size=cuts, max_size=cuts))
    # a forest: the parent of a component comes after it or is none
    roots = count - step - guidance
    parents = [draw(st.integers(c + 1, roots)) for c in range(roots)]
    nested: dict[int, list[int]] = {}
    for c in range(roots):
        outer = parents[c]
        while outer < roots:
            nested.setdefault(outer, []).append(c)
            outer = parents[outer]
    # an outer component saves as much as its inner ones and more; all together save no more than everything
    own = np.array(draw(st.lists(st.floats(-0.05, 0.4), min_size=count, max_size=count)))
    own /= max(1.0, float(own.clip(0).sum()) / 0.99)
    saved = [float(own[c] if c not in nested else own[[c, *nested[c]]].clip(0).sum()) for c in range(roots)]
    weights = draw(st.lists(st.integers(0, FULL_BYTES // count), min_size=count, max_size=count))
    freed = [sum(weights[i] for i in (c, *nested.get(c, ()))) for c in range(roots)]
    if guidance:
        saved.append(float(own[roots]))
        freed.append(0)
    if step:
        saved.append(float(own.clip(0).sum()))
        freed.append(FULL_BYTES)
    share = draw(st.floats(0, 1))
    return make_profile(
        upper, saved, steps=steps, nested=nested, freed=freed, mean_share=share, step=step, guidance=guidance
    )


budgets = st.floats(0.001, 0.7)
limits = st.fixed_dictionaries(
    {
        "max_engines": st.integers(1, 4),
        "max_phases": st.one_of(st.none(), st.integers(1, 3)),
        "max_memory": st.one_of(st.none(), st.floats(1, 4)),
    }
)
planners = st.sampled_from(["fast", "exact"])


class Search:
    """Tries every cut of the bins into runs with every period and set of components; reads the profile by itself."""

    def __init__(self, profile: Profile) -> None:
        count = len(profile.components)
        self.names = [component.name for component in profile.components]
        self.saved = [max(0.0, cost.saved_ms.mean) / FULL_MS for cost in profile.costs]
        self.freed = [cost.freed_bytes / profile.full_bytes for cost in profile.costs]
        self.steps = [bin.steps for bin in profile.bins]
        self.damage = {(e.component, e.bin, e.treatment, e.period): e.relative_l2.high for e in profile.effects}
        self.periods = sorted({1} | {effect.period for effect in profile.effects})
        nested = [(self.names.index(c.name), self.names.index(inner)) for c in profile.components for inner in c.nested]
        sets = [tuple(c for c in range(count) if mask >> c & 1) for mask in range(2**count)]
        self.sets = [s for s in sets if not any(outer in s and inner in s for outer, inner in nested)]

    def treated(self, first: int, last: int, period: int) -> int:
        """Count the steps of a run that do not compute everything: all, or all but the first of every cycle."""
        count = sum(self.steps[first:last])
        return count if period == 1 else sum(1 for step in range(count) if step % period)

    def harm(self, first: int, last: int, period: int, name: str) -> dict[Treatment, float]:
        """Add up the damage of a component over a run, for each treatment that is known in all of its bins."""
        found = {
            treatment: [self.damage.get((name, b, treatment, period), np.inf) for b in range(first, last)]
            for treatment in Treatment
        }
        return {treatment: sum(rows) for treatment, rows in found.items() if np.inf not in rows}

    def squared_damage(self, run: BinRun, chosen: Collection[int]) -> float:
        harms = [self.harm(run.first, run.last, run.period, self.names[c]) for c in chosen]
        return sum(min(harm.values(), default=np.inf) ** 2 for harm in harms)

    def saved_share(self, run: BinRun, chosen: Collection[int]) -> float:
        return self.treated(run.first, run.last, run.period) / sum(self.steps) * self.saved_in_a_step(chosen)

    def saved_in_a_step(self, chosen: Collection[int]) -> float:
        """Compute the saved share of a step; components save a share of the rows that guidance leaves."""
        rows = 1 - sum(self.saved[c] for c in chosen if self.names[c] == GUIDANCE)
        return 1 - rows + rows * sum(self.saved[c] for c in chosen if self.names[c] != GUIDANCE)

    def needs_engine(self, chosen: Collection[int]) -> bool:
        return any(self.names[c] != STEP for c in chosen)

    def memory(self, chosen: Collection[int]) -> float:
        """Return the weights of a set's engine, as a multiple of the full one's."""
        return 1 - sum(self.freed[c] for c in chosen) if self.needs_engine(chosen) else 0.0

    def plans(self, options: PlanOptions) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Yield the share saved and the squared damage of all plans of each cut that keep to the limits."""
        bins = len(self.steps)
        for inside in itertools.product((False, True), repeat=bins - 1):
            edges = [0, *(b for b, cut in enumerate(inside, start=1) if cut), bins]
            if options.max_phases is not None and len(edges) - 1 > options.max_phases:
                continue
            saved, squared, engines, memory = np.zeros((4, 1))
            for first, last in pairwise(edges):
                runs = [BinRun(first=first, last=last, period=period) for period in self.periods]
                own = [
                    (self.saved_share(run, s), self.squared_damage(run, s), self.needs_engine(s), self.memory(s))
                    for run in runs
                    for s in self.sets
                ]
                rows = np.array(own).T
                rows = rows[:, np.isfinite(rows[1])]
                saved, squared, engines, memory = (
                    np.add.outer(old, new).ravel()
                    for old, new in zip((saved, squared, engines, memory), rows, strict=True)
                )
            within = (engines <= options.max_engines) & (1 + memory <= (options.max_memory or np.inf))
            yield saved[within], squared[within]

    def best(self, options: PlanOptions, budget: float) -> float:
        """Find the least squared damage that saves the budget; infinite if nothing does."""
        return min(float(squared[saved >= budget].min(initial=np.inf)) for saved, squared in self.plans(options))

    def bounds(self, options: PlanOptions, budget: float) -> tuple[float, float]:
        """Find the least squared damage with limits that are laxer, and stricter, by the margin of rounding."""
        return self.best(shifted(options, SLACK), budget - SLACK), self.best(shifted(options, -SLACK), budget + SLACK)

    def most(self, options: PlanOptions) -> float:
        return max(float(saved.max()) for saved, _ in self.plans(options))

    def total(self, chosen: Mapping[BinRun, Sequence[int]]) -> tuple[float, float]:
        """Return the saved share and the squared damage of a planner's choice."""
        return (
            sum(self.saved_share(run, s) for run, s in chosen.items()),
            sum(self.squared_damage(run, s) for run, s in chosen.items()),
        )


def shifted(options: PlanOptions, by: float) -> PlanOptions:
    return options if options.max_memory is None else replace(options, max_memory=max(1.0, options.max_memory + by))


def try_plan(profile: Profile, options: PlanOptions) -> Plan | None:
    try:
        return make_plan(profile, options)
    except PlanError:
        return None


@settings(max_examples=20)
@given(profile=profiles(), budget=budgets, limit=limits, planner=planners)
def test_a_plan_keeps_the_limits_it_was_made_for(
    profile: Profile, budget: float, limit: dict[str, Any], planner: str
) -> None:
    plan = try_plan(profile, PlanOptions(budget=budget, planner=planner, **limit))
    if plan is None:
        return
    assert plan.prediction.time_ratio <= 1 - budget + SLACK
    assert plan.engines[0].treatments == {}
    computing = [engine for engine in plan.engines[1:] if engine.treatments.keys() != {STEP}]
    assert len(computing) <= limit["max_engines"]
    assert limit["max_phases"] is None or len(plan.phases) <= limit["max_phases"]
    assert plan.prediction.memory <= (limit["max_memory"] or np.inf) + SLACK
    assert len({frozenset(engine.treatments.items()) for engine in plan.engines}) == len(plan.engines)
    assert {engine for phase in plan.phases for engine in phase.cycle} >= set(range(1, len(plan.engines)))
    inner = {component.name: set(component.nested) for component in profile.components}
    for engine in plan.engines:
        assert not any(inner[name] & engine.treatments.keys() for name in engine.treatments)


@settings(max_examples=20)
@given(profile=profiles(), budget=budgets, limit=limits, planner=planners)
def test_phases_cover_every_bin_exactly_once(
    profile: Profile, budget: float, limit: dict[str, Any], planner: str
) -> None:
    plan = try_plan(profile, PlanOptions(budget=budget, planner=planner, **limit))
    if plan is None:
        return
    assert (plan.phases[0].low, plan.phases[-1].high) == (profile.bins[0].low, profile.bins[-1].high)
    assert all(left.high == right.low and left.cycle != right.cycle for left, right in pairwise(plan.phases))
    for bin in profile.bins:
        assert sum(phase.low <= bin.low and bin.high <= phase.high for phase in plan.phases) == 1


def bins_of(profile: Profile, phase: Phase) -> list[int]:
    return [b for b, bin in enumerate(profile.bins) if phase.low <= bin.low < phase.high]


def treatments_of(plan: Plan, phase: Phase) -> Mapping[str, Treatment]:
    """Return the treatments of a phase's engine, or of its cycle without the refresh."""
    return plan.engines[phase.cycle[-1]].treatments


@settings(max_examples=20)
@given(profile=profiles(), budget=budgets, limit=limits, planner=planners)
def test_the_prediction_is_what_the_profile_says_about_the_plan(
    profile: Profile, budget: float, limit: dict[str, Any], planner: str
) -> None:
    plan = try_plan(profile, PlanOptions(budget=budget, planner=planner, **limit))
    if plan is None:
        return
    search = Search(profile)
    saved = squared = 0.0
    for phase in plan.phases:
        bins = bins_of(profile, phase)
        period = len(phase.cycle)
        treatments = treatments_of(plan, phase)
        run = BinRun(first=bins[0], last=bins[-1] + 1, period=period)
        saved += search.saved_share(run, [search.names.index(name) for name in treatments])
        for name, treatment in treatments.items():
            squared += sum(search.damage[name, b, treatment, period] for b in bins) ** 2
    assert plan.prediction.time_ratio == pytest.approx(1 - saved, abs=1e-9)
    assert plan.prediction.relative_l2 == pytest.approx(np.sqrt(squared), abs=1e-9)
    held = [search.memory([search.names.index(name) for name in engine.treatments]) for engine in plan.engines[1:]]
    assert plan.prediction.memory == pytest.approx(1 + sum(held), abs=1e-9)


def steps_of(profile: Profile) -> list[float]:
    """Spread the steps of every bin over it."""
    return [b + (i + 0.5) / bin.steps for b, bin in enumerate(profile.bins) for i in range(bin.steps)]


@settings(max_examples=20)
@given(profile=profiles(), budget=budgets, limit=limits, planner=planners)
def test_the_schedule_saves_the_time_that_was_predicted(
    profile: Profile, budget: float, limit: dict[str, Any], planner: str
) -> None:
    plan = try_plan(profile, PlanOptions(budget=budget, planner=planner, **limit))
    if plan is None:
        return
    search = Search(profile)
    saved = [search.saved_in_a_step([search.names.index(name) for name in one.treatments]) for one in plan.engines]
    schedule = plan.schedule(steps_of(profile))
    assert plan.prediction.time_ratio == pytest.approx(1 - np.mean([saved[engine] for engine in schedule]), abs=1e-9)


@settings(max_examples=20)
@given(profile=profiles(), budget=budgets, limit=limits, planner=planners)
def test_what_is_reused_comes_from_a_cycle_that_begins_with_the_full_engine(
    profile: Profile, budget: float, limit: dict[str, Any], planner: str
) -> None:
    plan = try_plan(profile, PlanOptions(budget=budget, planner=planner, **limit))
    if plan is None:
        return
    for phase in plan.phases:
        first, *others = phase.cycle
        reused = [engine for engine in phase.cycle if plan.engines[engine].reused]
        assert reused == others
        assert not others or (first == 0 and len({*others}) == 1)
        assert len(phase.cycle) in search_periods(profile)
    inner = {component.name: {*component.nested} for component in profile.components}
    wanted = {name for engine in plan.engines for name in engine.reused}
    for engine in plan.engines:
        gone = {*engine.treatments}.union(*(inner[name] for name in engine.treatments))
        assert set(engine.emits) == wanted - gone


def search_periods(profile: Profile) -> list[int]:
    return Search(profile).periods


def solve(profile: Profile, options: PlanOptions, planner: str) -> dict[BinRun, tuple[int, ...]] | None:
    """Solve as the planner does, without making a plan of the result."""
    choices = Choices(profile)
    limits = limits_of(choices, options)
    if planner == "fast":
        return solve_fast(choices, limits)
    return solve_exactly(choices, limits, time_limit_s=TIME_LIMIT_S)


def most_share(profile: Profile, options: PlanOptions) -> float:
    """Find the largest share of the time that can be saved within the limits."""
    choices = Choices(profile)
    return most_saved(choices, limits_of(choices, options), time_limit_s=TIME_LIMIT_S) / float(choices.steps.sum())


def check_form(profile: Profile, chosen: Mapping[BinRun, Sequence[int]], options: PlanOptions) -> None:
    """Check that a planner's choice tiles the bins with runs, keeps the limits, and has only possible sets."""
    search = Search(profile)
    runs = sorted(chosen)
    assert [run.first for run in runs] + [len(profile.bins)] == [0] + [run.last for run in runs]
    assert options.max_phases is None or len(runs) <= options.max_phases
    assert sum(search.needs_engine(s) for s in chosen.values()) <= options.max_engines
    assert all(tuple(s) in search.sets for s in chosen.values())
    assert 1 + sum(map(search.memory, chosen.values())) <= (options.max_memory or np.inf) + SLACK


@settings(max_examples=40)
@given(profile=profiles(components=4, bins=3), budget=budgets, limit=limits)
def test_no_plan_is_better(profile: Profile, budget: float, limit: dict[str, Any]) -> None:
    options = PlanOptions(budget=budget, **limit)
    search = Search(profile)
    chosen = solve(profile, options, "exact")
    least, enough = search.bounds(options, budget)
    laxer, stricter = (search.most(shifted(options, by)) for by in (SLACK, -SLACK))
    assert stricter - SLACK <= most_share(profile, options) <= laxer + SLACK
    if chosen is None:
        assert enough == np.inf
        return
    check_form(profile, chosen, options)
    saved, squared = search.total(chosen)
    assert saved >= budget - SLACK
    assert least * (1 - 1e-9) - 1e-12 <= squared <= enough * (1 + GAP) + 1e-12


@settings(max_examples=40)
@given(profile=profiles(components=4, bins=3), budget=budgets, limit=limits)
def test_the_fast_solver_finds_the_best_for_the_time_it_saves(
    profile: Profile, budget: float, limit: dict[str, Any]
) -> None:
    options = PlanOptions(budget=budget, **limit | {"max_memory": None})
    search = Search(profile)
    chosen = solve(profile, options, "fast")
    if chosen is None:
        assert search.best(options, budget + SLACK) == np.inf
        return
    check_form(profile, chosen, options)
    saved, squared = search.total(chosen)
    assert saved >= budget - SLACK
    assert squared >= search.best(options, budget - SLACK) * (1 - 1e-9) - 1e-12
    assert squared <= search.best(options, saved - 1e-9) * (1 + 1e-6) + 1e-12


@settings(max_examples=40)
@given(profile=profiles(components=4, bins=3), budget=budgets, limit=limits, memory=st.floats(1, 3))
def test_the_fast_solver_keeps_to_the_memory_and_does_not_pay_for_what_it_does_not_need(
    profile: Profile, budget: float, limit: dict[str, Any], memory: float
) -> None:
    options = PlanOptions(budget=budget, **limit | {"max_memory": memory})
    anything = PlanOptions(budget=budget, **limit | {"max_memory": None})
    search = Search(profile)
    chosen, unlimited = (solve(profile, option, "fast") for option in (options, anything))
    if unlimited is None:
        assert chosen is None
    elif 1 + sum(map(search.memory, unlimited.values())) <= memory:
        assert chosen == unlimited
    elif chosen is not None:
        check_form(profile, chosen, options)
        saved, squared = search.total(chosen)
        assert saved >= budget - SLACK
        assert squared >= search.bounds(options, budget)[0] * (1 - 1e-9) - 1e-12


@settings(max_examples=50)
@given(profile=profiles(components=6, bins=5), budget=budgets, limit=limits)
def test_fast_is_never_better_than_exact_and_as_good_where_exact_saves_as_much(
    profile: Profile, budget: float, limit: dict[str, Any]
) -> None:
    options = PlanOptions(budget=budget, **limit | {"max_memory": None})
    search = Search(profile)
    fast, exact = (solve(profile, options, planner) for planner in ("fast", "exact"))
    if fast is None or exact is None:  # they agree on whether there is a plan, up to rounding
        assert all(search.total(found)[0] < budget + SLACK for found in (fast, exact) if found is not None)
        return
    saved, squared = search.total(fast)
    exactly_saved, least = search.total(exact)
    assert squared >= least * (1 - GAP) - 1e-12
    if exactly_saved >= saved - 1e-9:
        assert squared <= least * (1 + 1e-6) + 1e-12
    if saved < 0.99:
        again = solve(profile, replace(options, budget=saved), "exact")
        assert again is not None
        assert squared == pytest.approx(search.total(again)[1], rel=GAP, abs=1e-12)


@settings(max_examples=20)
@given(profile=profiles(), budget=budgets, limit=limits, planner=planners)
def test_every_component_gets_the_least_harmful_treatment(
    profile: Profile, budget: float, limit: dict[str, Any], planner: str
) -> None:
    plan = try_plan(profile, PlanOptions(budget=budget, planner=planner, **limit))
    if plan is None:
        return
    search = Search(profile)
    for phase in plan.phases:
        bins = bins_of(profile, phase)
        for name, treatment in treatments_of(plan, phase).items():
            harm = search.harm(bins[0], bins[-1] + 1, len(phase.cycle), name)
            assert harm[treatment] <= min(harm.values()) * (1 + 1e-9)


@settings(max_examples=20)
@given(profile=profiles(), budget=st.floats(0, 0.5), limit=limits)
def test_the_same_arguments_give_the_same_bytes(profile: Profile, budget: float, limit: dict[str, Any]) -> None:
    options = PlanOptions(budget=budget, **limit)
    first = try_plan(profile, options)
    again = try_plan(Profile.from_json(profile.to_json(), "profile"), options)
    assert (first and first.to_json()) == (again and again.to_json())


@given(profile=profiles())
def test_a_budget_of_nothing_is_the_full_model_in_one_phase(profile: Profile) -> None:
    plan = make_plan(profile, PlanOptions(budget=0))
    assert [engine.treatments for engine in plan.engines] == [{}]
    assert [(p.low, p.high, p.cycle) for p in plan.phases] == [(profile.bins[0].low, profile.bins[-1].high, (0,))]
    assert (plan.prediction.time_ratio, plan.prediction.relative_l2) == (1, 0)


def test_a_plan_names_the_profile_it_was_made_from() -> None:
    profile = random_profile(3, 2, seed=0)
    plan = make_plan(profile, PlanOptions(budget=0.2, max_engines=3))
    assert (plan.profile_sha256, plan.model) == (profile.sha256(), profile.model)
    assert (plan.budget, plan.max_engines) == (0.2, 3)


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.6])
def test_one_phase_and_one_engine_are_a_uniform_plan(budget: float) -> None:
    profile = random_profile(6, 5, seed=1)
    plan = make_plan(profile, PlanOptions(budget=budget, max_engines=1, max_phases=1))
    assert len(plan.phases) == 1
    assert plan.phases[0].cycle == (1,)
    assert plan.engines[1].treatments


def test_more_memory_never_does_more_damage() -> None:
    profile = random_profile(8, 5, seed=2)
    options = [PlanOptions(budget=0.3, max_memory=m, planner="exact") for m in (1.5, 1.8, 2.2, 3.0, 4.0, None)]
    damages = [make_plan(profile, option).prediction.relative_l2 for option in options]
    assert damages[-1] < damages[0]
    assert all(right <= left * (1 + GAP) for left, right in pairwise(damages))


def test_memory_decides_between_components_that_are_otherwise_alike() -> None:
    # c0 does less damage, c1 frees more; c2 saves no time, and is removed only to free weights
    profile = make_profile(np.array([[[0.1, 0.15, 0.1]]] * 2), [0.3, 0.3, 0.0], freed=[100_000, 400_000, 200_000])

    def removed(max_memory: float | None) -> list[str]:
        plan = make_plan(profile, PlanOptions(budget=0.25, max_memory=max_memory, planner="exact"))
        return [*plan.engines[1].treatments]

    assert [removed(m) for m in (None, 2.0, 1.9)] == [["c0"]] * 3
    assert removed(1.6) == ["c1"]
    assert removed(1.4) == ["c1", "c2"]


def test_an_engine_that_serves_two_phases_is_held_once_and_one_that_computes_nothing_not_at_all() -> None:
    profile = make_profile(np.full((3, 1, 3), 0.1), [0.3, 0.3, 1.0], freed=[100_000, 200_000, 10**6], step=True)
    drop, hold = {"c0": Treatment.DROP}, {STEP: Treatment.HOLD}
    choices = Choices(profile)
    assert choices.memory([]) == choices.memory([{}, hold]) == 1
    assert choices.memory([drop, {}, drop]) == pytest.approx(1.9)
    assert choices.memory([drop, {"c1": Treatment.DROP}]) == pytest.approx(2.7)
    assert choices.memory([{"c0": Treatment.DROP, "c1": Treatment.MEAN}]) == pytest.approx(1.7)


def test_what_is_nested_is_not_freed_twice() -> None:
    profile = make_profile(
        np.full((2, 1, 3), 0.1), [0.1, 0.1, 0.3], nested={2: [0, 1]}, freed=[10**5, 10**5, 3 * 10**5]
    )
    names = dict.fromkeys(("c0", "c1", "c2"), Treatment.DROP)
    assert Choices(profile).memory([names]) == pytest.approx(1.7)


def test_an_impossible_plan_tells_what_more_memory_would_save() -> None:
    profile = make_profile(np.full((2, 2, 2), 0.1), [0.2, 0.5], freed=[500_000, 100_000])

    def refusal(**limits: Any) -> str:
        with pytest.raises(PlanError) as caught:
            make_plan(profile, PlanOptions(budget=0.75, **limits))
        return str(caught.value)

    assert "4 engines and 1.3 × the full model's weights. The most" in refusal(max_memory=1.3)
    assert "such a plan saves is 0 %, and 70 % with more memory. Ask" in refusal(max_memory=1.3)
    assert "such a plan saves is 70 %. Ask" in refusal(max_memory=1.4)  # it is not memory that is missing
    assert "such a plan saves is 70 %. Ask" in refusal()


def test_more_engines_never_do_more_damage() -> None:
    profile = random_profile(8, 5, seed=2)
    options = [PlanOptions(budget=0.3, max_engines=k, planner="exact") for k in range(1, 6)]
    damages = [make_plan(profile, option).prediction.relative_l2 for option in options]
    assert damages[-1] < damages[0]
    assert all(right <= left * (1 + GAP) for left, right in pairwise(damages))


@pytest.mark.parametrize("planner", ["fast", "exact"])
def test_a_run_goes_without_an_engine_where_another_run_needs_it_more(planner: str) -> None:
    # c0 saves a little everywhere without damage, but the one engine is for the second bin, where c1 does none
    profile = make_profile(np.array([[[0.0, 1.0], [0.0, 0.0]]] * 2), [0.01, 0.6])
    plan = make_plan(profile, PlanOptions(budget=0.25, max_engines=1, planner=planner))
    assert [phase.cycle for phase in plan.phases] == [(0,), (1,)]
    assert plan.prediction.relative_l2 == 0


def test_the_upper_bound_of_a_damage_decides() -> None:
    def plan_with(width: float) -> Plan:
        """Let c0 do less damage on average than c1, and be known to `width` only."""
        profile = make_profile(np.array([[[0.10, 0.12]]] * 2), [0.3, 0.3], mean_share=1)
        effects = tuple(
            msgspec.structs.replace(effect, relative_l2=Estimate(mean=0.10, low=0.10 - width, high=0.10 + width))
            if effect.component == "c0"
            else effect
            for effect in profile.effects
        )
        return make_plan(msgspec.structs.replace(profile, effects=effects), PlanOptions(budget=0.2))

    assert list(plan_with(0.01).engines[1].treatments) == ["c0"]
    assert list(plan_with(0.05).engines[1].treatments) == ["c1"]


def test_the_treatment_is_chosen_for_the_whole_phase() -> None:
    # drop is a little better in the first bin, mean is much better in the second
    upper = np.array([[[0.10], [0.50]], [[0.20], [0.10]]])
    together = make_plan(make_profile(upper, [0.5]), PlanOptions(budget=0.4, max_phases=1))
    assert together.engines[1].treatments == {"c0": Treatment.MEAN}
    assert together.prediction.relative_l2 == pytest.approx(0.20 + 0.10)
    apart = make_plan(make_profile(upper, [0.5]), PlanOptions(budget=0.4))
    assert [engine.treatments.get("c0") for engine in apart.engines] == [None, Treatment.DROP, Treatment.MEAN]
    assert apart.prediction.relative_l2 == pytest.approx(np.hypot(0.10, 0.10))


def test_an_outer_component_saves_what_it_saves_and_not_its_parts_too() -> None:
    profile = make_profile(np.array([[[0.1, 0.1, 0.2]]] * 2), [0.15, 0.1, 0.3], nested={2: [0, 1]})
    assert make_plan(profile, PlanOptions(budget=0.2)).engines[1].treatments.keys() == {"c0", "c1"}
    assert make_plan(profile, PlanOptions(budget=0.28)).engines[1].treatments.keys() == {"c2"}
    with pytest.raises(PlanError, match=r"saves is 30 %"):
        make_plan(profile, PlanOptions(budget=0.31))


def test_a_correction_scales_what_components_save() -> None:
    profile = make_profile(np.array([[[0.1, 0.2]]] * 2), [0.2, 0.3])
    options = PlanOptions(budget=0.2, planner="exact")
    assert list(make_plan(profile, options).engines[1].treatments) == ["c0"]
    corrected = make_plan(profile, options, correction=0.7)
    assert list(corrected.engines[1].treatments) == ["c1"]
    assert corrected.prediction.time_ratio == pytest.approx(1 - 0.7 * 0.3)
    with pytest.raises(PlanError, match=r"saves is 19\.5 %"):
        make_plan(profile, options, correction=0.39)


@pytest.mark.parametrize("saving", [0.0, -0.2])
def test_a_component_whose_removal_saves_nothing_is_kept(saving: float) -> None:
    profile = make_profile(np.array([[[0.0, 0.5]]] * 2), [saving, 0.3])
    assert list(make_plan(profile, PlanOptions(budget=0.1)).engines[1].treatments) == ["c1"]


def treated_in(plan: Plan, treatment: Treatment) -> set[float]:
    """List the lower ends of the bins, which are 1 wide, in which a plan makes a treatment."""
    return {
        low
        for phase in plan.phases
        for low in np.arange(phase.low, phase.high)
        for engine in phase.cycle
        if treatment in plan.engines[engine].treatments.values()
    }


@pytest.mark.parametrize("planner", ["fast", "exact"])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_a_treatment_that_was_not_tried_in_a_bin_or_ended_in_nan_is_not_planned_there(planner: str, kind: int) -> None:
    treatment, _ = KINDS[kind]
    upper = np.full((len(KINDS), 4, 1), np.nan)
    upper[kind, :, 0] = 0.01, 0.01, np.nan, 0.01
    plan = make_plan(make_profile(upper, [0.8], steps=[4, 4, 4, 4]), PlanOptions(budget=0.2, planner=planner))
    assert treated_in(plan, treatment)
    assert 2.0 not in treated_in(plan, treatment)


def test_a_reuse_is_planned_over_a_bin_in_which_it_could_not_be_measured() -> None:
    """The only step of the third bin is the fourth: with a period of 2, it is a refresh."""
    kind = next(k for k, (treatment, period) in enumerate(KINDS) if treatment.reuses and period == 2)
    upper = np.full((len(KINDS), 4, 1), np.nan)
    upper[kind, :, 0] = 0.01, 0.01, np.nan, 0.01
    plan = make_plan(make_profile(upper, [0.8], steps=[2, 2, 1, 3]), PlanOptions(budget=0.35))
    assert treated_in(plan, KINDS[kind][0]) == {0.0, 1.0, 2.0, 3.0}


def test_bins_of_any_number_of_steps_take_no_memory() -> None:
    profile = make_profile(np.full((len(KINDS), 2, 1), 0.01), [0.8], steps=[2**40, 1])
    assert make_plan(profile, PlanOptions(budget=0.2)).prediction.time_ratio <= 0.8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("planner", ["fast", "exact"])
def test_damage_whose_square_is_too_large_for_a_float_is_never_planned(planner: str) -> None:
    upper = np.full((len(KINDS), 2, 2), 0.01)
    upper[..., 1] = 1e200
    profile = make_profile(upper, [0.4, 0.4])
    assert not any(
        "c1" in engine.treatments for engine in make_plan(profile, PlanOptions(budget=0.3, planner=planner)).engines
    )
    with pytest.raises(PlanError, match=f"saves is {percent(0.4)}"):
        make_plan(profile, PlanOptions(budget=0.5, planner=planner))


def test_a_component_whose_damage_was_not_measured_is_kept() -> None:
    profile = random_profile(3, 2, seed=3)
    unmeasured = msgspec.structs.replace(profile, effects=tuple(e for e in profile.effects if e.component != "c1"))
    most = 1 - Choices(profile).saved[1] - 0.1
    assert "c1" not in make_plan(unmeasured, PlanOptions(budget=most - 0.01)).engines[1].treatments
    with pytest.raises(PlanError, match=f"saves is {percent(most)}"):
        make_plan(unmeasured, PlanOptions(budget=most + 0.01))


@settings(max_examples=20)
@given(profile=profiles(components=4, bins=3), limit=limits)
def test_an_impossible_budget_names_the_most_that_can_be_saved(profile: Profile, limit: dict[str, Any]) -> None:
    search, options = Search(profile), PlanOptions(budget=0.5, **limit)
    most = search.most(options)
    if most > 0.98 or search.most(shifted(options, SLACK)) > most + SLACK:
        return
    with pytest.raises(PlanError) as caught:
        make_plan(profile, PlanOptions(budget=most + 0.01, **limit))
    message = str(caught.value)
    assert re.findall(r"saves is ([\d.]+ %)", message) == [percent(most)]
    assert "\n" not in message


def test_budgets_that_differ_by_a_tenth_of_a_percent_are_told_apart() -> None:
    profile = make_profile(np.full((2, 1, 1), 0.1), [0.3])
    with pytest.raises(PlanError, match=r"no plan saves 30\.4 % .* saves is 30 %"):
        make_plan(profile, PlanOptions(budget=0.304))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -0.01}, r"\[0, 1\); got -0\.01"),
        ({"budget": 1.0}, r"\[0, 1\); got 1\.0"),
        ({"budget": 27}, r"\[0, 1\); got 27"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"budget": 0.2, "max_engines": 0}, "max-engines must be at least 1, got 0"),
        ({"budget": 0.2, "max_phases": 0}, "max-phases must be at least 1, got 0"),
        ({"budget": 0.2, "max_memory": 0.99}, "max-memory must be at least 1, .* got 0.99"),
        ({"budget": 0.2, "max_memory": float("nan")}, "max_memory is nan"),
        ({"budget": 0.2, "planner": "greedy"}, "unknown planner 'greedy'. Expected exact or fast"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PlanOptions(**options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("planner", ["fast", "exact"])
def test_a_hopeless_component_does_not_make_the_other_choices_coarse(planner: str, seed: int) -> None:
    # the planner's absolute gap of 1e-6 must stay small against the damage of the plan
    profile = random_profile(12, 5, seed, decades=3.0)
    options = PlanOptions(budget=0.15, planner=planner)
    hopeless = tuple(
        msgspec.structs.replace(effect, relative_l2=exactly(2.0)) if effect.component == "c0" else effect
        for effect in profile.effects
    )
    without = tuple(effect for effect in profile.effects if effect.component != "c0")
    damages = [
        make_plan(msgspec.structs.replace(profile, effects=effects), options).prediction.relative_l2 ** 2
        for effects in (without, hopeless)
    ]
    assert damages[1] == pytest.approx(damages[0], rel=GAP)


def part(b: int, treatments: Mapping[str, Treatment], *, period: int = 1) -> TreatedRun:
    """Do something in one bin."""
    return TreatedRun(run=BinRun(first=b, last=b + 1, period=period), treatments=treatments)


def test_equal_neighbours_become_one_phase_and_equal_engines_one_engine() -> None:
    profile = random_profile(3, 4, seed=4)
    drop = {"c1": Treatment.DROP}
    parts = [part(b, own) for b, own in enumerate([drop, {}, drop, drop])]
    plan = assemble(profile, PlanOptions(budget=0.1), parts, Choices(profile))
    assert [engine.treatments for engine in plan.engines] == [{}, drop]
    assert [(phase.low, phase.high, phase.cycle) for phase in plan.phases] == [
        (0.0, 1.0, (1,)),
        (1.0, 2.0, (0,)),
        (2.0, 4.0, (1,)),
    ]
    # and merged runs are predicted as one phase: damages of a component add over its bins
    damage = Search(profile).damage
    first, third, fourth = (damage["c1", b, *DROP] for b in (0, 2, 3))
    assert plan.prediction.relative_l2 == pytest.approx(np.hypot(first, third + fourth))


def test_neighbours_that_differ_in_their_period_stay_apart() -> None:
    profile = random_profile(3, 4, seed=4, kinds=5)
    hold = {"c1": Treatment.HOLD}
    parts = [part(0, {}, period=2), part(1, {}), part(2, hold, period=2), part(3, hold, period=4)]
    plan = assemble(profile, PlanOptions(budget=0.1), parts, Choices(profile))
    assert [engine.treatments for engine in plan.engines] == [{}, hold]
    assert [(phase.low, phase.high, phase.cycle) for phase in plan.phases] == [
        (0.0, 2.0, (0,)),
        (2.0, 3.0, (0, 1)),
        (3.0, 4.0, (0, 1, 1, 1)),
    ]
    assert [engine.emits for engine in plan.engines] == [("c1",), ()]


def only(kind: tuple[Treatment, int], count: int = 2, bins: int = 1, value: float = 0.01) -> NDArray[np.float64]:
    """Make one kind of treatment nearly harmless and all others very harmful."""
    upper = np.full((len(KINDS), bins, count), 2.0)
    upper[KINDS.index(kind)] = value
    return upper


@pytest.mark.parametrize("planner", ["fast", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_treatment_is_planned_with_its_own_cycle(kind: tuple[Treatment, int], planner: str) -> None:
    profile = make_profile(only(kind), [0.4, 0.2], steps=[8])
    plan = make_plan(profile, PlanOptions(budget=0.15, planner=planner))
    treatment, period = kind
    assert {*plan.engines[1].treatments.values()} == {treatment}
    assert [phase.cycle for phase in plan.phases] == [(1,) if period == 1 else (0, *[1] * (period - 1))]
    assert plan.engines[0].emits == (tuple(plan.engines[1].treatments) if treatment.reuses else ())


@pytest.mark.parametrize(("steps", "saved"), [(1, 0), (2, 1 / 2), (3, 1 / 3), (4, 1 / 2), (5, 2 / 5)])
def test_a_cycle_saves_in_the_steps_that_are_no_refresh(steps: int, saved: float) -> None:
    profile = make_profile(only(HOLD, count=1), [0.5], steps=[steps])
    choices = Choices(profile)
    predicted = choices.predict([choices.treat(BinRun(first=0, last=1, period=2), [0])])
    assert predicted.time_ratio == pytest.approx(1 - 0.5 * saved)


@pytest.mark.parametrize("planner", ["fast", "exact"])
def test_holding_the_whole_call_needs_no_engine_of_its_own(planner: str) -> None:
    # the step is best held in the first bin, and c0 best dropped in the second: one engine that computes
    upper = np.full((3, 2, 2), 2.0)
    upper[KINDS.index(HOLD), 0, 1] = upper[KINDS.index(DROP), 1, 0] = 0.01
    profile = make_profile(upper, [0.5, 1.0], steps=[4, 4], step=True)
    plan = make_plan(profile, PlanOptions(budget=0.45, max_engines=1, planner=planner))
    assert [(engine.treatments, engine.emits) for engine in plan.engines] == [
        ({}, (STEP,)),
        ({STEP: Treatment.HOLD}, ()),
        ({"c0": Treatment.DROP}, (STEP,)),
    ]
    assert [phase.cycle for phase in plan.phases] == [(0, 1), (2,)]
    assert plan.prediction.time_ratio == pytest.approx(1 - (2 * 1.0 + 4 * 0.5) / 8)


def test_a_correction_leaves_the_step_alone() -> None:
    profile = make_profile(only(HOLD, count=3), [0.3, 0.5, 1.0], step=True)
    assert Choices(profile).saved.tolist() == pytest.approx([0.3, 0.5, 1.0])
    assert Choices(profile, 0.5).saved.tolist() == pytest.approx([0.15, 0.25, 1.0])


@given(shares=st.lists(st.floats(-0.1, 0.6), min_size=4, max_size=4), outer=st.floats(-0.1, 1.2))
def test_parts_never_save_more_than_the_whole(shares: list[float], outer: float) -> None:
    # c4 holds c0 and c1; the step holds all
    profile = make_profile(np.full((3, 1, 6), 0.1), [*shares, outer, 1.0], nested={4: [0, 1]}, step=True)
    saved = Choices(profile).saved
    asked = np.clip([*shares, outer, 1.0], 0, 1)
    assert (saved >= 0).all()
    assert (saved <= asked + 1e-12).all()
    assert saved[:2].sum() <= asked[4] + 1e-12
    assert saved[:4].sum() <= 1 + 1e-12
    assert saved[4:].tolist() == pytest.approx(asked[4:])
    if asked[:2].sum() <= asked[4] and asked[:4].sum() <= 1:  # nothing contradicts itself
        assert saved.tolist() == pytest.approx(asked)
    if min(saved[:2]) > 1e-6:  # scaling down keeps the proportions
        assert saved[0] / saved[1] == pytest.approx(asked[0] / asked[1])


def test_what_holds_others_but_was_not_timed_takes_nothing_from_them() -> None:
    # c2 holds c0 and c1; only those were analysed
    whole = make_profile(np.full((2, 2, 3), 0.1), [0.2, 0.3, 0.0], nested={2: [0, 1]})
    profile = msgspec.structs.replace(
        whole,
        costs=whole.costs[:2],
        effects=tuple(effect for effect in whole.effects if effect.component != "c2"),
    )
    assert Choices(profile).saved.tolist() == pytest.approx([0.2, 0.3, 0.0])
    plan = make_plan(profile, PlanOptions(budget=0.2))
    assert {name for engine in plan.engines for name in engine.treatments} <= {"c0", "c1"}


def test_fast_may_miss_what_lies_between_the_corners_of_the_hull() -> None:
    # c0 alone, then both, are the corners; c1 alone is between them and above the line
    profile = make_profile(np.array([[[0.1, 0.2]]] * 2), [0.2, 0.3])
    plans = {s: make_plan(profile, PlanOptions(budget=0.25, planner=s)) for s in ("fast", "exact")}
    assert {s: [*plan.engines[1].treatments] for s, plan in plans.items()} == {"fast": ["c0", "c1"], "exact": ["c1"]}


@given(
    schedule=st.one_of(
        st.lists(st.integers(0, 3), min_size=1, max_size=40),
        st.lists(
            st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(1, 6)), min_size=1, max_size=4
        ).map(lambda runs: [engine for cycle, turns in runs for engine in cycle * turns]),
    )
)
def test_phases_give_back_the_schedule_that_they_were_found_in(schedule: list[int]) -> None:
    levels = [0.7 * i - 3 for i in range(len(schedule))]
    phases = phases_of(schedule, levels, -2.0, 1.0)
    assert phases[0].low <= levels[0]
    assert phases[-1].high > levels[-1]
    plan = msgspec.structs.replace(
        make_plan(random_profile(2, 1, seed=0), PlanOptions(budget=0)),
        engines=with_emissions([{}, *({f"c{i}": Treatment.DROP} for i in range(3))], ()),
        phases=phases,
    )
    assert plan.schedule(levels) == tuple(schedule)
    assert len(phases) <= 1 + sum(left != right for left, right in pairwise(schedule))


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [2, 5])
def test_a_large_model_is_planned(kinds: int) -> None:
    profile = random_profile(100, 8, seed=5, kinds=kinds)
    plan = make_plan(profile, PlanOptions(budget=0.27))
    assert plan.prediction.time_ratio <= 0.73 + SLACK
    assert len(plan.engines) > 2

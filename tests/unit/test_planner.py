"""Plans keep their promises, are the best there are, and come out the same every time."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unetc.artifacts.plan import Plan
from unetc.artifacts.profile import (
    Bin,
    Component,
    Cost,
    Damage,
    Effect,
    Estimate,
    ModelReference,
    Profile,
    Treatment,
)
from unetc.compiler.planner import PlanOptions, Removal, _segments, _solve, assemble, make_plan
from unetc.errors import PlanError

SLACK = 1e-6
"""The solver meets a budget to its feasibility tolerance, 1e-6 of a step."""
GAP = 1e-3
"""How far from the best a plan may be, relative; the solver is asked for 1e-4."""

FULL_MS = 80.0
TREATMENTS = (Treatment.DROP, Treatment.MEAN)


def exactly(value: float) -> Estimate:
    return Estimate(mean=value, low=value, high=value)


def damage_of(relative_l2: Estimate) -> Damage:
    return Damage(relative_l2=relative_l2, psnr=exactly(30.0), ssim=exactly(0.9))


def make_profile(
    upper: NDArray[np.float64],
    saved: Sequence[float],
    *,
    steps: Sequence[int] | None = None,
    nested: Mapping[int, Sequence[int]] | None = None,
    mean_share: float = 0.5,
) -> Profile:
    """Make a profile.

    Args:
        upper: Upper bounds of the relative L2 damage, [treatment (drop, mean), bin, component].
        saved: Share of the full time that each component's removal saves.
        steps: Steps of each bin; 3 when not given.
        nested: Which components go with which.
        mean_share: The mean of every damage as a share of its upper bound.
    """
    _, bins, count = upper.shape
    components = tuple(
        Component(
            name=f"c{c}",
            kind="residual",
            owner=f"c{c}",
            index=c,
            channels=1,
            axis=1,
            offset=c,
            nested=tuple(f"c{inner}" for inner in (nested or {}).get(c, ())),
        )
        for c in range(count)
    )
    effects = tuple(
        Effect(
            component=f"c{c}",
            treatment=treatment,
            bin=b,
            damage=damage_of(
                Estimate(mean=mean_share * float(upper[t, b, c]), low=0.0, high=float(upper[t, b, c])),
            ),
        )
        for t, treatment in enumerate(TREATMENTS)
        for b in range(bins)
        for c in range(count)
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
        costs=tuple(Cost(component=f"c{c}", saved_ms=exactly(FULL_MS * float(share))) for c, share in enumerate(saved)),
        effects=effects,
        means=tuple(np.zeros(count, "<f4").tobytes() for _ in range(bins)),
    )


def random_profile(count: int, bins: int, seed: int, *, decades: float = 2.0) -> Profile:
    """Make a profile whose damages spread over some decades and whose savings add up to less than all of the time."""
    generator = np.random.default_rng(seed)
    upper = 10 ** -generator.uniform(0, decades, (2, bins, count))
    return make_profile(upper, generator.dirichlet(np.ones(count)) * 0.9)


@st.composite
def profiles(draw: st.DrawFn, *, components: int = 6, bins: int = 5) -> Profile:
    """Draw profiles with nesting, some components without savings and some without damage."""
    count, cuts = draw(st.integers(2, components)), draw(st.integers(1, bins))
    amount = st.one_of(st.floats(-4, 0.2).map(lambda decade: 10.0**decade), st.just(0.0))
    upper = np.reshape(draw(st.lists(amount, min_size=2 * cuts * count, max_size=2 * cuts * count)), (2, cuts, count))
    saved = draw(st.lists(st.floats(-0.05, 0.4), min_size=count, max_size=count))
    steps = draw(st.lists(st.integers(1, 5), min_size=cuts, max_size=cuts))
    # a forest: the parent of a component comes after it or is none
    parents = [draw(st.integers(c + 1, count)) for c in range(count)]
    nested: dict[int, list[int]] = {}
    for c in range(count):
        outer = parents[c]
        while outer < count:
            nested.setdefault(outer, []).append(c)
            outer = parents[outer]
    return make_profile(upper, saved, steps=steps, nested=nested, mean_share=draw(st.floats(0, 1)))


budgets = st.floats(0.001, 0.7)
limits = st.builds(
    lambda engines, phases: {"max_engines": engines, "max_phases": phases},
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 3)),
)


class Search:
    """Tries every cut of the bins into phases with every set of components in each; reads the profile by itself."""

    def __init__(self, profile: Profile) -> None:
        count = len(profile.components)
        self.names = [component.name for component in profile.components]
        self.saved = [max(0.0, cost.saved_ms.mean) / FULL_MS for cost in profile.costs]
        self.steps = [bin.steps for bin in profile.bins]
        self.damage = {(e.component, e.bin, e.treatment): e.damage.relative_l2.high for e in profile.effects}
        nested = [(self.names.index(c.name), self.names.index(inner)) for c in profile.components for inner in c.nested]
        sets = [tuple(c for c in range(count) if mask >> c & 1) for mask in range(2**count)]
        self.sets = [s for s in sets if not any(outer in s and inner in s for outer, inner in nested)]

    def squared_damage(self, first: int, last: int, removed: Sequence[int]) -> float:
        return sum(
            min(sum(self.damage[self.names[c], b, t] for b in range(first, last)) for t in TREATMENTS) ** 2
            for c in removed
        )

    def plans(self, options: PlanOptions) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Yield the share saved and the squared damage of all plans of each cut that keep to the limits."""
        bins = len(self.steps)
        for inside in itertools.product((False, True), repeat=bins - 1):
            edges = [0, *(b for b, cut in enumerate(inside, start=1) if cut), bins]
            if options.max_phases is not None and len(edges) - 1 > options.max_phases:
                continue
            saved, squared, engines = np.zeros(1), np.zeros(1), np.zeros(1)
            for first, last in pairwise(edges):
                share = sum(self.steps[first:last]) / sum(self.steps)
                saved = np.add.outer(saved, [share * sum(self.saved[c] for c in s) for s in self.sets]).ravel()
                squared = np.add.outer(squared, [self.squared_damage(first, last, s) for s in self.sets]).ravel()
                engines = np.add.outer(engines, [bool(s) for s in self.sets]).ravel()
            within = engines <= options.max_engines
            yield saved[within], squared[within]

    def best(self, options: PlanOptions, budget: float) -> float:
        """Find the least squared damage that saves the budget; infinite if nothing does."""
        return min(float(squared[saved >= budget].min(initial=np.inf)) for saved, squared in self.plans(options))

    def most(self, options: PlanOptions) -> float:
        return max(float(saved.max()) for saved, _ in self.plans(options))


def try_plan(profile: Profile, options: PlanOptions) -> Plan | None:
    try:
        return make_plan(profile, options)
    except PlanError:
        return None


@settings(max_examples=60)
@given(profile=profiles(), budget=budgets, limit=limits)
def test_a_plan_keeps_the_limits_it_was_made_for(profile: Profile, budget: float, limit: dict[str, int]) -> None:
    plan = try_plan(profile, PlanOptions(budget=budget, **limit))
    if plan is None:
        return
    assert plan.prediction.time_ratio <= 1 - budget + SLACK
    assert plan.engines[0].treatments == {}
    assert len(plan.engines) - 1 <= limit["max_engines"]
    assert limit["max_phases"] is None or len(plan.phases) <= limit["max_phases"]
    assert len({frozenset(engine.treatments.items()) for engine in plan.engines}) == len(plan.engines)
    assert {engine for phase in plan.phases for engine in phase.cycle} >= set(range(1, len(plan.engines)))
    inner = {component.name: set(component.nested) for component in profile.components}
    for engine in plan.engines:
        assert not any(inner[name] & engine.treatments.keys() for name in engine.treatments)


@settings(max_examples=60)
@given(profile=profiles(), budget=budgets, limit=limits)
def test_phases_cover_every_bin_exactly_once(profile: Profile, budget: float, limit: dict[str, int]) -> None:
    plan = try_plan(profile, PlanOptions(budget=budget, **limit))
    if plan is None:
        return
    assert (plan.phases[0].low, plan.phases[-1].high) == (profile.bins[0].low, profile.bins[-1].high)
    assert all(left.high == right.low and left.cycle != right.cycle for left, right in pairwise(plan.phases))
    for bin in profile.bins:
        assert sum(phase.low <= bin.low and bin.high <= phase.high for phase in plan.phases) == 1


@settings(max_examples=60)
@given(profile=profiles(), budget=budgets, limit=limits)
def test_the_prediction_is_what_the_profile_says_about_the_plan(
    profile: Profile, budget: float, limit: dict[str, int]
) -> None:
    plan = try_plan(profile, PlanOptions(budget=budget, **limit))
    if plan is None:
        return
    search = Search(profile)
    saved = squared = 0.0
    for phase in plan.phases:
        bins = [b for b, bin in enumerate(profile.bins) if phase.low <= bin.low < phase.high]
        for name, treatment in plan.engines[phase.cycle[0]].treatments.items():
            saved += sum(search.steps[b] for b in bins) / sum(search.steps) * search.saved[search.names.index(name)]
            squared += sum(search.damage[name, b, treatment] for b in bins) ** 2
    assert plan.prediction.time_ratio == pytest.approx(1 - saved, abs=1e-9)
    assert plan.prediction.relative_l2 == pytest.approx(np.sqrt(squared), abs=1e-9)


@settings(max_examples=200)
@given(profile=profiles(components=4, bins=4), budget=budgets, limit=limits)
def test_no_plan_is_better(profile: Profile, budget: float, limit: dict[str, int]) -> None:
    options = PlanOptions(budget=budget, **limit)
    search = Search(profile)
    try:
        chosen = _solve(Removal.of(profile), _segments(len(profile.bins)), options)
    except PlanError:
        assert search.best(options, budget + SLACK) == np.inf
        return
    squared = sum(search.squared_damage(*segment, removed) for segment, removed in chosen.items())
    assert squared <= search.best(options, budget + SLACK) * (1 + GAP) + 1e-12
    assert squared >= search.best(options, budget - SLACK) * (1 - 1e-9) - 1e-12


@settings(max_examples=30)
@given(profile=profiles(), budget=budgets, limit=limits)
def test_every_removed_component_gets_the_less_harmful_treatment(
    profile: Profile, budget: float, limit: dict[str, int]
) -> None:
    plan = try_plan(profile, PlanOptions(budget=budget, **limit))
    if plan is None:
        return
    search = Search(profile)
    for phase in plan.phases:
        bins = [b for b, bin in enumerate(profile.bins) if phase.low <= bin.low < phase.high]
        for name, treatment in plan.engines[phase.cycle[0]].treatments.items():
            harm = {t: sum(search.damage[name, b, t] for b in bins) for t in TREATMENTS}
            assert harm[treatment] <= min(harm.values()) * (1 + 1e-9)


@settings(max_examples=20)
@given(profile=profiles(), budget=st.floats(0, 0.5), limit=limits)
def test_the_same_arguments_give_the_same_bytes(profile: Profile, budget: float, limit: dict[str, int]) -> None:
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


def test_more_engines_never_do_more_damage() -> None:
    profile = random_profile(8, 5, seed=2)
    damages = [make_plan(profile, PlanOptions(budget=0.3, max_engines=k)).prediction.relative_l2 for k in range(1, 6)]
    assert damages[-1] < damages[0]
    assert all(right <= left * (1 + GAP) for left, right in pairwise(damages))


def test_the_upper_bound_of_a_damage_decides() -> None:
    def plan_with(width: float) -> Plan:
        """Let c0 do less damage on average than c1, and be known to `width` only."""
        profile = make_profile(np.array([[[0.10, 0.12]]] * 2), [0.3, 0.3], mean_share=1)
        effects = tuple(
            msgspec.structs.replace(effect, damage=damage_of(Estimate(mean=0.10, low=0.10 - width, high=0.10 + width)))
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
    profile = make_profile(np.full((2, 1, 3), 0.1), [0.2, 0.2, 0.3], nested={2: [0, 1]})
    assert make_plan(profile, PlanOptions(budget=0.25)).engines[1].treatments.keys() == {"c2"}
    assert make_plan(profile, PlanOptions(budget=0.35)).engines[1].treatments.keys() == {"c0", "c1"}


def test_a_correction_scales_what_components_save() -> None:
    profile = make_profile(np.array([[[0.1, 0.2]]] * 2), [0.2, 0.3])
    options = PlanOptions(budget=0.2)
    assert list(make_plan(profile, options).engines[1].treatments) == ["c0"]
    corrected = make_plan(profile, options, correction=0.7)
    assert list(corrected.engines[1].treatments) == ["c1"]
    assert corrected.prediction.time_ratio == pytest.approx(1 - 0.7 * 0.3)
    with pytest.raises(PlanError, match=r"saves is 19\.5%"):
        make_plan(profile, options, correction=0.39)


@pytest.mark.parametrize("saving", [0.0, -0.2])
def test_a_component_whose_removal_saves_nothing_is_kept(saving: float) -> None:
    profile = make_profile(np.array([[[0.0, 0.5]]] * 2), [saving, 0.3])
    assert list(make_plan(profile, PlanOptions(budget=0.1)).engines[1].treatments) == ["c1"]


def test_a_component_whose_damage_was_not_measured_is_kept() -> None:
    profile = random_profile(3, 2, seed=3)
    unmeasured = msgspec.structs.replace(profile, effects=tuple(e for e in profile.effects if e.component != "c1"))
    most = 1 - Removal.of(profile).saved[1] - 0.1
    assert "c1" not in make_plan(unmeasured, PlanOptions(budget=most - 0.01)).engines[1].treatments
    with pytest.raises(PlanError, match=f"saves is {most:.1%}"):
        make_plan(unmeasured, PlanOptions(budget=most + 0.01))


@settings(max_examples=30)
@given(profile=profiles(components=4, bins=3), limit=limits)
def test_an_impossible_budget_names_the_most_that_can_be_saved(profile: Profile, limit: dict[str, int]) -> None:
    most = Search(profile).most(PlanOptions(budget=0.5, **limit))
    if most > 0.98:
        return
    with pytest.raises(PlanError) as caught:
        make_plan(profile, PlanOptions(budget=most + 0.01, **limit))
    message = str(caught.value)
    assert re.findall(r"saves is ([\d.]+)%", message) == [f"{100 * most:.1f}"]
    assert "\n" not in message


def test_budgets_that_differ_by_a_tenth_of_a_percent_are_told_apart() -> None:
    profile = make_profile(np.full((2, 1, 1), 0.1), [0.3])
    with pytest.raises(PlanError, match=r"no plan saves 30\.4% .* saves is 30\.0%"):
        make_plan(profile, PlanOptions(budget=0.304))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -0.01}, r"\[0, 1\); got -0\.01"),
        ({"budget": 1.0}, r"\[0, 1\); got 1\.0"),
        ({"budget": 27}, r"\[0, 1\); got 27"),
        ({"budget": float("nan")}, "got nan"),
        ({"budget": 0.2, "max_engines": 0}, "max-engines must be at least 1, got 0"),
        ({"budget": 0.2, "max_phases": 0}, "max-phases must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PlanOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_a_hopeless_component_does_not_make_the_other_choices_coarse(seed: int) -> None:
    # the solver's absolute gap of 1e-6 must stay small beside the damage of the plan, whatever the worst damage is
    profile = random_profile(12, 5, seed, decades=3.0)
    options = PlanOptions(budget=0.15)
    hopeless = tuple(
        msgspec.structs.replace(effect, damage=damage_of(exactly(2.0))) if effect.component == "c0" else effect
        for effect in profile.effects
    )
    without = tuple(effect for effect in profile.effects if effect.component != "c0")
    damages = [
        make_plan(msgspec.structs.replace(profile, effects=effects), options).prediction.relative_l2 ** 2
        for effects in (without, hopeless)
    ]
    assert damages[1] == pytest.approx(damages[0], rel=GAP)


def test_equal_neighbours_become_one_phase_and_equal_engines_one_engine() -> None:
    profile = random_profile(3, 4, seed=4)
    drop = {"c1": Treatment.DROP}
    segments = [((0, 1), drop), ((1, 2), {}), ((2, 3), drop), ((3, 4), drop)]
    plan = assemble(profile, PlanOptions(budget=0.1), segments, Removal.of(profile))
    assert [engine.treatments for engine in plan.engines] == [{}, drop]
    assert [(phase.low, phase.high, phase.cycle) for phase in plan.phases] == [
        (0.0, 1.0, (1,)),
        (1.0, 2.0, (0,)),
        (2.0, 4.0, (1,)),
    ]
    # and what was merged is predicted as the one phase that it is: damages of a component add over its bins
    damage = Search(profile).damage
    first, third, fourth = (damage["c1", b, Treatment.DROP] for b in (0, 2, 3))
    assert plan.prediction.relative_l2 == pytest.approx(np.hypot(first, third + fourth))


@pytest.mark.slow
def test_a_large_model_is_planned() -> None:
    profile = random_profile(40, 8, seed=5)
    plan = make_plan(profile, PlanOptions(budget=0.27))
    assert plan.prediction.time_ratio <= 0.73 + SLACK
    assert len(plan.engines) > 2

"""Components are ranked by time saved per damage; the order follows the figures that are shown."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unetc.analyzer.ranking import By, Ranked, rank
from unetc.artifacts.profile import (
    Bin,
    Component,
    Cost,
    Effect,
    Estimate,
    ModelReference,
    Profile,
)
from unetc.treatments import Treatment

PROFILES = Path(__file__).parents[1] / "planner/profiles"
WAYS = ((Treatment.DROP, 1), (Treatment.MEAN, 1), (Treatment.HOLD, 2), (Treatment.FORECAST, 4))


def exactly(value: float) -> Estimate:
    return Estimate(mean=value, low=value, high=value)


def make_profile(
    saved_ms: dict[str, float], effects: dict[tuple[str, Treatment, int, int], float], steps: tuple[int, ...] = (4, 4)
) -> Profile:
    """Make a profile of a full model that takes 10 ms."""
    return Profile(
        unetc="0",
        model=ModelReference(name="model", sha256="0" * 64, pipeline="Pipeline", denoiser="UNet"),
        scheduler="ddim",
        steps=sum(steps),
        samples=2,
        seed=0,
        target="null",
        threads=1,
        batch=1,
        sample_shape=(1, 8, 8),
        components=tuple(
            Component(name=name, kind="residual", owner=name, index=i, channels=1, axis=1, nested=(), offset=i)
            for i, name in enumerate(saved_ms)
        ),
        bins=tuple(Bin(low=float(i), high=i + 1.0, steps=own) for i, own in enumerate(steps)),
        full_ms=exactly(10.0),
        full_bytes=100,
        costs=tuple(Cost(component=name, saved_ms=exactly(ms), freed_bytes=0) for name, ms in saved_ms.items()),
        effects=tuple(
            Effect(
                component=name, treatment=treatment, period=period, bin=bin, measured=bin == 0, relative_l2=exactly(l2)
            )
            for (name, treatment, period, bin), l2 in effects.items()
        ),
        samplings=1.0,
        means=tuple(bytes(4 * len(saved_ms)) for _ in steps),
    )


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    names = [f"c{i}" for i in range(draw(st.integers(1, 5)))]
    steps = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any)))
    damage = st.one_of(st.just(0.0), st.floats(1e-6, 10))
    effects = {
        (name, treatment, period, bin): draw(damage)
        for name in names
        for treatment, period in WAYS
        for bin in range(len(steps))
        if draw(st.booleans())
    }
    return make_profile({name: draw(st.floats(-1, 10)) for name in names}, effects, steps)


def figures(own: Ranked, by: By) -> float:
    return {By.WORTH: -own.worth, By.SAVING: -own.saving, By.DAMAGE: own.damage}[by]


@given(profiles(), st.sampled_from(By))
def test_the_order_follows_the_figure_and_components_that_save_nothing_come_last(profile: Profile, by: By) -> None:
    ranking = rank(profile, by)
    assert len(ranking.bins) == len(profile.bins)
    for ranked in (ranking.overall, *ranking.bins):
        assert len({own.component for own in ranked}) == len(ranked)
        keys = [(own.saving <= 0, figures(own, by)) for own in ranked]
        assert keys == sorted(keys)


@given(profiles())
def test_every_component_with_an_effect_is_there_with_the_treatment_that_is_worth_most(profile: Profile) -> None:
    ranking = rank(profile)
    shares = {cost.component: cost.saved_ms.mean / 10 for cost in profile.costs}
    assert {own.component for own in ranking.overall} == {effect.component for effect in profile.effects}
    for bin, ranked in enumerate(ranking.bins):
        best = {own.component: own for own in ranked}
        for effect in (effect for effect in profile.effects if effect.bin == bin):
            steps = profile.bins[bin].steps
            treated = steps - (math.ceil(steps / effect.period) if effect.period > 1 else 0)
            saving = shares[effect.component] * treated / steps if steps else 0.0
            damage = effect.relative_l2.mean
            worth = 0.0 if saving <= 0 else saving / damage if damage else math.inf
            assert best[effect.component].worth >= worth


@given(profiles(), st.sampled_from(By))
def test_a_ranking_does_not_depend_on_the_order_of_the_effects(profile: Profile, by: By) -> None:
    turned = msgspec.structs.replace(profile, effects=profile.effects[::-1])
    for ranked, again in zip(rank(profile, by).bins, rank(turned, by).bins, strict=True):
        assert [(own.component, own.saving, own.damage) for own in ranked] == [
            (own.component, own.saving, own.damage) for own in again
        ]


def test_a_reused_component_saves_the_steps_that_are_not_computed_and_damages_add_up() -> None:
    held = {("a", Treatment.HOLD, 2, bin): damage for bin, damage in enumerate((0.1, 0.3))}
    ranking = rank(make_profile({"a": 4.0}, held, steps=(3, 5)))
    (overall,) = ranking.overall
    assert (overall.saving, overall.damage) == (pytest.approx(0.4 * 4 / 8), pytest.approx(0.4))
    assert (overall.measured, overall.bins, overall.basis) == (1, 2, "1 of 2 measured")
    assert overall.way == "hold, period 2"
    ((first,), (second,)) = ranking.bins
    assert first.saving == pytest.approx(0.4 / 3)  # steps 1 and 3 are computed
    assert second.saving == pytest.approx(0.4 * 2 / 5)
    assert (first.basis, second.basis) == ("measured", "estimated")


def test_a_noise_level_without_a_figure_counts_as_the_worst_of_the_others() -> None:
    effects = {("a", Treatment.DROP, 1, 0): 0.1, ("a", Treatment.DROP, 1, 2): 0.3}
    ranking = rank(make_profile({"a": 4.0}, effects, steps=(2, 2, 2)))
    assert ranking.overall[0].damage == pytest.approx(0.7)
    assert ranking.bins[1] == ()


def test_no_damage_is_worth_infinity_and_no_saving_nothing() -> None:
    free = {(name, Treatment.DROP, 1, 0): 0.0 for name in ("slow", "small", "large")}
    profile = make_profile(
        {"slow": -1.0, "small": 1.0, "large": 2.0, "dear": 5.0}, {**free, ("dear", Treatment.DROP, 1, 0): 0.5}, (4,)
    )
    assert [(own.component, own.worth) for own in rank(profile).overall] == [
        ("large", math.inf),
        ("small", math.inf),
        ("dear", pytest.approx(1.0)),
        ("slow", 0.0),
    ]
    assert [own.component for own in rank(profile, By.DAMAGE).overall] == ["large", "small", "dear", "slow"]
    assert [own.component for own in rank(profile, By.SAVING).overall] == ["dear", "large", "small", "slow"]


@pytest.mark.parametrize("name", ["digits-ddim", "digits-dpm", "prompted-digits"])
def test_components_of_a_real_profile_are_all_ranked(name: str) -> None:
    profile = Profile.load(PROFILES / f"{name}.json")
    ranking = rank(profile)
    assert {own.component for own in ranking.overall} == {component.name for component in profile.components}
    assert all(left.worth >= right.worth for left, right in pairwise(ranking.overall))

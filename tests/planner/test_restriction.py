"""A restricted plan uses only what its restriction allows, and is the best of such plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from unetc.artifacts import Profile
from unetc.artifacts.plan import Plan
from unetc.compiler.planner.choices import Choices
from unetc.compiler.planner.planner import PlanOptions, make_plan
from unetc.compiler.planner.restriction import Restriction
from unetc.errors import PlanError
from unetc.treatments import Treatment

PROFILES = Path(__file__).parent / "profiles"
NAMES = ("digits-ddim", "digits-dpm", "prompted-digits")


def used(plan: Plan) -> set[tuple[str, Treatment]]:
    return {pair for engine in plan.engines for pair in engine.treatments.items()}


@pytest.mark.parametrize("planner", ["fast", "exact"])
@pytest.mark.parametrize("restriction", Restriction)
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_uses_only_what_its_restriction_allows(name: str, restriction: Restriction, planner: str) -> None:
    if planner == "exact" and restriction in (Restriction.ALL, Restriction.REMOVAL_ONLY):
        pytest.skip("takes long, and reads the same choices")
    profile = Profile.load(PROFILES / f"{name}.json")
    kinds = {component.name: component.kind for component in profile.components}
    plan = make_plan(profile, PlanOptions(budget=0.1, max_engines=2, restriction=restriction, planner=planner))
    assert used(plan)
    assert all(restriction.allows(kinds[component], treatment) for component, treatment in used(plan))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_may_only_be_held_promises_no_less_damage(name: str) -> None:
    profile = Profile.load(PROFILES / f"{name}.json")
    options = {
        one: PlanOptions(budget=0.2, restriction=one) for one in (Restriction.STEPS_ONLY, Restriction.CHOSEN_STEPS)
    }
    steps, chosen = (make_plan(profile, one).prediction.relative_l2 for one in options.values())
    assert steps <= chosen * (1 + 1e-9)


def test_the_three_restrictions_mean_what_they_say() -> None:
    allowed = {
        one: {(kind, t) for kind in ("residual", "skip", "level", "step") for t in Treatment if one.allows(kind, t)}
        for one in Restriction
    }
    assert allowed[Restriction.CHOSEN_STEPS] == {("step", Treatment.HOLD)}
    assert allowed[Restriction.STEPS_ONLY] == {("step", treatment) for treatment in Treatment}
    assert not any(treatment.reuses or kind == "step" for kind, treatment in allowed[Restriction.REMOVAL_ONLY])
    assert {("level", Treatment.DROP), ("residual", Treatment.MEAN)} <= allowed[Restriction.REMOVAL_ONLY]


def test_a_budget_out_of_reach_names_the_restriction() -> None:
    profile = Profile.load(PROFILES / "digits-ddim.json")
    options = PlanOptions(budget=0.9, restriction=Restriction.CHOSEN_STEPS)  # at most three of four steps are held
    with pytest.raises(PlanError, match=r"and the restriction chosen_steps\. The most that such a plan saves"):
        make_plan(profile, options)
    assert Choices(profile, restriction=Restriction.REMOVAL_ONLY).periods == (1,)

"""For a given profile the plan is the same bytes, version after version."""

from __future__ import annotations

from pathlib import Path

import pytest

from unetc.artifacts import Profile
from unetc.compiler.planner.planner import PlanOptions, make_plan

PROFILES = Path(__file__).parent / "profiles"
"""Analyses of the built-in models at 20 steps, and the plans that were first made of them."""

OPTIONS = {
    "27": PlanOptions(budget=0.27),
    "50": PlanOptions(budget=0.5, max_engines=6),
    "exact": PlanOptions(budget=0.15, max_phases=1, max_engines=1, planner="exact"),
}


@pytest.mark.parametrize(
    ("profile", "wanted"),
    [
        *[(name, budget) for name in ("digits-ddim", "digits-dpm", "prompted-digits") for budget in ("27", "50")],
        ("digits-dpm", "exact"),  # on the others it takes long, and at its time limit two runs may differ
    ],
)
def test_a_profile_gives_the_bytes_that_it_always_gave(profile: str, wanted: str) -> None:
    made = make_plan(Profile.load(PROFILES / f"{profile}.json"), OPTIONS[wanted])
    assert made.to_json() == (PROFILES / f"{profile}.{wanted}.plan.json").read_bytes()

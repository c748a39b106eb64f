from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

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
from unetc.compiler.planner import PlanOptions
from unetc.errors import PlanError
from unetc.workflow.fit import TOLERANCE, fit_plan, fit_random, fit_uniform
from unetc.workflow.workbench import Candidate, Workbench


def point(value: float) -> Estimate:
    return Estimate(mean=value, low=value, high=value)


def profile(components: int = 12, bins: int = 4) -> Profile:
    """Components that save 4 % each, with seeded random damages."""
    generator = np.random.default_rng(3)
    parts = tuple(
        Component(name=f"c{i}", kind="residual", owner=f"c{i}", index=i, channels=1, axis=1, nested=(), offset=i)
        for i in range(components)
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
        costs=tuple(Cost(component=part.name, saved_ms=point(4.0)) for part in parts),
        effects=tuple(
            Effect(
                component=part.name,
                treatment=treatment,
                bin=b,
                damage=Damage(relative_l2=point(float(generator.uniform(0.01, 1))), psnr=point(20), ssim=point(0.9)),
            )
            for part in parts
            for treatment in (Treatment.DROP, Treatment.MEAN)
            for b in range(bins)
        ),
        means=(b"\0" * 4 * components,) * bins,
    )


@dataclass
class Machine:
    """A machine on which removing a component saves `truth` times what the profile says."""

    truth: float
    profile: Profile = field(default_factory=profile)
    compiled: list[Plan] = field(default_factory=list)

    def compile(self, plan: Plan) -> Candidate:
        self.compiled.append(plan)
        steps = dict.fromkeys(range(len(plan.engines)), 0)
        for bin in self.profile.bins:
            steps[plan.schedule([bin.low])[0]] += bin.steps
        removed = sum(steps[i] * len(engine.treatments) for i, engine in enumerate(plan.engines))
        saving = self.truth * 0.04 * removed / sum(steps.values())
        return Candidate(plan=plan, graphs=(), session=cast(Any, None), step_ms=(), time_ratio=1 - saving)


def bench(machine: Machine) -> Workbench:
    return cast(Workbench, machine)


@pytest.mark.parametrize("truth", [0.6, 0.9, 1.0, 1.3, 1.7])
def test_the_measured_saving_meets_the_budget_whatever_the_profile_got_wrong(truth: float) -> None:
    notes: list[str] = []
    candidate, correction = fit_plan(bench(Machine(truth)), PlanOptions(budget=0.2), notes)
    assert 0.2 <= candidate.saving <= 0.2 * (1 + TOLERANCE) + 0.04 * truth  # one component is the grain of this profile
    if abs(truth - 1) > 0.15:
        assert notes
        assert correction == pytest.approx(truth, rel=0.2)


def test_a_budget_that_no_plan_meets_is_refused_with_the_most_that_was_saved() -> None:
    with pytest.raises(PlanError, match=r"most that .*\d"):
        fit_plan(bench(Machine(0.2)), PlanOptions(budget=0.3), [])


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


def test_random_controls_have_the_time_of_the_plan_and_differ() -> None:
    machine = Machine(0.8)
    like, correction = fit_plan(bench(machine), PlanOptions(budget=0.2), [])
    randoms = [fit_random(bench(machine), 0.2, correction, like.plan, seed) for seed in range(3)]
    assert all(candidate.saving == pytest.approx(0.2, abs=0.03) for candidate in randoms)
    assert len({candidate.plan.to_json() for candidate in randoms}) == 3
    again = fit_random(bench(machine), 0.2, correction, like.plan, 1)
    assert again.plan.to_json() == randoms[1].plan.to_json()

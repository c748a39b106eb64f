"""Benchmarks compare like with like, and say which of their figures are old, missing or missed."""

from __future__ import annotations

from typing import Any

import bench_heart


def heart_row(**controls: tuple[float, float]) -> dict[str, Any]:
    """Make a row of bench_heart; the plan takes 0.7 and does 0.02, a control its time and its damage."""
    contenders = {name: {"time": time, "damage": damage} for name, (time, damage) in controls.items()}
    older = {"time": 0.7, "damage": 0.05}
    plan = {"time": 0.7, "damage": 0.02}
    return {"regime": "m", "budget": 0.3, "plan": plan, "older": older, "controls": contenders, "asked": 1.0}


def heart_figures(**controls: tuple[float, float]) -> dict[str, float]:
    return {own["figure"].split(": ")[1]: own["value"] for own in bench_heart.figures([heart_row(**controls)])}


def test_the_best_control_is_the_best_of_all_in_the_plans_time() -> None:
    found = heart_figures(random=(0.7, 1.0), other_solver=(0.72, 0.04), fewer_steps=(0.8, 0.01))
    assert found["damage / best control"] == 0.5, "a slower control does not count"
    assert heart_figures(uniform=(0.5, 0.03), random=(0.7, 1.0))["damage / best control"] == 0.02 / 0.03
    assert heart_figures(uniform=(0.5, 0.05), random=(0.7, 1.0))["damage / best control"] == 0.02


def test_a_control_in_another_time_is_named_and_not_compared() -> None:
    found = heart_figures(chosen_steps=(0.5, 0.1))
    assert "damage / chosen_steps" not in found
    assert "damage / best control" not in found
    assert found["no damage / chosen_steps, as the times differ; nearest time / the plan's"] == 0.5 / 0.7
    assert "goal" not in bench_heart.figures([heart_row(chosen_steps=(0.5, 0.1))])[1]

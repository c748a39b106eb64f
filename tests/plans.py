"""Handwritten plans, without a model or profile."""

from __future__ import annotations

from collections.abc import Sequence

from unetc.artifacts import Assignment, ModelReference, Phase, Plan, Prediction


def plan_of(engines: Sequence[Assignment], phases: Sequence[Phase]) -> Plan:
    """Write a plan from engines and phases."""
    return Plan(
        unetc="0",
        model=ModelReference(name="m", sha256="0" * 64, pipeline="p", denoiser="d"),
        profile_sha256="0" * 64,
        budget=0.0,
        max_engines=9,
        engines=tuple(engines),
        phases=tuple(phases),
        prediction=Prediction(time_ratio=1.0, relative_l2=0.0, memory=2.0),
    )

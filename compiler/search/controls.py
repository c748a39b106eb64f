"""Controls: plans made by simpler rules at the measured time of a plan, for comparison."""

from __future__ import annotations

from collections.abc import Callable

from unetc.errors import PlanError
from unetc.progress import OnProgress, Progress

from .fit import fit_deep_hold, fit_random, fit_uniform
from .workbench import Candidate, Workbench


def make_controls(
    workbench: Workbench,
    candidate: Candidate,
    correction: float,
    notes: list[str],
    seed: int,
    on_progress: OnProgress,
    *,
    random_plans: int,
) -> list[tuple[str, Candidate]]:
    """Make the controls of a plan; one that cannot be made is noted and left out."""
    target, engines = candidate.saving, candidate.plan.max_engines
    makers: list[tuple[str, Callable[[], Candidate]]] = [
        ("uniform", lambda: fit_uniform(workbench, target, correction)),
        ("deep-hold", lambda: fit_deep_hold(workbench, target, seed)),
    ]
    for i in range(random_plans):

        def draw(i: int = i) -> Candidate:
            return fit_random(workbench, target, correction, i, max_engines=engines)

        makers.append((f"random-{i + 1}", draw))
    controls = []
    for done, (name, make) in enumerate(makers):
        on_progress(Progress(stage="controls", done=done, total=len(makers)))
        try:
            controls.append((name, make()))
        except PlanError as error:
            notes.append(f"left out the control {name}: {error}")
    on_progress(Progress(stage="controls", done=len(makers), total=len(makers)))
    return controls

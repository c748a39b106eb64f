"""Ablations: one component gets one treatment throughout one bin of noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from unetc.artifacts.profile import Ablated, Component
from unetc.errors import ProfileError
from unetc.treatments import ROWS, Row, Treatment


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodicTreatment:
    """A treatment, and how often a refresh interrupts it."""

    treatment: Treatment
    period: int = 1
    """Steps whose index is a multiple of the period compute the component; 1 means that no step does."""

    def treats(self, step: int) -> bool:
        """Check whether a step gets the treatment."""
        return not self.treatment.reuses or step % self.period > 0

    @property
    def share(self) -> float:
        """Share of the steps that get the treatment."""
        return 1 - 1 / self.period if self.treatment.reuses else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """A component and its treatment."""

    component: str
    periodic: PeriodicTreatment


def entry_of(ablated: Ablated) -> tuple[Ablation, int]:
    """Return the ablation and the bin of a result."""
    kind = PeriodicTreatment(treatment=ablated.treatment, period=ablated.period)
    return Ablation(component=ablated.component, periodic=kind), ablated.bin


TRIED = tuple(
    PeriodicTreatment(treatment=treatment, period=period) for treatment, row in ROWS.items() for period in row.periods
)
"""Everything that an analysis tries on a component."""


def select(components: Sequence[Component], patterns: Sequence[str]) -> tuple[Component, ...]:
    """Select the components that match a shell-style pattern, the step and guidance; without patterns, all of them.

    Raises:
        ProfileError: If a pattern matches nothing.
    """
    names = [component.name for component in components]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ProfileError(f"no component matches {pattern!r}. Close names: {', '.join(close)}.")
    return tuple(
        component
        for component in components
        if not patterns
        or component.kind in ("step", "guidance")
        or any(fnmatchcase(component.name, own) for own in patterns)
    )


def treatments_for(component: Component, *, denoises: bool) -> tuple[PeriodicTreatment, ...]:
    """List the treatments to try on a component.

    Args:
        component: The component.
        denoises: Whether the denoised sample follows from a prediction, so that it can be reused in the step.
    """

    def fits(row: Row) -> bool:
        match component.kind:
            case "step":
                return row.of_step and (denoises or not row.of_x0)
            case "guidance":
                return row.of_guidance
            case _:
                return not row.of_x0

    return tuple(tried for tried in TRIED if fits(tried.treatment.row))


def ablations_of(components: Sequence[Component], *, denoises: bool) -> tuple[Ablation, ...]:
    """List all ablations, equal treatments together; see `treatments_for` for the arguments."""
    return tuple(
        Ablation(component=component.name, periodic=tried)
        for tried in TRIED
        for component in components
        if tried in treatments_for(component, denoises=denoises)
    )

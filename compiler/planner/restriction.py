"""Parts of the choices that a planner may be restricted to, for controls."""

from __future__ import annotations

from enum import StrEnum

from unetc.treatments import Treatment


class Restriction(StrEnum):
    """Kinds of components and treatments that a plan may use."""

    ALL = "all"
    """Every treatment of every component that the profile knows."""
    STEPS_ONLY = "steps_only"
    """Only whole steps are reused: every treatment of the component `step`."""
    CHOSEN_STEPS = "chosen_steps"
    """Only whole steps are reused, and each by holding the last prediction."""
    REMOVAL_ONLY = "removal_only"
    """Nothing is reused: components of the graph are dropped or replaced by their mean."""

    def allows(self, kind: str, treatment: Treatment) -> bool:
        """Check whether a plan may use a treatment.

        Args:
            kind: Kind of the component, see `Component.kind`.
            treatment: The treatment.
        """
        match self:
            case Restriction.STEPS_ONLY:
                return kind == "step"
            case Restriction.CHOSEN_STEPS:
                return kind == "step" and treatment is Treatment.HOLD
            case Restriction.REMOVAL_ONLY:
                return kind not in ("step", "guidance") and not treatment.reuses
            case _:
                return True

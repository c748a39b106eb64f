"""Verification: time and damage of a bundle on unused seeds, compared with simpler ways to save the same time."""

from __future__ import annotations

from .profile import ControlMeasured, Damage, ModelReference
from .record import Artifact, Record, require

WHICH_FIGURE = (
    "The distance to the full model is for users who want the same pictures as today; the distance to the converged "
    "trajectory is for users who only want the best sample in a given time."
)
"""For readers of both distances."""


class ControlResult(Record, frozen=True, kw_only=True):
    """A simpler way to save time, measured in the same run on the same noise."""

    time_ratio: float
    """Time of the control / time of the full model, dimensionless."""
    damage: Damage
    description: str


class Converged(Record, frozen=True, kw_only=True):
    """Distances to the converged trajectory: the same start, and enough steps that more would change little.

    See `WHICH_FIGURE` for when to look at them.
    """

    scheduler: str
    steps: int
    samples: int
    """Number of samples that were compared, the first ones of the verification."""
    full: Damage
    """Distance of the full model, with its own number of steps."""
    plan: Damage
    controls: dict[str, Damage]
    """Distance of every control by its name."""


class EngineUse(Record, frozen=True, kw_only=True):
    """One engine of the plan, and how the schedule used it."""

    step_ms: float
    """Median milliseconds per denoiser call."""
    steps: int
    """Number of steps it served."""
    removed: int
    """Number of components it does not compute."""


class Verification(Artifact, frozen=True, kw_only=True):
    """Measured time and damage of a bundle, with controls at equal measured time."""

    unetc: str
    model: ModelReference
    plan_sha256: str
    """Hash of the verified plan."""
    target: str
    threads: int
    environment: dict[str, str]
    budget: float
    control: ControlMeasured | None = None
    """Control images of the samples; None if all ControlNet inputs, if there are any, were zero."""
    scheduler: str
    steps: int
    samples: int
    seed: int
    rounds: int
    """Repetitions of each timing; runs of the full model, the plan and the controls alternate."""
    full_ms: float
    """Median milliseconds of one whole sampling run of the full model at the bundle's batch size."""
    time_ratio: float
    """Median over rounds of (time of the plan / time of the full model), both through the same runtime."""
    time_ratio_p10: float
    time_ratio_p90: float
    damage: Damage
    non_finite_steps: int = 0
    """Steps of the plan, with those of the untimed round, that the full model made again after NaN or infinity."""
    controls: dict[str, ControlResult]
    loses_to: tuple[str, ...] = ()
    """Controls that do less damage in no more time, see `beaten_by`."""
    converged: Converged | None = None
    """None for a scheduler that adds noise, and for a bundle without controls."""
    engines: tuple[EngineUse, ...]
    disk_bytes: int
    """Bytes of the weights and graphs of the full model and the plan's engines."""
    full_disk_bytes: int
    """Bytes of the weights and graph of the full model alone."""

    def __post_init__(self) -> None:
        """Check that the parts refer to each other."""
        names = self.controls.keys()
        require({*self.loses_to} <= names, "loses_to names an unknown control")
        compared = names if self.converged is None else self.converged.controls.keys()
        require(compared == names, "the converged trajectory must be compared with every control")
        require(self.full_disk_bytes > 0, "the files of the full model must not be empty")
        require(self.non_finite_steps >= 0, "non_finite_steps must not be negative", self.non_finite_steps)

    def beaten_by(self) -> tuple[str, ...]:
        """List the controls that do less damage in no more time.

        Timings vary, so a control counts as no slower up to the plan's 90th percentile.
        """
        return tuple(
            name
            for name, control in self.controls.items()
            if control.damage.relative_l2.mean < self.damage.relative_l2.mean
            and control.time_ratio <= self.time_ratio_p90
        )

    def made_again(self) -> str | None:
        """Say how many steps of the plan the full model made again; None if there were none."""
        if not self.non_finite_steps:
            return None
        steps = (self.rounds + 1) * self.steps
        return (
            f"Engines of the plan gave NaN or infinity in {self.non_finite_steps} of {steps} steps. The full model "
            "made these again, which costs more than they save."
        )

"""The room of treatments: one row for everything that can happen to a component in a step.

A treatment either removes a component, and a multiple of its mean replaces the branch, or it reuses branches of earlier
steps. An analysis runs the gated graph with a row's gates and recall; `specialise` turns the same row into a graph, so
every engine does exactly the measured thing. A new treatment is one more member of the enum and one more row.

The whole denoiser call has a second form of reuse: of the denoised sample x0 in place of the prediction. Both follow
from each other at a noise level, see `unetc.sampler.prediction_type`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

COMPUTED = "computed."
"""Prefix of an engine's outputs: the branch of the component with this index, as just computed."""
HELD = "held."
"""Prefix of an engine's inputs: the branch from the last step that computed it."""
EARLIER = "earlier."
"""Prefix of an engine's inputs: the branch from the computing step before the last one."""
EXTRAPOLATION = "extrapolation."
"""Prefix of an engine's inputs, [row]: the extrapolation factor, in distances between `EARLIER` and `HELD`.

It differs from row to row where rollouts at different steps share a call.
"""


class Treatment(StrEnum):
    """Everything that can happen to a component in a step."""

    KEEP = "keep"
    """The branch is computed."""
    DROP = "drop"
    """The branch contributes nothing."""
    MEAN = "mean"
    """The branch contributes its calibrated mean per channel."""
    HOLD = "hold"
    """The branch comes from the last step that computed it."""
    FORECAST = "forecast"
    """The branch continues the last two computed ones along a straight line over the timestep."""
    HOLD_X0 = "hold_x0"
    """The denoised sample comes from the last step that computed the prediction."""
    FORECAST_X0 = "forecast_x0"
    """The denoised sample continues the last two computed ones along a straight line over the timestep."""

    @property
    def row(self) -> Row:
        """The treatment's row of the table."""
        return ROWS[self]

    @property
    def reuses(self) -> bool:
        """Whether it needs branches of earlier steps."""
        return self.row.recall is not None


Operand = Any
"""An array, a tensor or a value in a graph: each knows `+`, `-` and `*`."""

Recall = Callable[[Callable[[str], Operand]], Operand]
"""Computes a branch from earlier ones, given a function that looks up an input by its prefix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Everything that unetc knows about one treatment."""

    letter: str
    """Mark in damage maps; no two treatments share one."""
    contributes: str
    """The branch's contribution, in words that complete "the branch contributes"."""
    mean: float | None = None
    """For a removal: factor of the calibrated mean that replaces the branch; None leaves the branch."""
    recall: Recall | None = None
    """For a reuse: computes the branch from earlier ones; None leaves the branch of this step."""
    periods: tuple[int, ...] = ()
    """Periods that an analysis tries. One step in a period computes the component; 1 means that no step does."""
    of_step: bool = False
    """Whether an analysis tries it on the whole denoiser call too."""
    of_x0: bool = False
    """Whether it reuses the denoised sample in place of the branch, for the whole denoiser call alone.

    The earlier predictions that an engine gets are then those that imply the earlier denoised samples at the current
    sample. So an engine of such a treatment is the engine of the same formula for branches.
    """
    of_guidance: bool = False
    """Whether the difference that guidance amplifies can get it."""

    @property
    def gates(self) -> tuple[float, float]:
        """Factors of the branch and of its mean: the component's row in the gate input."""
        return (1.0, 0.0) if self.mean is None else (0.0, self.mean)


def _last(take: Callable[[str], Operand]) -> Operand:
    return take(HELD)


def _forecast(take: Callable[[str], Operand]) -> Operand:
    held = take(HELD)
    return held + (held - take(EARLIER)) * take(EXTRAPOLATION)


ROWS: Mapping[Treatment, Row] = {
    Treatment.KEEP: Row(letter="k", contributes="its computed value"),
    Treatment.DROP: Row(letter="d", contributes="nothing", mean=0.0, periods=(1,), of_guidance=True),
    Treatment.MEAN: Row(letter="m", contributes="its calibrated mean per channel", mean=1.0, periods=(1,)),
    Treatment.HOLD: Row(
        letter="h",
        contributes="its value at the last step that computed it",
        recall=_last,
        periods=(2, 4),
        of_step=True,
        of_guidance=True,
    ),
    Treatment.FORECAST: Row(
        letter="f",
        contributes="the continuation of its last two computed values along a straight line",
        recall=_forecast,
        periods=(2, 4),
        of_step=True,
        of_guidance=True,
    ),
    Treatment.HOLD_X0: Row(
        letter="x",
        contributes="the prediction that implies the last denoised sample (only for step)",
        recall=_last,
        periods=(2, 4),
        of_step=True,
        of_x0=True,
    ),
    Treatment.FORECAST_X0: Row(
        letter="y",
        contributes="the prediction that implies the continuation of the last two denoised samples (only for step)",
        recall=_forecast,
        periods=(2, 4),
        of_step=True,
        of_x0=True,
    ),
}
"""The table, in the order in which an analysis tries the treatments."""

"""Quality gates: `psnr>=30`, `ssim>=0.9`, `relative-l2<=0.05`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from unetc.arguments import plain_fields
from unetc.artifacts.profile import Damage
from unetc.errors import PlanError
from unetc.metrics.distances import PSNR_CAP_DB

_HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "relative-l2": False}
_RANGES = {
    "psnr": (-math.inf, PSNR_CAP_DB, f"at most {PSNR_CAP_DB:g}"),
    "ssim": (-1.0, 1.0, "-1 to 1"),
    "relative-l2": (0.0, math.inf, "at least 0"),
}
"""Least and largest value of each metric, and both in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityGate:
    """A bound on the measured mean damage."""

    metric: str
    bound: float

    def __post_init__(self) -> None:
        """Check the bound: a gate that nothing can pass or fail would be found out only after a whole build.

        Raises:
            PlanError: If the metric is unknown, or its value can never be the bound.
        """
        plain_fields(self, PlanError)
        if self.metric not in _RANGES:
            raise PlanError(f"no quality gate has the metric {self.metric!r}. Expected psnr, ssim or relative-l2.")
        low, high, expected = _RANGES[self.metric]
        if not (math.isfinite(self.bound) and low <= self.bound <= high):
            raise PlanError(
                f"the quality gate's bound lies out of the range of {self.metric}. Expected {expected}, got "
                f"{self.bound:.15g}."
            )

    @classmethod
    def parse(cls, text: str) -> QualityGate:
        """Read a gate as typed.

        Raises:
            PlanError: If it is not `metric>=number` or `metric<=number` in the metric's own direction, or the number is
                out of the metric's range.
        """
        match = re.fullmatch(r"\s*([a-z0-9-]+)\s*(>=|<=)\s*([-+.0-9e]+)\s*", text)
        if match and match[1] in _HIGHER_IS_BETTER and (match[2] == ">=") == _HIGHER_IS_BETTER[match[1]]:
            try:
                bound = float(match[3])
            except ValueError:
                pass
            else:
                return cls(metric=match[1], bound=bound)  # its error is a ValueError too
        raise PlanError(f"cannot read the quality gate {text!r}. Expected psnr>=DB, ssim>=VALUE or relative-l2<=VALUE.")

    def value(self, damage: Damage) -> float:
        """Return the mean of the metric."""
        estimates = {"psnr": damage.psnr, "ssim": damage.ssim, "relative-l2": damage.relative_l2}
        return estimates[self.metric].mean

    def passes(self, damage: Damage) -> bool:
        """Check whether a damage is within the bound."""
        value = self.value(damage)
        return value >= self.bound if _HIGHER_IS_BETTER[self.metric] else value <= self.bound

    def distance(self, damage: Damage) -> float:
        """Return how far a damage is from the best value, in a unit of the metric: smaller is better."""
        value = self.value(damage)
        return -value if _HIGHER_IS_BETTER[self.metric] else value

    def __str__(self) -> str:
        """Write the gate as typed."""
        return f"{self.metric}{'>=' if _HIGHER_IS_BETTER[self.metric] else '<='}{self.bound:g}"

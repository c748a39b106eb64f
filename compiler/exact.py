"""The exact planner: an integer program over runs of bins, solved by HiGHS.

Columns per mode (a run of bins with a period): x[c] = component c is treated there, z = anything is, y = the mode is
used. Every bin lies in exactly one used mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from .choices import Choices, Mode


def solve_exactly(
    choices: Choices, *, saved_steps: float, max_engines: int, max_phases: int | None, time_limit_s: float
) -> tuple[dict[Mode, tuple[int, ...]] | None, float]:
    """Choose the components of every run of bins.

    Args:
        choices: What can be chosen.
        saved_steps: Time to save, in steps of the full model.
        max_engines: Most engines beside engine 0 and those that compute nothing.
        max_phases: Most runs; no limit when None.
        time_limit_s: The best choice so far is returned after this many seconds.

    Returns:
        The chosen components by run, or None if there is no such choice; and the most time that can be saved, in
        steps, which is only searched if there is none.
    """
    modes, components = choices.modes, len(choices.names)
    width = components + 2
    rows = _Rows(len(modes) * width)
    for b in range(len(choices.steps)):
        rows.add({m * width + width - 1: 1.0 for m, mode in enumerate(modes) if mode.first <= b < mode.last}, 1, 1)
    free = sorted(choices.whole)
    engines: dict[int, float] = {}
    for m in range(len(modes)):
        z, y = m * width + components, m * width + components + 1
        rows.add({z: 1.0, y: -1.0}, -np.inf, 0)
        for c in range(components):
            rows.add({m * width + c: 1.0, z: -1.0}, -np.inf, 0)
        for outer, inner in choices.nested:
            rows.add({m * width + outer: 1.0, m * width + inner: 1.0, z: -1.0}, -np.inf, 0)
        engines |= {z: 1.0, **{m * width + c: -1.0 for c in free}}
    rows.add(engines, 0, max_engines)
    if max_phases is not None:
        rows.add({m * width + width - 1: 1.0 for m in range(len(modes))}, 0, max_phases)
    saving, objective, allowed = np.zeros((3, len(modes), width))
    squared = np.array([choices.least(mode) for mode in modes])
    saving[:, :components] = [choices.saving(mode) for mode in modes]
    objective[:, :components] = np.where(np.isfinite(squared), squared, 0)
    allowed[:, :components] = np.isfinite(squared) & (saving[:, :components] > 0)
    allowed[:, components:] = 1
    bounds = Bounds(0, allowed.ravel())
    structure = rows.constraint()
    enough = LinearConstraint(saving.reshape(1, -1), saved_steps, np.inf)
    result = _minimise(objective.ravel(), [structure, enough], bounds, time_limit_s)
    if result.x is None:
        most = _minimise(-saving.ravel(), [structure], bounds, time_limit_s).x
        return None, 0.0 if most is None else float(saving.ravel() @ most)
    values = result.x.reshape(len(modes), width) > 0.5
    chosen = {
        mode: tuple(np.flatnonzero(values[m, :components]).tolist()) for m, mode in enumerate(modes) if values[m, -1]
    }
    return chosen, saved_steps


def _minimise(
    objective: NDArray[np.float64], constraints: list[LinearConstraint], bounds: Bounds, time_limit_s: float
) -> Any:
    """Solve a program in zeros and ones; `x` of the result is None if there is no solution.

    HiGHS stops at an absolute gap of 1e-6 as well as at the relative one. So the optimum of the relaxed program, which
    is close to the optimum sought, is made the unit.

    Source:
        Huangfu and Hall 2018, doi:10.1007/s12532-017-0130-5; scipy.optimize.milp.
    """
    scaled = objective / (np.abs(objective).max() or 1.0)
    relaxed = milp(scaled, constraints=constraints, bounds=bounds)
    unit = max(abs(relaxed.fun or 0.0), 1e-6)
    return milp(
        scaled / unit,
        constraints=constraints,
        integrality=np.ones(len(objective)),
        bounds=bounds,
        options={"time_limit": time_limit_s, "mip_rel_gap": 1e-4},
    )


class _Rows:
    """Collects sparse constraint rows."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._data: list[float] = []
        self._row: list[int] = []
        self._column: list[int] = []
        self._low: list[float] = []
        self._high: list[float] = []

    def add(self, entries: Mapping[int, float], low: float, high: float) -> None:
        """Require low <= sum of coefficient * variable <= high."""
        self._row += [len(self._low)] * len(entries)
        self._column += list(entries.keys())
        self._data += list(entries.values())
        self._low.append(low)
        self._high.append(high)

    def constraint(self) -> LinearConstraint:
        """Build what the solver takes."""
        shape = (len(self._low), self._columns)
        matrix = sparse.csr_array((self._data, (self._row, self._column)), shape=shape)
        return LinearConstraint(matrix, self._low, self._high)

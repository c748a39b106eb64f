"""The exact planner: an integer program over runs of bins, solved by HiGHS.

Columns per run of bins and period: x[c] = the run treats component c, z = it treats any, y = the plan uses the run.
Every bin lies in exactly one used run. For a guided model, there is one more column per run: the time that the other
components do not save because guidance, treated too, leaves fewer rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from .choices import BinRun, Choices, Limits
from .dynamic import best_set


def solve_exactly(choices: Choices, limits: Limits, *, time_limit_s: float) -> dict[BinRun, tuple[int, ...]] | None:
    """Choose the components of every run of bins.

    Args:
        choices: The choices.
        limits: The limits of the plan.
        time_limit_s: The best choice so far is returned after this many seconds.

    Returns:
        The chosen components by run, or None if there is no such choice.
    """
    program = _Program(choices, limits)
    values = _minimise(program, program.squared, [*program.structure, program.saves(limits)], time_limit_s).x
    return None if values is None else program.read(values)


def most_saved(choices: Choices, limits: Limits, *, time_limit_s: float) -> float:
    """Find the most time, in steps, that a plan can save within all other limits."""
    program = _Program(choices, limits)
    values = _minimise(program, -program.saving, program.structure, time_limit_s).x
    return 0.0 if values is None else float(program.saving @ values)


class _Program:
    """Columns and rows of the integer program."""

    def __init__(self, choices: Choices, limits: Limits) -> None:
        self._runs, self._components = choices.runs, len(choices.names)
        guidance = choices.guidance
        count, width = len(self._runs), self._components + 2 + (guidance is not None)
        rows = _Rows(count * width)
        for b in range(len(choices.steps)):
            used = {m * width + width - 1: 1.0 for m, run in enumerate(self._runs) if run.first <= b < run.last}
            rows.add(used, 1, 1)
        engines: dict[int, float] = {}
        memory: dict[int, float] = {}
        for m in range(count):
            z, y = m * width + self._components, m * width + width - 1
            rows.add({z: 1.0, y: -1.0}, -np.inf, 0)
            for c in range(self._components):
                rows.add({m * width + c: 1.0, z: -1.0}, -np.inf, 0)
            for outer, inner in choices.nested:
                rows.add({m * width + outer: 1.0, m * width + inner: 1.0, z: -1.0}, -np.inf, 0)
            engines |= {z: 1.0, **{m * width + c: -1.0 for c in choices.whole}}
            held = {m * width + c: -1.0 if c in choices.whole else -share for c, share in enumerate(choices.freed)}
            memory |= {z: 1.0, **held}
        rows.add(engines, 0, limits.max_engines)
        rows.add(memory, -np.inf, limits.max_memory - 1)
        if limits.max_phases is not None:
            rows.add({m * width + width - 1: 1.0 for m in range(count)}, 0, limits.max_phases)
        saving, squared, allowed = np.zeros((3, count, width))
        least = np.array([choices.least(run) for run in self._runs])
        saving[:, : self._components] = [choices.saving(run) for run in self._runs]
        squared[:, : self._components] = np.where(np.isfinite(least), least, 0)
        useful = (saving[:, : self._components] > 0) | (np.isfinite(limits.max_memory) & (choices.freed > 0))
        allowed[:, : self._components] = np.isfinite(least) & useful
        allowed[:, self._components :] = 1
        whole = np.ones((count, width))
        if guidance is not None:
            loss, share = self._components + 1, choices.saved[guidance]
            for m, run in enumerate(self._runs):
                others = choices.saving(run)
                others[[guidance, *choices.whole]] = 0
                most = share * float(others[list(best_set(choices.inner, -others))].sum())
                lost = {m * width + c: -share * saved for c, saved in enumerate(others) if saved > 0}
                # lost >= share * (saved by others), unless guidance is not treated
                rows.add({**lost, m * width + loss: 1.0, m * width + guidance: -most}, -most, np.inf)
                allowed[m, loss] = most
            saving[:, loss], whole[:, loss] = -1, 0
        self.structure = [rows.constraint()]
        self.integrality = whole.ravel()
        self.saving, self.squared, self.bounds = saving.ravel(), squared.ravel(), Bounds(0, allowed.ravel())

    def saves(self, limits: Limits) -> LinearConstraint:
        """Require the saving."""
        return LinearConstraint(self.saving.reshape(1, -1), limits.saved_steps, np.inf)

    def read(self, values: NDArray[np.float64]) -> dict[BinRun, tuple[int, ...]]:
        """Read the chosen components of each used run."""
        rows = values.reshape(len(self._runs), -1) > 0.5
        return {
            run: tuple(np.flatnonzero(row[: self._components]).tolist())
            for run, row in zip(self._runs, rows, strict=True)
            if row[-1]
        }


def _minimise(
    program: _Program, objective: NDArray[np.float64], constraints: list[LinearConstraint], time_limit_s: float
) -> Any:
    """Solve a program in zeros and ones; `x` of the result is None if there is no solution.

    HiGHS also stops at an absolute gap of 1e-6, besides the relative one. So the objective is scaled by the optimum of
    the relaxed program, which is close to the optimum sought.

    Source:
        Huangfu and Hall 2018, doi:10.1007/s12532-017-0130-5; scipy.optimize.milp.
    """
    scaled = objective / (np.abs(objective).max() or 1.0)
    relaxed = milp(scaled, constraints=constraints, bounds=program.bounds)
    unit = max(abs(relaxed.fun or 0.0), 1e-6)
    return milp(
        scaled / unit,
        constraints=constraints,
        integrality=program.integrality,
        bounds=program.bounds,
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
        """Build the constraint for the solver."""
        shape = (len(self._low), self._columns)
        matrix = sparse.csr_array((self._data, (self._row, self._column)), shape=shape)
        return LinearConstraint(matrix, self._low, self._high)

"""The scheduler, compiled: rows of coefficients instead of code.

`table` and `noise` are what a session needs, numpy only. `extract` reads the rows from a diffusers scheduler; it is for
compile time and is imported by its own name, because it brings torch and diffusers.
"""

from __future__ import annotations

from unetc.solver.noise import initial_noise, step_noise
from unetc.solver.table import SolverCount, SolverHeader, SolverTable, SolverTables, update

__all__ = ["SolverCount", "SolverHeader", "SolverTable", "SolverTables", "initial_noise", "step_noise", "update"]

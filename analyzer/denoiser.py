"""Run the gated graph along trajectories."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from unetc.artifacts.profile import Treatment
from unetc.backend import Array, Backend, Program
from unetc.errors import ProfileError
from unetc.graph.gate import gate_values
from unetc.graph.gated import GatedGraph
from unetc.solver.table import SolverTable
from unetc.solver.trajectory import Trajectory


class GatedDenoiser:
    """A gated graph on a backend."""

    def __init__(self, gated: GatedGraph, backend: Backend) -> None:
        """Load the graph and its observing twin."""
        self._gated = gated
        self._weights = load_file(gated.weights)
        runnable = gated.runnable()
        self._program = backend.load(runnable.graph, runnable.select(self._weights))
        self._observer: Program | None = None
        self._backend = backend

    def gates(self, treatments: Mapping[str, Treatment], batch: int) -> Array:
        """Make the gates of one assignment for a batch, [batch, component, 2]."""
        return np.repeat(gate_values(self._gated.components, treatments)[None], batch, axis=0)

    def advance(
        self,
        trajectory: Trajectory,
        table: SolverTable,
        step: int,
        *,
        gates: Array,
        means: Array,
        seed: int,
        indices: NDArray[np.int64],
    ) -> Trajectory:
        """Make one step of a trajectory.

        Args:
            trajectory: Where the samples are, batch of n.
            table: The solver.
            step: Step index.
            gates: [batch, component, 2].
            means: [channel of all components].
            seed: Seed of a stochastic solver's noise.
            indices: [batch], index of every sample within the seed.

        Raises:
            ProfileError: If the denoiser produces NaN or infinity.
        """
        timestep = float(table.timesteps[step])

        def predict(sample: Array) -> Array:
            prediction = np.empty_like(sample)
            self._program(_inputs(sample, timestep, gates, means), prediction)
            return prediction

        advanced = trajectory.advance(table, step, predict, seed=seed, indices=indices.tolist())
        if not np.isfinite(advanced.predictions[0]).all():
            raise ProfileError(
                f"the denoiser produced NaN or infinity at timestep {timestep:g}. Check that the weights are finite."
            )
        return advanced

    def branch_means(self, sample: Array, timestep: float) -> Array:
        """Measure the mean of every branch per channel at a timestep, [channel of all components]."""
        if self._observer is None:
            observing = self._gated.observing()
            self._observer = self._backend.load(observing.graph, observing.select(self._weights))
        output = np.empty(self._gated.channels, dtype=np.float32)
        unused = np.zeros(self._gated.channels, dtype=np.float32)
        self._observer(_inputs(sample, timestep, self.gates({}, len(sample)), unused), output)
        return output


def _inputs(sample: Array, timestep: float, gates: Array, means: Array) -> dict[str, Array]:
    timesteps = np.full(len(sample), timestep, dtype=np.float32)
    return {"sample": sample, "timestep": timesteps, "gates": gates, "means": means}

"""Calls of a session's engines one by one, with a replacement for those that give NaN or infinity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from unetc.backend import Array
from unetc.errors import NonFiniteError
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.session import Session
from unetc.runtime.trajectory import Trajectory


class ByHand:
    """One trajectory without guidance."""

    def __init__(self, session: Session, *, full_model: bool = False) -> None:
        """Begin before the first step."""
        self._full = session.full
        self._programs = (session.full,) if full_model else session.programs
        self._branches = BranchCache(None if full_model else session.plan, session.device)
        self.repeated = 0
        """Steps that the full model made in place of an engine."""

    def predict(self, inputs: Mapping[str, Array], timestep: float, log_snr: float) -> Array:
        """Call the engine of the next step, and the full model if its prediction is not finite.

        Raises:
            NonFiniteError: If the full model's prediction is not finite.
        """
        sample = inputs["sample"]
        given = {**inputs, "timestep": np.full(len(sample), timestep, np.float32)}
        program = self._programs[self._branches.next_engine(log_snr)]
        prediction = np.empty_like(sample)
        emitted = program({**given, **self._branches.inputs(timestep, len(sample))}, prediction)
        if np.isfinite(prediction).all():
            self._branches.store(emitted, timestep)
            return prediction
        if program is self._full:
            raise NonFiniteError(f"the full model, at timestep {timestep:g}")
        self.repeated += 1
        self._branches.restore(self._branches.snapshot().emptied())
        self._full(given, prediction)
        return prediction


def sample_by_hand(
    session: Session, batch: int, *, seed: int, steps: int, full_model: bool = False
) -> tuple[Array, int]:
    """Sample as a session without conditions does, and count the steps that the full model repeats.

    Raises:
        NonFiniteError: If the full model's prediction is not finite.
    """
    start = session.start(batch, seed=seed, steps=steps)
    table, hand = start.table, ByHand(session, full_model=full_model)
    trajectory = Trajectory.start(table, start.noise, session.device)
    for step in range(table.steps):
        seen = np.asarray(trajectory.seen(table, step))
        prediction = hand.predict({"sample": seen}, table.timesteps.item(step), table.log_snr.item(step))
        trajectory = trajectory.advance(table, step, prediction, seed=seed, indices=start.indices)
    return np.asarray(trajectory.sample), hand.repeated

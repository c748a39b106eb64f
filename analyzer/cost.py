"""Cost: milliseconds that removing a component saves on the target."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.profile import Component, Cost, Estimate, Treatment
from unetc.backend import Backend, Program
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.graph.gated import GatedGraph
from unetc.graph.specialise import specialise
from unetc.progress import OnProgress, Progress
from unetc.timing import interleaved_ms

from .damage import estimate


def measure_costs(
    gated: GatedGraph,
    components: Sequence[Component],
    backend: Backend,
    *,
    conditions: Conditions = UNCONDITIONAL,
    batch: int,
    sample_shape: tuple[int, int, int],
    rounds: int,
    on_progress: OnProgress,
) -> tuple[Estimate, tuple[Cost, ...]]:
    """Time the full graph against the graph specialised without each component.

    Each component's graph takes turns with the full one, so that slow moments of the machine fall on both. What a pair
    tells is the *share* that is saved: a machine that is three times slower for a minute stretches both of its times.

    Args:
        gated: The graph.
        components: Those to time.
        backend: The target.
        conditions: What samples are conditioned on.
        batch: Number of samples per call.
        sample_shape: [channel, height, width].
        rounds: Timed repetitions of each pair.
        on_progress: Told after each component.

    Returns:
        Milliseconds per call of the full graph, and what each component's removal saves of it: the median over rounds
        of the share that is saved, of the median time of the full graph. The intervals are over rounds.
    """
    no_means = np.zeros(gated.channels, dtype=np.float32)
    loader = backend.open_weights(gated.weights.read_bytes())

    def load(treatments: dict[str, Treatment]) -> Program:
        return loader.load(specialise(gated, treatments, no_means))

    sample = np.random.default_rng(0).standard_normal((batch, *sample_shape)).astype(np.float32)
    inputs = conditions.take(range(batch)).widen(sample, 500.0)
    output = np.empty((len(inputs["sample"]), gated.predicted_channels, *sample_shape[1:]), dtype=np.float32)
    full = partial(load({}), inputs, output)
    full_times: list[float] = []
    shares: dict[str, NDArray[np.float64]] = {}
    for component in components:
        without = partial(load({component.name: Treatment.DROP}), inputs, output)
        times = interleaved_ms([full, without], rounds=rounds)
        full_times.extend(times[:, 0])
        shares[component.name] = 1 - times[:, 1] / times[:, 0]
        on_progress(Progress(stage="timing", done=len(shares), total=len(components)))
    full_ms = _around_median(np.array(full_times))
    costs = tuple(Cost(component=name, saved_ms=_around_median(full_ms.mean * share)) for name, share in shares.items())
    return full_ms, costs


def _around_median(values: NDArray[np.float64]) -> Estimate:
    """Centre the 95 % interval of the mean on the median, which a single slow moment does not move."""
    interval = estimate(values)
    median, half = float(np.median(values)), interval.high - interval.mean
    return Estimate(mean=median, low=median - half, high=median + half)

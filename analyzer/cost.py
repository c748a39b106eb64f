"""Cost: milliseconds that removing a component saves on the target, and bytes of weights that it frees."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.profile import Component, Cost, Estimate
from unetc.artifacts.record import Record
from unetc.backend import Backend, SerialisedGraph
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.graph.weights import tensor_ranges
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.metrics.damage import estimate
from unetc.progress import OnProgress, Progress
from unetc.runtime.rows import own_half
from unetc.timing import interleaved_ms
from unetc.treatments import Treatment


class Costs(Record, frozen=True, kw_only=True):
    """Time and weights of the full graph, and the savings of each component's removal; see `Profile`."""

    full_ms: Estimate
    full_bytes: int
    costs: tuple[Cost, ...]


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
) -> Costs:
    """Time the full graph against the graph specialised without each component.

    Calls of each component's graph alternate with calls of the full one, so that slow moments of the machine affect
    both. A pair yields the saved *share*: a machine that is three times slower for a minute stretches both times.

    Args:
        gated: The graph.
        components: Components to time.
        backend: The target.
        conditions: Conditions of the samples.
        batch: Number of samples per call.
        sample_shape: [channel, height, width].
        rounds: Timed repetitions of each pair.
        on_progress: Told after each component.

    Returns:
        Milliseconds per call of the full graph and the saving of each component's removal: median time of the full
        graph × median saved share. The intervals are over rounds. Bytes are exact; weights shared by several
        components are not counted as freed.
    """
    no_means = np.zeros(gated.channels, dtype=np.float32)
    loader = backend.open_weights(gated.weights.read_bytes())
    ranges = tensor_ranges(gated.weights)

    def size(engine: SerialisedGraph) -> int:
        return sum(end - begin for begin, end in (ranges[name] for name in engine.weights))

    sample = np.random.default_rng(0).standard_normal((batch, *sample_shape)).astype(np.float32)
    device = backend.device
    inputs = conditions.take(range(batch)).on(device).widen(device.put(sample), 500.0)
    output = device.empty((len(inputs["sample"]), gated.predicted_channels, *sample_shape[1:]))
    full_engine = specialise(gated, {}, no_means)
    full = partial(loader.load(full_engine), inputs, output)
    full_times: list[float] = []
    shares: dict[str, NDArray[np.float64]] = {}
    freed: dict[str, int] = {}
    for component in components:
        if component.kind == "guidance":  # the same graph, called with half of the rows
            freed[component.name] = 0
            calls = [full, partial(full.func, *own_half(inputs, output, device))]
        else:
            engine = specialise(gated, {component.name: Treatment.DROP}, no_means)
            freed[component.name] = size(full_engine) - size(engine)
            calls = [full, partial(loader.load(engine), inputs, output)]
        times = interleaved_ms(calls, rounds=rounds, wait=device.synchronize)
        full_times.extend(times[:, 0])
        shares[component.name] = 1 - times[:, 1] / times[:, 0]
        on_progress(Progress(stage="timing", done=len(shares), total=len(components)))
    full_ms = _around_median(np.array(full_times))
    costs = tuple(
        Cost(component=name, saved_ms=_around_median(full_ms.mean * share), freed_bytes=freed[name])
        for name, share in shares.items()
    )
    return Costs(full_ms=full_ms, full_bytes=size(full_engine), costs=costs)


def _around_median(values: NDArray[np.float64]) -> Estimate:
    """Centre the 95 % interval of the mean on the median, which a single slow moment does not move."""
    interval = estimate(values)
    median, half = float(np.median(values)), interval.high - interval.mean
    return Estimate(mean=median, low=median - half, high=median + half)

"""Cost: milliseconds that removing a component saves on the target, and bytes of weights that it frees."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.profile import Component, Cost, Estimate
from unetc.artifacts.record import Record
from unetc.backend import Backend
from unetc.compiler.graph.forms import Removal, removals_of
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.specialise import specialise
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.jobs import Advance
from unetc.metrics.interval import estimate
from unetc.progress import OnProgress, Progress
from unetc.runtime.rows import own_half
from unetc.tensors import load_tensors
from unetc.timing import MORE, WARMUP, interleaved_ms
from unetc.treatments import Treatment

from .bench import Bench

_SECONDS = 4.0
"""Seconds of timed calls of a pair after which a part of the rounds is enough."""


class Costs(Record, frozen=True, kw_only=True):
    """Time and weights of the full graph, and the savings of each component's removal; see `Profile`."""

    full_ms: Estimate
    full_bytes: int
    costs: tuple[Cost, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureCosts:
    """The job of the timing; see `measure_costs`."""

    components: Sequence[Component]
    batch: int
    sample_shape: tuple[int, int, int]
    rounds: int
    name: str = "the timing"

    def run(self, bench: Bench, advance: Advance) -> Costs:
        """Time the components."""
        return measure_costs(
            bench.gated,
            self.components,
            bench.backend,
            conditions=bench.conditions,
            batch=self.batch,
            sample_shape=self.sample_shape,
            rounds=self.rounds,
            on_progress=lambda progress: advance(progress.done),
        )


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

    Components of one form save the same, so one of each form is timed for all. Calls of its graph alternate with calls
    of the full one, so that slow moments of the machine affect both. A pair yields the saved *share*: a machine that is
    three times slower for a minute stretches both times.

    Args:
        gated: The graph.
        components: Components to time.
        backend: The target.
        conditions: Conditions of the samples.
        batch: Number of samples per call.
        sample_shape: [channel, height, width].
        rounds: Most timed rounds of each form; slow calls vary less and get fewer.
        on_progress: Told how many components are done.

    Returns:
        Milliseconds per call of the full graph and the saving of each component's removal: median time of the full
        graph × median saved share. The intervals are over rounds. Bytes are exact; weights shared by several
        components are not counted as freed.
    """
    no_means = np.zeros(gated.channels, dtype=np.float32)
    weights = gated.read_weights()
    loader = backend.open_weights(weights)
    sizes = {name: array.nbytes for name, array in load_tensors(weights).items()}
    sample = np.random.default_rng(0).standard_normal((batch, *sample_shape)).astype(np.float32)
    device = backend.device
    inputs = conditions.take(range(batch)).on(device).widen(device.put(sample), 500.0)
    output = device.empty((len(inputs["sample"]), gated.predicted_channels, *sample_shape[1:]))
    full_engine = specialise(gated, {}, no_means)
    full_bytes = sum(sizes[name] for name in full_engine.weights)
    full = partial(loader.load(full_engine), inputs, output)

    def without(component: Component) -> Callable[[], object]:
        if component.kind == "guidance":  # the same graph, called with half of the rows
            return partial(full.func, *own_half(inputs, output, device))
        return partial(loader.load(specialise(gated, {component.name: Treatment.DROP}, no_means)), inputs, output)

    removals = removals_of(gated, sample_shape)
    least, seconds = _effort(rounds)
    full_times: list[float] = []
    shares: dict[str, NDArray[np.float64]] = {}
    for alike in forms_of(components, removals):
        calls: list[Callable[[], object]] = [full, without(alike[0])]
        times = interleaved_ms(calls, rounds=least, wait=device.synchronize, seconds=seconds)
        full_times.extend(times[:, 0])
        shares |= dict.fromkeys((one.name for one in alike), 1 - times[:, 1] / times[:, 0])
        on_progress(Progress(stage="timing", done=len(shares), total=len(components)))
    full_ms = _around_median(np.array(full_times))
    costs = tuple(
        Cost(
            component=one.name,
            saved_ms=_around_median(full_ms.mean * shares[one.name]),
            freed_bytes=sum(sizes.get(name, 0) for name in removals[one.name].weights) if one.name in removals else 0,
        )
        for one in components
    )
    return Costs(full_ms=full_ms, full_bytes=full_bytes, costs=costs)


def forms_of(components: Sequence[Component], removals: Mapping[str, Removal]) -> tuple[list[Component], ...]:
    """Group components whose removal saves the same work."""
    forms: dict[Hashable, list[Component]] = {}
    for component in components:
        form = component.kind if component.kind == "guidance" else removals[component.name].form
        forms.setdefault(form, []).append(component)
    return tuple(forms.values())


def predict_timing(forms: int, *, call_s: float, load_s: float, rounds: int) -> float:
    """Predict the seconds that `measure_costs` takes.

    Args:
        forms: Number of forms.
        call_s: Seconds of a call of the full graph.
        load_s: Seconds that loading a graph takes.
        rounds: Most timed rounds of each form.
    """
    least, seconds = _effort(rounds)
    pair = 2 * call_s
    timed = least if pair * least > seconds else min(rounds, seconds / pair)
    return load_s + forms * (load_s + (WARMUP + timed) * pair)


def _effort(rounds: int) -> tuple[int, float]:
    """Return the least rounds, and the seconds for which they go on, up to all of them."""
    return (rounds // MORE, _SECONDS) if rounds >= MORE else (rounds, 0.0)


def _around_median(values: NDArray[np.float64]) -> Estimate:
    """Centre the 95 % interval of the mean on the median, which a single slow moment does not move."""
    interval = estimate(values)
    median, half = float(np.median(values)), interval.high - interval.mean
    return Estimate(mean=median, low=median - half, high=median + half)

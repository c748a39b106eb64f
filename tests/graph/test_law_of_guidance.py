"""The law for guidance: an engine called with the samples' own rows alone equals a call with both halves.

In the reference both halves are computed, and then the difference between them is replaced: by nothing, or by what
earlier differences say. Everything around the graph is computed in float64 there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.graph.test_law_of_reuse import Assignment, Reference, load
from tests.models import Tiny, relative_error, tiny_of
from tests.plans import plan_of
from unetc.artifacts import Phase
from unetc.artifacts.profile import GUIDANCE, STEP, with_guidance, without_guidance
from unetc.backend import Array
from unetc.call import TIMESTEP
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.planner.emissions import with_emissions
from unetc.device import Device
from unetc.runtime.rollout import NonFiniteSteps, Rollout
from unetc.sampler.prediction_type import PredictionType
from unetc.treatments import Treatment

KEEP, DROP, MEAN = Treatment.KEEP, Treatment.DROP, Treatment.MEAN
HOLD, FORECAST = Treatment.HOLD, Treatment.FORECAST
ENGINES_AGREE = 4e-5
"""As in test_law_of_reuse; a recalled difference is a difference of two rounded predictions."""


@pytest.fixture(scope="module")
def tiny(shared: Path) -> Tiny:
    return tiny_of("cross-attention", shared)


class Paired:
    """The gated graph on both halves, with an external memory for branches and for the difference."""

    def __init__(self, tiny: Tiny, means: Array) -> None:
        self._graph = Reference(tiny, means)
        self._step = next(component.index for component in tiny.gated.components if component.kind == "step")
        self._history: list[tuple[float, np.ndarray]] = []

    def step(self, assignment: Assignment, inputs: Mapping[str, Array], timestep: float) -> Array:
        memory = dict(self._graph._memory)
        graph = {name: own for name, own in assignment.items() if name != GUIDANCE}
        both = self._graph.step(graph, inputs, timestep, PredictionType.EPSILON)
        treatment, half = assignment.get(GUIDANCE, KEEP), len(both) // 2
        if STEP in assignment:  # nothing is computed
            return both
        if treatment is KEEP:
            self._history = [(timestep, both[half:].astype(float) - both[:half]), *self._history[:1]]
            return both
        own = both[half:].astype(float)
        whole: Array = np.concatenate([own - self._recall(treatment, timestep), own]).astype(np.float32)
        self._graph._memory = {**memory, self._step: [(timestep, whole), *memory[self._step][:1]]}
        return whole

    def _recall(self, treatment: Treatment, timestep: float) -> np.ndarray | float:
        if treatment is DROP:
            return 0.0
        (t1, latest), (t0, earlier) = self._history[0], self._history[-1]
        if treatment is HOLD or t1 == t0:
            return latest
        assert treatment is FORECAST
        return latest + (timestep - t1) / (t1 - t0) * (latest - earlier)


def inputs_at(tiny: Tiny, step: int, samples: int) -> tuple[dict[str, Array], float]:
    """Draw a call whose rows are pairs of the same samples under other conditions."""
    timestep = 900.0 - 70.0 * step - 3.0 * step * step
    inputs = tiny.inputs(batch=2 * samples, height=8, width=8, seed=step)
    inputs["sample"][samples:] = inputs["sample"][:samples]
    return inputs | {TIMESTEP: np.full(2 * samples, timestep, np.float32)}, timestep


def check_sequence(tiny: Tiny, assignments: Sequence[Assignment], order: Sequence[int], samples: int) -> list[int]:
    """Run the engines in an order and compare each step with the reference; return the rows of the engine calls."""
    rng = np.random.default_rng(0)
    means = 0.5 * rng.standard_normal(tiny.gated.channels, dtype=np.float32)
    engines = with_emissions(assignments, with_guidance(tiny.gated.components))
    plan = plan_of(engines, [Phase(low=-1.0, high=1.0, cycle=tuple(order))])
    rows: list[int] = []

    def counting(graph: object) -> object:
        def run(inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
            rows.append(len(output))
            return program(inputs, output)

        program = load(tiny, graph)  # type: ignore[arg-type]
        return run

    graphs = [
        specialise(tiny.gated, engine.in_graph, means, [name for name in engine.emits if name != GUIDANCE])
        for engine in engines
    ]
    programs = [counting(graph) for graph in graphs]
    device: Device = tiny._backend.device
    rollout = Rollout(
        programs,  # type: ignore[arg-type]
        programs[0],  # type: ignore[arg-type]
        predicted_channels=tiny.gated.predicted_channels,
        plan=plan,
        device=device,
        non_finite_steps=NonFiniteSteps(),
    )
    reference = Paired(tiny, means)
    for step, engine in enumerate(order):
        inputs, timestep = inputs_at(tiny, step, samples)
        expected = reference.step(assignments[engine], inputs, timestep)
        output = device.empty(expected.shape)
        call = rollout.run(inputs, output, timestep, 0.0, paired=True)
        assert call.engine == engine
        assert relative_error(output, expected) < ENGINES_AGREE, f"step {step}: {assignments[engine]}"
    return rows


@settings(max_examples=8)
@given(data=st.data())
def test_half_calls_compute_what_both_halves_compute(tiny: Tiny, data: st.DataObject) -> None:
    assignments: list[dict[str, Treatment]] = [{}]  # the first step computes everything
    densities = ((KEEP,), (*[KEEP] * 12, HOLD, FORECAST), (*[KEEP] * 4, DROP, MEAN, HOLD, FORECAST))
    names = [name for name in tiny.names if name != STEP]
    for _ in range(data.draw(st.integers(1, 4))):
        treatment = st.sampled_from(data.draw(st.sampled_from(densities)))
        drawn = zip(names, data.draw(st.lists(treatment, min_size=len(names), max_size=len(names))), strict=True)
        own = dict(drawn)
        own[GUIDANCE] = data.draw(st.sampled_from([KEEP, DROP, HOLD, FORECAST]))
        own[STEP] = data.draw(st.sampled_from([*[KEEP] * 3, HOLD, FORECAST]))
        assignments.append({name: treatment for name, treatment in own.items() if treatment is not KEEP})
    order = [0, *data.draw(st.lists(st.integers(0, len(assignments) - 1), min_size=2, max_size=6))]
    samples = data.draw(st.integers(1, 3))
    rows = check_sequence(tiny, assignments, order, samples)
    halved = [GUIDANCE in assignments[engine] and STEP not in assignments[engine] for engine in order]
    assert rows == [samples if half else 2 * samples for half in halved]


def test_the_step_is_reused_after_a_half_call(tiny: Tiny) -> None:
    """The step that a later engine holds is the whole prediction, with the recalled half."""
    assignments = [{}, {GUIDANCE: FORECAST}, {STEP: FORECAST}, {STEP: HOLD, GUIDANCE: DROP}]
    assert check_sequence(tiny, assignments, [0, 0, 1, 2, 1, 3, 2, 0, 1], 2)[2] == 2


def test_an_engine_of_half_of_the_rows_emits_the_step_alone(tiny: Tiny) -> None:
    components = with_guidance(tiny.gated.components)
    held = tiny.names[0]
    zero, half, step = with_emissions([{}, {GUIDANCE: HOLD}, {STEP: HOLD, held: HOLD}], components)
    assert set(zero.emits) == {held, STEP, GUIDANCE}
    assert (half.emits, half.halves, half.in_graph) == ((STEP,), True, {})
    assert (step.emits, step.halves) == ((), False)
    with pytest.raises(ValueError, match="emit step alone"):
        type(half)(treatments={GUIDANCE: HOLD}, emits=(held,))


def test_guidance_is_no_component_of_the_graph(tiny: Tiny) -> None:
    components = with_guidance(tiny.gated.components)
    assert components[-1].name == GUIDANCE
    assert GUIDANCE in next(component.nested for component in components if component.name == STEP)
    assert without_guidance(components) == tiny.gated.components == without_guidance(tiny.gated.components)

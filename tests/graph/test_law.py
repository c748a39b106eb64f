"""The equivalence law: an engine that ships computes exactly the graph that was measured.

For every assignment, on every architecture: denoiser == gated graph with all gates open; gated graph in torch == gated
graph in ONNX; gated graph at the gates of an assignment == engine specialised for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from tests.every_day import examples
from tests.models import ARCHITECTURES, Tiny, daily, relative_error, tiny_of
from unetc.artifacts.profile import STEP
from unetc.backend import DOMAIN, GROUP_NORM, Array, SerialisedGraph
from unetc.compiler.graph.gate import GATES, MEANS, OUTPUT, gate_values
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.specialise import specialise
from unetc.treatments import Treatment

KEEP, DROP, MEAN = Treatment.KEEP, Treatment.DROP, Treatment.MEAN

Assignment = Mapping[str, Treatment]

LIBRARIES_AGREE = 1e-4
"""Tolerance between torch and onnxruntime: their kernels sum in different orders, over about forty layers."""

ENGINES_AGREE = 1e-5
"""Tolerance within onnxruntime: without gates it fuses more and changes memory layouts, with the same kernels."""

DENSITIES = ((*[KEEP] * 18, DROP, MEAN), (*[KEEP] * 6, DROP, MEAN), (KEEP, DROP, MEAN), (DROP, MEAN), (DROP,), (MEAN,))
"""Treatments to draw from for all components but the step: from a few removals to removing every component."""

STEP_DENSITY = (*[KEEP] * 10, DROP, MEAN)
"""Treatments to draw from for the step; nothing else matters without it, so it is mostly kept."""


UNCONDITIONAL = pytest.mark.architecture("UNet2DModel")


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=[*own.marks, *([UNCONDITIONAL] if kind == "UNet2DModel" else [])])
        for own, (name, (kind, _)) in zip(daily(ARCHITECTURES), ARCHITECTURES.items(), strict=True)
    ],
)
def tiny(request: pytest.FixtureRequest, shared: Path) -> Tiny:
    return tiny_of(request.param, shared)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call, in which every sample of the batch has its own assignment."""

    tiny: Tiny
    assignments: Sequence[Assignment]
    height: int
    width: int
    tokens: int = 5
    mean_scale: float = 0.5
    seed: int = 0

    def inputs(self) -> dict[str, Array]:
        """Draw the denoiser's own inputs."""
        return self.tiny.inputs(
            batch=len(self.assignments), height=self.height, width=self.width, tokens=self.tokens, seed=self.seed
        )

    def means(self) -> Array:
        """Draw the means."""
        rng = np.random.default_rng(self.seed)
        return self.mean_scale * rng.standard_normal(self.tiny.gated.channels, dtype=np.float32)

    def gated_inputs(self, assignments: Sequence[Assignment] | None = None) -> dict[str, Array]:
        """Draw all inputs of the gated graph; other assignments may replace the case's."""
        components = self.tiny.gated.components
        gates = np.stack([gate_values(components, assignment) for assignment in assignments or self.assignments])
        return {**self.inputs(), GATES: gates, MEANS: self.means()}


@st.composite
def cases(draw: st.DrawFn, tiny: Tiny, sides: st.SearchStrategy[int] | None = None) -> Case:
    """Draw a case with a batch of one to three assignments."""
    sizes = st.integers(1, 24 // tiny.stride).map(lambda size: size * tiny.stride) if sides is None else sides

    def assignment() -> Assignment:
        treatment = st.sampled_from(draw(st.sampled_from(DENSITIES)))
        others = len(tiny.names) - 1
        drawn = [*draw(st.lists(treatment, min_size=others, max_size=others)), draw(st.sampled_from(STEP_DENSITY))]
        return {name: treatment for name, treatment in zip(tiny.names, drawn, strict=True) if treatment is not KEEP}

    return Case(
        tiny=tiny,
        assignments=[assignment() for _ in range(draw(st.integers(1, 3)))],
        height=draw(sizes),
        width=draw(sizes),
        tokens=draw(st.integers(2, 7)),
        mean_scale=draw(st.sampled_from((0.5, 0.5, 0.5, 0))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def without_step(tiny: Tiny) -> tuple[str, ...]:
    """Name all components but the step, which comes last."""
    *names, step = tiny.names
    assert step == STEP
    return tuple(names)


def live_weights(tiny: Tiny, removed: Collection[str]) -> tuple[set[str], bool]:
    """Trace the torch graph back from its output through every branch that is not removed.

    Returns:
        Names in the weights file of the weights found, and whether a concatenation found has lost both its parts.
    """
    cut = {component.index for component in tiny.capture.components if component.name in removed}
    signature = tiny.capture.program.graph_signature
    names = signature.inputs_to_parameters | signature.inputs_to_buffers

    def is_cut(node: fx.Node) -> bool:
        return node.target is torch.ops.unetc.gate.default and node.args[3] in cut

    pending = [node for node in tiny.capture.program.graph.nodes if node.op == "output"]
    live: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend(() if is_cut(node) else node.all_input_nodes)
    found = {names[node.name].removeprefix("model.") for node in live if node.name in names}
    concatenations = [node for node in live if node.target is torch.ops.aten.cat.default]
    return (
        {name for name, parameter in tiny.parameters.items() if parameter in found},
        any(all(map(is_cut, node.all_input_nodes)) for node in concatenations),
    )


def check_self_contained(tiny: Tiny, engine: SerialisedGraph) -> None:
    """Check that an engine needs no gate and no file but the weights, and has no trace of this machine."""
    model = onnx.load_model_from_string(engine.graph)
    called = {(node.domain, node.op_type) for node in model.graph.node if node.domain}
    assert called == {(function.domain, function.name) for function in model.functions} <= {(DOMAIN, GROUP_NORM)}
    assert {opset.domain for opset in model.opset_import} == {"", *(domain for domain, _ in called)}
    assert [value.name for value in model.graph.input] == list(tiny.gated.inputs)
    assert [value.name for value in model.graph.output] == [OUTPUT]
    external = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    assert external == engine.weights <= tiny.weights.keys()
    for trace in (str(Path.cwd()), str(tiny.gated.folder), "site-packages", ".py", "Traceback", "pkg."):
        assert trace.encode() not in engine.graph


@settings(max_examples=examples(10, at_night=20))
@given(data=st.data())
def test_gated_graph_computes_in_onnx_what_it_computes_in_torch(tiny: Tiny, data: st.DataObject) -> None:
    # torch traces some denoisers as if there were never fewer positions on the lowest level than two
    sides = st.integers(max(2, -(-5 // tiny.stride)), 24 // tiny.stride).map(lambda size: size * tiny.stride)
    inputs = data.draw(cases(tiny, sides)).gated_inputs()
    assert relative_error(tiny.run(tiny.program, inputs), tiny.run_reference(inputs)) < LIBRARIES_AGREE


@settings(max_examples=examples(10, at_night=20))
@given(data=st.data())
def test_engine_holds_exactly_the_weights_that_matter(tiny: Tiny, data: st.DataObject) -> None:
    case = data.draw(cases(tiny))
    for assignment in case.assignments:
        engine = specialise(tiny.gated, assignment, case.means())
        live, lost = live_weights(tiny, assignment.keys())
        assert engine.weights >= live
        # If both parts of a concatenation are gone, another value must provide its height and width.
        assert engine.weights == live or lost


@pytest.mark.shows("capture", "export", "law")
@settings(max_examples=examples(15, at_night=30))
@given(data=st.data())
def test_engine_computes_what_the_gated_graph_computes(tiny: Tiny, data: st.DataObject) -> None:
    case = data.draw(cases(tiny))
    assignment = case.assignments[0]
    engine = specialise(tiny.gated, assignment, case.means())
    check_self_contained(tiny, engine)
    from_engine = tiny.run(tiny.load(engine), case.inputs())
    for_all = tiny.run(tiny.program, case.gated_inputs([assignment] * len(case.assignments)))
    assert relative_error(from_engine, for_all) < ENGINES_AGREE
    for_first = tiny.run(tiny.program, case.gated_inputs())
    assert relative_error(from_engine[0], for_first[0]) < ENGINES_AGREE


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 16), (2, 8, 12), (3, 12, 8), (1, 8, 32)])
def test_without_removals_the_denoiser_is_computed(tiny: Tiny, batch: int, height: int, width: int) -> None:
    case = Case(tiny=tiny, assignments=[{}] * batch, height=height, width=width)
    expected = tiny.run_denoiser(case.inputs())
    engine = tiny.load(specialise(tiny.gated, {}, case.means()))
    for output in (tiny.run(tiny.program, case.gated_inputs()), tiny.run(engine, case.inputs())):
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=LIBRARIES_AGREE)
        assert relative_error(output, expected) < 1e-5


@pytest.mark.parametrize("treatment", [DROP, MEAN])
def test_everything_in_the_step_can_be_removed(tiny: Tiny, treatment: Treatment) -> None:
    assignment = dict.fromkeys(without_step(tiny), treatment)
    case = Case(tiny=tiny, assignments=[assignment] * 2, height=8, width=12)
    engine = specialise(tiny.gated, assignment, case.means())
    output = tiny.run(tiny.load(engine), case.inputs())
    assert relative_error(output, tiny.run(tiny.program, case.gated_inputs())) < ENGINES_AGREE
    assert 0 < len(engine.weights) < len(tiny.weights) / 4


@pytest.mark.parametrize("treatment", [DROP, MEAN])
@pytest.mark.parametrize("others", [KEEP, DROP, MEAN])
def test_the_step_can_be_removed(tiny: Tiny, treatment: Treatment, others: Treatment) -> None:
    assignment = {**dict.fromkeys(without_step(tiny), others), STEP: treatment}
    case = Case(tiny=tiny, assignments=[assignment] * 2, height=8, width=12)
    engine = specialise(tiny.gated, assignment, case.means())
    check_self_contained(tiny, engine)
    assert live_weights(tiny, {STEP}) == (set(), False)
    assert not engine.weights
    output = tiny.run(tiny.load(engine), case.inputs())
    step = tiny.gated.components[-1]
    own_means = case.means()[step.offset :].reshape(1, -1, 1, 1)
    expected = own_means if treatment is MEAN else np.zeros_like(own_means)
    np.testing.assert_array_equal(output, np.broadcast_to(expected, output.shape))
    assert relative_error(output, tiny.run(tiny.program, case.gated_inputs())) < ENGINES_AGREE


def test_every_component_matters(tiny: Tiny) -> None:
    assignments = [{}, *({name: treatment} for treatment in (DROP, MEAN) for name in tiny.names)]
    case = Case(tiny=tiny, assignments=assignments, height=8, width=12)
    same = {name: np.repeat(array[:1], len(assignments), axis=0) for name, array in case.inputs().items()}
    outputs = tiny.run(tiny.program, case.gated_inputs() | same)
    for assignment, output in zip(assignments[1:], outputs[1:], strict=True):
        assert relative_error(output, outputs[0]) > 0.01, assignment


def test_nothing_nested_is_left_of_a_removed_component(tiny: Tiny) -> None:
    owners = {component.name: component.owner for component in tiny.gated.components if component.kind == "residual"}
    means = np.ones(tiny.gated.channels, dtype=np.float32)
    for component, treatment in zip(tiny.gated.components, cycle((DROP, MEAN)), strict=False):
        weights = specialise(tiny.gated, {component.name: treatment}, means).weights
        if component.kind != "skip":
            assert weights < tiny.weights.keys()
        for name in owners.keys() & set(component.nested):
            left = [weight for weight in weights if tiny.parameters[weight].startswith(f"{owners[name]}.")]
            assert not left, f"{treatment} {component.name} leaves {left} of {name}"


def test_concatenation_that_lost_both_parts_revives_neither(tiny: Tiny) -> None:
    means = np.zeros(tiny.gated.channels, dtype=np.float32)
    components = tiny.gated.components
    joins = [(level, skip) for level, skip in pairwise(components) if level.kind == "level"]
    assert joins
    for level, skip in joins:
        assert (skip.kind, skip.owner) == ("skip", level.owner)
        one = specialise(tiny.gated, {level.name: DROP}, means)
        both = specialise(tiny.gated, {level.name: DROP, skip.name: DROP}, means)
        assert both.weights <= one.weights


@pytest.mark.parametrize("step", [KEEP, MEAN])
def test_same_assignment_gives_same_bytes(tiny: Tiny, step: Treatment) -> None:
    before = tiny.gated.runnable()
    rng = np.random.default_rng(0)
    means = rng.standard_normal(tiny.gated.channels, dtype=np.float32)
    drawn = rng.choice(np.array([KEEP, DROP, MEAN], dtype=object), len(tiny.names) - 1)
    assignment = {**dict(zip(without_step(tiny), drawn, strict=True)), STEP: step}
    removed = {name: treatment for name, treatment in reversed(assignment.items()) if treatment is not KEEP}
    engine = specialise(tiny.gated, assignment, means)
    assert specialise(tiny.gated, assignment, means) == engine
    assert specialise(tiny.gated, removed, means.copy()) == engine
    assert specialise(GatedGraph.load(tiny.gated.folder), assignment, means) == engine
    assert specialise(tiny.gated, assignment, means + 1) != engine
    assert tiny.gated.runnable() == before


def test_engine_is_valid_onnx(tiny: Tiny, tmp_path: Path) -> None:
    skip = next(component.name for component in tiny.gated.components if component.kind == "skip")
    shutil.copy(tiny.gated.weights, tmp_path)
    assignments: Sequence[Assignment] = (
        {},
        {skip: MEAN},
        {STEP: MEAN},
        dict.fromkeys(without_step(tiny), DROP),
        dict.fromkeys(tiny.names, DROP),
    )
    for assignment in assignments:
        engine = specialise(tiny.gated, assignment, np.ones(tiny.gated.channels, dtype=np.float32))
        (tmp_path / "engine.onnx").write_bytes(engine.graph)
        onnx.checker.check_model(str(tmp_path / "engine.onnx"), full_check=True)

"""Engines are made from the plan's own profile, with the means of the noise levels they run at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from unetc.artifacts.plan import Phase, Plan, Prediction
from unetc.artifacts.profile import Bin, Component, Estimate, ModelReference, Profile
from unetc.artifacts.sizes import SampleSizes
from unetc.backend import DOMAIN, SerialisedGraph
from unetc.compiler.engines import compile_engines
from unetc.compiler.graph.gate import OPSET
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.planner.emissions import with_emissions
from unetc.errors import CompileError, PlanError
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.branch_cache import BranchCache
from unetc.treatments import Treatment

MODEL = ModelReference(name="m", sha256="0" * 64, pipeline="DDPMPipeline", denoiser="UNet2DModel")
CHANNELS = 2
COMPONENTS = tuple(
    Component(
        name=name,
        kind="residual",
        owner=name,
        index=i,
        channels=CHANNELS,
        axis=1,
        offset=CHANNELS * i,
        nested=(),
    )
    for i, name in enumerate(("first", "second"))
)
STEPS = (4, 3, 2, 1)
NO_WEIGHTS = save({})
MEANS = np.random.default_rng(0).standard_normal((len(STEPS), CHANNELS * len(COMPONENTS))).astype("<f4")
DROP_FIRST = {"first": Treatment.DROP}
MEAN_FIRST = {"first": Treatment.MEAN}
MEAN_BOTH = {"first": Treatment.MEAN, "second": Treatment.MEAN}
HOLD_FIRST = {"first": Treatment.HOLD}
FORECAST_SECOND = {"second": Treatment.FORECAST}


def exactly(value: float) -> Estimate:
    return Estimate(mean=value, low=value, high=value)


PROFILE = Profile(
    unetc="0",
    model=MODEL,
    scheduler="ddim",
    steps=sum(STEPS),
    samples=4,
    seed=0,
    target="null",
    threads=1,
    batch=8,
    sample_shape=(CHANNELS, 8, 8),
    components=COMPONENTS,
    bins=tuple(Bin(low=float(b), high=float(b + 1), steps=steps) for b, steps in enumerate(STEPS)),
    full_ms=exactly(10.0),
    full_bytes=1,
    costs=(),
    effects=(),
    samplings=1.0,
    means=tuple(row.tobytes() for row in MEANS),
)


@pytest.fixture
def gated(tmp_path: Path) -> GatedGraph:
    """Make a gated graph: x + a with a = gate(-x), then y + b with b = gate(-y)."""
    gate = "per_sample=[-1, 1, 1, 1], per_channel=[1, -1, 1, 1]"
    inputs = "float[b, 2, h, w] sample, float[b] timestep, float[b, c, 2] gates, float[n] means"
    text = f"""<ir_version: 10, opset_import: ["": {OPSET}, "{DOMAIN}": 1]>
        tiny ({inputs}) => (float[b, 2, h, w] out_sample) <float[b, 2, h, w] a, float[b, 2, h, w] b_> {{
            a = Neg(sample)
            gated_a = {DOMAIN}.Gate<index=[0], begin=[0], end=[2], {gate}>(a, gates, means)
            y = Add(sample, gated_a)
            b_ = Neg(y)
            gated_b = {DOMAIN}.Gate<index=[1], begin=[2], end=[4], {gate}>(b_, gates, means)
            out_sample = Add(y, gated_b)
        }}"""
    return GatedGraph(
        model=ir.serde.deserialize_model(onnx.parser.parse_model(text)),
        components=COMPONENTS,
        inputs=("sample", "timestep"),
        sizes=SampleSizes(multiple=1),
        folder=tmp_path,
    )


def make_plan(engines: Sequence[Mapping[str, Treatment]], phases: Sequence[tuple[int, int, tuple[int, ...]]]) -> Plan:
    """Make a plan of phases (first bin, last bin + 1, cycle)."""
    return Plan(
        unetc="0",
        model=MODEL,
        profile_sha256=PROFILE.sha256(),
        budget=0.1,
        max_engines=4,
        engines=with_emissions([{}, *engines], COMPONENTS),
        phases=tuple(Phase(low=float(first), high=float(last), cycle=cycle) for first, last, cycle in phases),
        prediction=Prediction(time_ratio=0.9, relative_l2=0.1, memory=2.0),
    )


def run(graph: SerialisedGraph) -> NDArray[np.float32]:
    """Run a graph on zeros: the branches are zero, so the output is the sum of the means, per channel."""
    output = np.full((1, CHANNELS, 3, 3), np.nan, dtype=np.float32)
    program = open_backend("onnxruntime:cpu", threads=1).open_weights(NO_WEIGHTS).load(graph)
    program({"sample": np.zeros_like(output), "timestep": np.zeros(1, np.float32)}, output)
    assert (output == output[:, :, :1, :1]).all()
    return output[0, :, 0, 0]


def average(bins: Sequence[int], component: int) -> NDArray[np.float64]:
    """Average the means of some bins, each as often as it has steps."""
    own = MEANS[:, CHANNELS * component : CHANNELS * (component + 1)].astype(np.float64)
    averaged: NDArray[np.float64] = np.mean([own[b] for b in bins for _ in range(STEPS[b])], axis=0)
    return averaged


def test_one_graph_for_each_engine_in_the_order_of_the_plan(gated: GatedGraph) -> None:
    plan = make_plan([DROP_FIRST, MEAN_FIRST, MEAN_BOTH], [(0, 1, (0,)), (1, 2, (1,)), (2, 3, (2,)), (3, 4, (3,))])
    graphs = compile_engines(gated, plan, PROFILE)
    nodes = [[node.op_type for node in onnx.load_from_string(graph.graph).graph.node] for graph in graphs]
    assert [operators.count("Neg") for operators in nodes] == [2, 1, 1, 0]
    assert all("Gate" not in operators for operators in nodes)


@pytest.mark.parametrize("bins", [(0,), (3,), (0, 1), (1, 2, 3), (0, 1, 2, 3)])
def test_means_are_averaged_over_the_steps_of_a_phase(gated: GatedGraph, bins: tuple[int, ...]) -> None:
    first, last = bins[0], bins[-1] + 1
    phases = [(0, first, (0,)), (first, last, (1,)), (last, len(STEPS), (0,))]
    plan = make_plan([MEAN_FIRST], [phase for phase in phases if phase[0] < phase[1]])
    graph = onnx.load_from_string(compile_engines(gated, plan, PROFILE)[1].graph).graph
    (mean,) = (onnx.numpy_helper.to_array(value) for value in graph.initializer if value.name == "mean.0")
    np.testing.assert_array_equal(mean.ravel(), average(bins, 0).astype(np.float32))


def test_means_of_an_engine_that_comes_back_are_averaged_over_all_its_phases(gated: GatedGraph) -> None:
    plan = make_plan([MEAN_BOTH, DROP_FIRST], [(0, 1, (1,)), (1, 2, (2,)), (2, 4, (1,))])
    made = run(compile_engines(gated, plan, PROFILE)[1])
    np.testing.assert_allclose(made, average((0, 2, 3), 0) + average((0, 2, 3), 1), rtol=1e-6)


def test_engines_that_take_turns_both_get_the_means_of_their_phase(gated: GatedGraph) -> None:
    also = {"second": Treatment.DROP, "first": Treatment.MEAN}
    plan = make_plan([MEAN_BOTH, also], [(0, 2, (1, 2)), (2, 4, (0,))])
    _, both, other = compile_engines(gated, plan, PROFILE)
    np.testing.assert_allclose(run(both), average((0, 1), 0) + average((0, 1), 1), rtol=1e-6)
    np.testing.assert_allclose(run(other), average((0, 1), 0), rtol=1e-6)


def test_the_full_engine_has_no_means(gated: GatedGraph) -> None:
    plan = make_plan([MEAN_BOTH], [(0, 4, (1,))])
    full, _ = compile_engines(gated, plan, PROFILE)
    assert run(full).tolist() == [0, 0]


def names_of(values: Iterable[onnx.ValueInfoProto]) -> list[str]:
    return [value.name for value in values]


def test_engines_emit_what_others_hold_and_take_what_they_hold(gated: GatedGraph) -> None:
    plan = make_plan([HOLD_FIRST, FORECAST_SECOND, DROP_FIRST], [(0, 1, (0, 1)), (1, 3, (0, 2)), (3, 4, (3,))])
    graphs = [onnx.load_from_string(graph.graph).graph for graph in compile_engines(gated, plan, PROFILE)]
    ordinary = ["sample", "timestep"]
    taken = [sorted({*names_of(graph.input)} - {*ordinary}) for graph in graphs]
    assert taken == [[], ["held.0"], ["earlier.1", "extrapolation.1", "held.1"], []]
    # the prediction comes first, then the components that the plan lets the engine emit
    emitted = [names_of(graph.output) for graph in graphs]
    assert [outputs[0] for outputs in emitted] == ["out_sample"] * 4
    assert [outputs[1:] for outputs in emitted] == [
        ["computed.0", "computed.1"],
        ["computed.1"],
        ["computed.0"],
        ["computed.1"],
    ]
    for assignment, outputs in zip(plan.engines, emitted, strict=True):
        assert [f"computed.{c.index}" for c in COMPONENTS if c.name in assignment.emits] == outputs[1:]


def test_a_plan_that_holds_nothing_emits_nothing(gated: GatedGraph) -> None:
    plan = make_plan([DROP_FIRST, MEAN_BOTH], [(0, 2, (1,)), (2, 4, (2,))])
    for graph in compile_engines(gated, plan, PROFILE):
        assert names_of(onnx.load_from_string(graph.graph).graph.output) == ["out_sample"]


def test_an_engine_computes_with_what_another_has_emitted(gated: GatedGraph) -> None:
    reuses = [{"first": treatment, "second": Treatment.DROP} for treatment in (Treatment.HOLD, Treatment.FORECAST)]
    plan = make_plan(reuses, [(0, 2, (0, 1)), (2, 4, (0, 2))])
    loader = open_backend("onnxruntime:cpu", threads=1).open_weights(NO_WEIGHTS)
    full, holding, forecasting = (loader.load(graph) for graph in compile_engines(gated, plan, PROFILE))
    one = np.ones((1, CHANNELS, 3, 3), np.float32)
    timestep, output, branches = np.zeros(1, np.float32), np.empty_like(one), BranchCache()
    for sample, at in ((one, 30.0), (3 * one, 20.0)):  # the first branch is -1, then -3
        branches.store(full({"sample": sample, "timestep": timestep}, output), at)
        assert not output.any()
    inputs = {"sample": 7 * one, "timestep": timestep, **branches.inputs(15.0, rows=1)}
    holding(inputs, output)
    np.testing.assert_array_equal(output, (7 - 3) * one)
    forecasting(inputs, output)
    np.testing.assert_array_equal(output, (7 - 4) * one)


def test_a_plan_of_another_profile_is_refused(gated: GatedGraph) -> None:
    plan = make_plan([DROP_FIRST], [(0, 4, (1,))])
    other = msgspec.structs.replace(PROFILE, seed=1)
    with pytest.raises(PlanError, match="made from another profile"):
        compile_engines(gated, plan, other)


def test_a_plan_of_another_model_is_refused(gated: GatedGraph) -> None:
    stranger = msgspec.structs.replace(MODEL, name="stranger", sha256="1" * 64)
    plan = msgspec.structs.replace(make_plan([DROP_FIRST], [(0, 4, (1,))]), model=stranger)
    with pytest.raises(PlanError, match=r"\(of stranger\) than the one given \(of m\)"):
        compile_engines(gated, plan, PROFILE)


def test_a_plan_that_names_an_unknown_component_is_refused(gated: GatedGraph) -> None:
    plan = make_plan([{"third": Treatment.DROP}], [(0, 4, (1,))])
    with pytest.raises(CompileError, match="'third'"):
        compile_engines(gated, plan, PROFILE)

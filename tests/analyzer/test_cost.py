"""A cost is the time that a removal saves, whatever else the machine is doing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors.numpy import save_file

from tests.models import tiny_of
from unetc import timing
from unetc.analyzer.cost import measure_costs
from unetc.artifacts.profile import Component, Estimate
from unetc.artifacts.sizes import SampleSizes
from unetc.backend import DOMAIN, Array, Loader, Program, SerialisedGraph
from unetc.compiler.graph.forms import removals_of
from unetc.compiler.graph.gate import OPSET
from unetc.compiler.graph.gated import GatedGraph
from unetc.device import HOST, Device
from unetc.progress import Progress, ignore

SHAPE = (2, 4, 4)
BASE_MS, NODE_MS = 10.0, 1.0
NODES = {"short": 3, "long": 5, "inner": 2, "outer": 4}
"""Number of nodes in each component's branch; `inner` is inside the branch of `outer`."""
FULL_MS = BASE_MS + NODE_MS * sum(NODES.values())
SAVED_MS = {"short": 3.0, "long": 5.0, "inner": 2.0, "outer": 6.0, "step": 14.0}
"""Milliseconds that each removal saves; without the step, only the fixed cost of a call remains."""
WARMUP, ROUNDS = 2, 8


@pytest.fixture
def gated(tmp_path: Path) -> GatedGraph:
    """Build a gated graph whose branches are chains of nodes: step(sample + short + long + outer(inner))."""
    lines: list[str] = []

    def gate(branch: str, name: str) -> str:
        index = list(SAVED_MS).index(name)
        where = f"index=[{index}], begin=[{2 * index}], end=[{2 * index + 2}]"
        shapes = "per_sample=[-1, 1, 1, 1], per_channel=[1, -1, 1, 1]"
        return f"{DOMAIN}.Gate<{where}, {shapes}>({branch}, gates, means)"

    def chain(start: str, name: str) -> str:
        for i in range(NODES[name]):
            lines.append(f"{name}{i} = Neg({start})")
            start = f"{name}{i}"
        return start

    def join(trunk: str, branch: str, name: str) -> str:
        lines.append(f"{name}_gated = {gate(branch, name)}")
        lines.append(f"after_{name} = Add({trunk}, {name}_gated)")
        return f"after_{name}"

    trunk = "sample"
    for name in ("short", "long"):
        trunk = join(trunk, chain(trunk, name), name)
    inside = chain(trunk, "outer")
    trunk = join(trunk, join(inside, chain(inside, "inner"), "inner"), "outer")
    inputs = "float[b, 2, h, w] sample, float[b] timestep, float[b, c, 2] gates, float[n] means"
    text = f"""<ir_version: 10, opset_import: ["": {OPSET}, "{DOMAIN}": 1]>
        tiny ({inputs}) => (float[b, 2, h, w] out_sample)
        {{ {" ".join(lines)} out_sample = {gate(trunk, "step")} }}"""
    components = tuple(
        Component(
            name=name,
            kind="step" if name == "step" else "residual",
            owner=name,
            index=i,
            channels=2,
            axis=1,
            offset=2 * i,
            nested={"outer": ("inner",), "step": tuple(NODES)}.get(name, ()),
        )
        for i, name in enumerate(SAVED_MS)
    )
    save_file({}, tmp_path / "weights.safetensors")
    return GatedGraph(
        model=ir.serde.deserialize_model(onnx.parser.parse_model(text)),
        components=components,
        inputs=("sample", "timestep"),
        sizes=SampleSizes(multiple=1),
        folder=tmp_path,
    )


@dataclass
class Machine:
    """A backend with a simulated clock, whose programs take time in proportion to their nodes."""

    seconds: float = 0.0
    calls: list[int] = field(default_factory=list)
    """Number of nodes of each called program, in order."""
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    slowness: Callable[[int], float] = lambda call: 1.0
    """Factor by which the machine is slower at its n-th call."""
    device: Device = HOST

    def open_weights(self, weights: bytes) -> Loader:
        return self

    def load(self, graph: SerialisedGraph) -> Program:
        nodes = sum(node.op_type == "Neg" for node in onnx.load_from_string(graph.graph).graph.node)

        def program(inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
            sample, timestep = (inputs[name] for name in ("sample", "timestep"))
            assert isinstance(sample, np.ndarray)
            assert isinstance(timestep, np.ndarray)
            self.seconds += 1e-3 * (BASE_MS + NODE_MS * nodes) * self.slowness(len(self.calls))
            self.calls.append(nodes)
            self.shapes |= {sample.shape, output.shape, (*timestep.shape, *SHAPE)}
            return {}

        return program


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: machine.seconds))
    return machine


def pair_of(call: int) -> tuple[int, int]:
    """Return the component and the round, warm-up included, that a call belongs to."""
    component, call = divmod(call, 2 * (WARMUP + ROUNDS))
    return component, call // 2


def measure(gated: GatedGraph, machine: Machine, rounds: int = ROUNDS) -> tuple[Estimate, dict[str, Estimate]]:
    measured = measure_costs(
        gated, gated.components, machine, batch=3, sample_shape=SHAPE, rounds=rounds, on_progress=ignore
    )
    return measured.full_ms, {cost.component: cost.saved_ms for cost in measured.costs}


def test_a_cost_is_the_full_time_minus_the_time_without(gated: GatedGraph, machine: Machine) -> None:
    full, saved = measure(gated, machine)
    assert full.mean == pytest.approx(FULL_MS)
    assert {name: cost.mean for name, cost in saved.items()} == pytest.approx(SAVED_MS)
    # nothing disturbs this machine, so the intervals are as narrow as the clock is exact
    assert all(estimate.high - estimate.low < 1e-6 for estimate in (full, *saved.values()))


def test_the_full_graph_alternates_with_the_graph_without_the_component(gated: GatedGraph, machine: Machine) -> None:
    measure(gated, machine)
    full = sum(NODES.values())
    expected: list[int] = []
    for saved in SAVED_MS.values():
        expected += [full, full - int(saved / NODE_MS)] * (WARMUP + ROUNDS)
    assert machine.calls == expected


def test_graphs_run_at_the_requested_batch_and_shape(gated: GatedGraph, machine: Machine) -> None:
    measure(gated, machine)
    assert machine.shapes == {(3, *SHAPE)}


def test_the_first_calls_are_not_timed(gated: GatedGraph, machine: Machine) -> None:
    machine.slowness = lambda call: 50.0 if pair_of(call)[1] < WARMUP else 1.0
    full, saved = measure(gated, machine)
    assert full.high == pytest.approx(FULL_MS)
    assert saved["long"].high == pytest.approx(SAVED_MS["long"])


@pytest.mark.parametrize("slow_call", range(2 * WARMUP, 2 * (WARMUP + ROUNDS)))
def test_one_slow_moment_does_not_move_a_cost(gated: GatedGraph, machine: Machine, slow_call: int) -> None:
    machine.slowness = lambda call: 100.0 if call == slow_call else 1.0
    full, saved = measure(gated, machine)
    assert full.mean == pytest.approx(FULL_MS)
    assert saved["short"].mean == pytest.approx(SAVED_MS["short"])
    # but the interval shows that something was odd
    assert saved["short"].high - saved["short"].low > SAVED_MS["short"]


@pytest.mark.parametrize("slow", range(len(SAVED_MS)))
def test_a_machine_that_is_slow_for_a_minute_does_not_make_a_component_expensive(
    gated: GatedGraph, machine: Machine, slow: int
) -> None:
    # all pairs of one component fall into the slow minute, so the difference of its times is three times its saving
    machine.slowness = lambda call: 3.0 if pair_of(call)[0] == slow else 1.0
    full, saved = measure(gated, machine)
    shares = {name: saving / FULL_MS for name, saving in SAVED_MS.items()}
    assert {name: cost.mean / full.mean for name, cost in saved.items()} == pytest.approx(shares)


def test_one_round_has_no_interval(gated: GatedGraph, machine: Machine) -> None:
    _, saved = measure(gated, machine, rounds=1)
    assert all(cost.low == cost.mean == cost.high for cost in saved.values())


def test_progress_counts_components(gated: GatedGraph, machine: Machine) -> None:
    reports: list[Progress] = []
    measure_costs(gated, gated.components, machine, batch=1, sample_shape=SHAPE, rounds=1, on_progress=reports.append)
    assert [(report.stage, report.done, report.total) for report in reports] == [
        ("timing", done, len(SAVED_MS)) for done in range(1, len(SAVED_MS) + 1)
    ]


def test_slow_calls_get_fewer_rounds(gated: GatedGraph, machine: Machine) -> None:
    machine.slowness = lambda call: 100.0  # a pair takes about 4 s
    full, saved = measure(gated, machine, rounds=12)
    assert len(machine.calls) == 2 * (WARMUP + 3) * len(SAVED_MS)
    assert full.mean == pytest.approx(100 * FULL_MS)
    assert saved["long"].mean == pytest.approx(100 * SAVED_MS["long"])


def test_components_of_one_form_are_timed_once(shared: Path) -> None:
    tiny = tiny_of("attention", shared)
    removals = removals_of(tiny.gated, (tiny.gated.predicted_channels, 16, 16))
    forms = {removals[one.name].form for one in tiny.gated.components}
    loaded: list[SerialisedGraph] = []

    class Loading(Machine):
        def load(self, graph: SerialisedGraph) -> Program:
            loaded.append(graph)
            return super().load(graph)

    backend = Loading()
    costs = measure_costs(
        tiny.gated, tiny.gated.components, backend, batch=1, sample_shape=SHAPE, rounds=1, on_progress=ignore
    ).costs
    assert len(loaded) == 1 + len(forms) < 1 + len(tiny.gated.components)
    assert [cost.component for cost in costs] == [one.name for one in tiny.gated.components]
    by_form: dict[object, set[float]] = {}
    for cost in costs:
        by_form.setdefault(removals[cost.component].form, set()).add(cost.saved_ms.mean)
    assert all(len(values) == 1 for values in by_form.values())

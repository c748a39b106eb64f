"""Random plans of the law's models, called through Triton's boundary, sample as in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batching.levels import LEVELS, STEPS, Levels
from tests.models import Reuse, tiny_of
from tests.triton.server import OnnxModel, Server
from unetc.backend import WEIGHTS, Loader, Program, SerialisedGraph
from unetc.device import HOST, Device
from unetc.errors import CorruptArtifactError, SessionError
from unetc.runtime.backends.registry import open_backend
from unetc.treatments import Treatment
from unetc.triton.backend import TritonBackend, TritonProgram
from unetc.triton.config import EngineConfig
from unetc.triton.placement import PLACEMENTS
from unetc.triton.served_graph import ServedGraph
from unetc.triton.signature import read_signature


class Exporting:
    """A backend that makes a model of Triton of every graph that it loads."""

    device: Device = HOST

    def __init__(self, folder: Path, most_rows: int) -> None:
        self._folder, self._most_rows = folder, most_rows
        self.server = Server()

    def open_weights(self, weights: bytes) -> Loader:
        self._weights = weights
        return self

    def load(self, graph: SerialisedGraph) -> Program:
        signature = read_signature(graph.graph, "a graph", len(self._weights))
        name = f"engine-{len(self.server.models)}"
        config = EngineConfig(
            name=name,
            signature=signature,
            most_rows=self._most_rows,
            placement=PLACEMENTS["onnxruntime:cpu"],
            threads=1,
            warm_up={},
        )
        folder = self._folder / name
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text(config.to_text())
        (folder / "1/model.onnx").write_bytes(graph.graph)
        (folder / "1" / WEIGHTS).write_bytes(self._weights)
        self.server.models[name] = OnnxModel(folder)
        served = ServedGraph(
            model=name,
            inputs=tuple(one.name for one in signature.inputs),
            outputs=tuple(one.name for one in signature.outputs),
            most_rows=self._most_rows,
        )
        return TritonBackend(self.server.utilities).load(SerialisedGraph(graph=served.to_json(), weights=frozenset()))


@pytest.fixture(scope="module")
def reuse(shared: Path) -> Reuse:
    tiny = tiny_of("attention", shared)
    level = next(component.name for component in tiny.gated.components if component.kind == "level")
    forecast = {name: Treatment.FORECAST for name in tiny.names if name.endswith("resnets.0")}
    return Reuse(tiny, {level: Treatment.HOLD}, forecast)


@pytest.fixture(scope="module")
def exporting(tmp_path_factory: pytest.TempPathFactory) -> Exporting:
    return Exporting(tmp_path_factory.mktemp("models"), most_rows=2)


@pytest.fixture(scope="module")
def programs(reuse: Reuse, exporting: Exporting) -> tuple[list[Program], list[Program]]:
    """The full model and the engines, in Triton and in onnxruntime."""
    weights = reuse.tiny.gated.weights.read_bytes()
    loaders = exporting.open_weights(weights), open_backend("onnxruntime:cpu", threads=1).open_weights(weights)
    inside, direct = ([loader.load(graph) for graph in (reuse.full, *reuse.graphs)] for loader in loaders)
    return inside, direct


@settings(max_examples=15)
@given(
    cycle=st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple),
    batch=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_random_plans_sample_the_same(
    cycle: tuple[int, ...],
    batch: int,
    seed: int,
    reuse: Reuse,
    exporting: Exporting,
    programs: tuple[list[Program], list[Program]],
) -> None:
    images = [
        reuse.session(backend, full, engines, cycle).sample(batch, seed=seed)
        for backend, (full, *engines) in zip(
            (exporting, open_backend("onnxruntime:cpu", threads=1)), programs, strict=True
        )
    ]
    np.testing.assert_allclose(*images, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def levels(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Levels, Levels]:
    """Levels of a model with prompts, in Triton and in onnxruntime; some of them treat guidance."""
    tiny = tiny_of("cross-attention", shared)
    inside = Exporting(tmp_path_factory.mktemp("guided"), most_rows=3)
    return Levels(tiny, inside), Levels(tiny, open_backend("onnxruntime:cpu", threads=1))


@pytest.mark.nightly
@settings(max_examples=40)
@given(
    level=st.sampled_from(LEVELS),
    scheduler=st.sampled_from(["ddim", "ddpm", "dpmsolver++"]),
    steps=st.sampled_from(STEPS),
    batch=st.integers(1, 4),
    scale=st.sampled_from([1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_guided_calls_and_halves_of_them_sample_the_same(
    level: str,
    scheduler: str,
    steps: int,
    batch: int,
    scale: float,
    seed: int,
    levels: tuple[Levels, Levels],
) -> None:
    images = [
        own.opened(scheduler)[level].sample(
            batch, seed=seed, steps=steps, conditions=own.conditions(batch, seed, scale=scale)
        )
        for own in levels
    ]
    np.testing.assert_allclose(*images, rtol=1e-4, atol=1e-5)


def test_branches_are_copied_out_of_responses(
    reuse: Reuse, exporting: Exporting, programs: tuple[list[Program], list[Program]]
) -> None:
    (_, emitting, *_), _ = programs
    inputs = reuse.tiny.inputs(batch=3, height=8, width=8)
    output = np.empty((3, reuse.tiny.gated.predicted_channels, 8, 8), np.float32)
    emitted = emitting(inputs, output)
    assert emitted
    assert all(value.flags.owndata and len(value) == 3 for value in emitted.values())
    assert np.isfinite(output).all()


def test_a_missing_input_is_named() -> None:
    graph = ServedGraph(model="m", inputs=("sample", "timestep"), outputs=("out",), most_rows=2)
    program = TritonProgram(graph, Server().utilities)
    with pytest.raises(SessionError, match="the engine needs timestep"):
        program({"sample": np.zeros((1, 1, 2, 2), np.float32)}, np.empty((1, 1, 2, 2), np.float32))


def test_a_graph_that_is_no_name_is_refused(reuse: Reuse) -> None:
    with pytest.raises(CorruptArtifactError, match="a graph of the loop's bundle is not a valid servedgraph"):
        TritonBackend(Server().utilities).load(reuse.full)

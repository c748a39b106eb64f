"""Measured engines keep values in float32 that float16 cannot hold, and are never served to sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from diffusers import DDPMPipeline
from numpy.typing import NDArray
from onnx import TensorProto, inliner

from tests.every_day import every_nth
from tests.graph.test_lowering import evaluate, run
from tests.nvidia import test_cache as test_engine_cache
from tests.nvidia.test_tensorrt_backend import backend_of
from tests.stand_ins.tensorrt_on_cpu import LIBRARY
from tests.tiny_build import once
from unetc.analyzer.analysis import AnalysisOptions
from unetc.analyzer.analyze import analyze_model
from unetc.artifacts.profile import Profile
from unetc.backend import WEIGHTS, SerialisedGraph
from unetc.compiler.build import BuildOptions
from unetc.compiler.build import build as build_bundle
from unetc.compiler.graph.gate import GATES, MEANS, gate_values
from unetc.compiler.graph.gated import HOLDS, GatedGraph
from unetc.compiler.graph.lowering import lower_graphs
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.prepare import Prepared, prepare
from unetc.compiler.tensorrt import on_demand
from unetc.compiler.tensorrt.calibrate_model import overflowing_in_model
from unetc.compiler.tensorrt.messages import BuildRequest
from unetc.compiler.tensorrt.on_demand import BuildingBackend, OnDemand
from unetc.compiler.tensorrt.supervise import Outcome
from unetc.conditions import UNCONDITIONAL
from unetc.errors import EngineBuildError, SessionError, StaleEngineError
from unetc.models.find import find_model
from unetc.nvidia.cache import EngineCache
from unetc.nvidia.library import library_of
from unetc.precision import Precision
from unetc.progress import Progress, ignore
from unetc.runtime.backends.registry import Memory, open_backend
from unetc.runtime.backends.tensorrt import TensorRtBackend
from unetc.treatments import EARLIER, EXTRAPOLATION, HELD, Treatment

TOLERANCE = 2e-2
"""Relative to the largest number of a prediction; see test_lowering. Norms of large values are ill-conditioned."""
SHAPE = (1, 8, 8)
CALLS = MeasuredCalls.of(SHAPE, 2, 2, UNCONDITIONAL)

Values = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def loud(shared: Path, tiny_model: Path) -> Prepared:
    """Capture the tiny model with values of 10⁵ in the trunk and in the last blocks; norms make them small again."""

    def save(folder: Path) -> None:
        pipeline = DDPMPipeline.from_pretrained(tiny_model)
        with torch.no_grad():
            pipeline.unet.conv_in.weight *= 1e5
            for block in pipeline.unet.up_blocks:
                for resnet in block.resnets:
                    resnet.conv1.weight *= 1e5
        pipeline.save_pretrained(folder)

    return prepare(find_model(str(once(shared / "loud-model", save))), shared / "loud-cache")


@pytest.fixture(scope="module")
def wide(loud: Prepared) -> frozenset[str]:
    return overflowing_in_model(loud, "ddim", UNCONDITIONAL, ignore)


def forms_of(gated: GatedGraph) -> dict[str, SerialisedGraph]:
    """Make every kind of graph that analysis and build load."""
    means = np.full(gated.channels, 0.5, np.float32)
    names = [component.name for component in gated.components]
    skip, level, residual = (
        next(c.name for c in gated.components if c.kind == k) for k in ("skip", "level", "residual")
    )

    def treat(**treatments: str) -> SerialisedGraph:
        return specialise(gated, {name: Treatment(how) for how, name in treatments.items()}, means)

    return {
        "runnable": gated.runnable(),
        "observing": gated.observing(),
        "remembering": gated.remembering(),
        "full": treat(),
        "emitting": specialise(gated, {}, means, names),
        "without a skip": treat(drop=skip),
        "with the mean of a skip": treat(mean=skip),
        "holding a level": treat(hold=level),
        "forecasting": treat(forecast=residual),
    }


FORMS = (
    "runnable",
    "observing",
    "remembering",
    "full",
    "emitting",
    "without a skip",
    "with the mean of a skip",
    "holding a level",
    "forecasting",
)


def inputs_of(gated: GatedGraph, folder: Path) -> Values:
    """Draw a call; held branches are the full model's results at the previous timestep."""
    rng = np.random.default_rng(0)
    inputs: Values = {
        "sample": rng.standard_normal((1, *SHAPE), dtype=np.float32),
        "timestep": np.full(1, 500, np.float32),
        GATES: gate_values(gated.components, {})[None],
        MEANS: np.zeros(gated.channels, np.float32),
        HOLDS: np.zeros((1, len(gated.components)), np.float32),
    }
    emitted = run(folder / "emitting.onnx", inputs | {"timestep": np.full(1, 600, np.float32)})
    for component in gated.components:
        value = emitted[f"computed.{component.index}"]
        inputs |= {f"{HELD}{component.index}": value, f"{EARLIER}{component.index}": value}
        inputs[f"{EXTRAPOLATION}{component.index}"] = np.ones(1, np.float32)
    return inputs


def test_what_overflows_is_found_once(loud: Prepared, wide: frozenset[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = (node.outputs[0].name for node in loud.gated.model.graph if reads(node, "model.conv_in.weight"))
    assert first in wide
    (last,) = (node.outputs[0].name for node in loud.gated.model.graph if reads(node, "model.conv_out.weight"))
    assert last not in wide
    monkeypatch.delattr("unetc.compiler.tensorrt.calibrate_model.overflowing")
    assert overflowing_in_model(loud, "ddim", UNCONDITIONAL, ignore) == wide
    with pytest.raises(NameError):
        overflowing_in_model(loud, "euler", UNCONDITIONAL, ignore)  # along another trajectory nothing is known yet


def reads(node: Any, name: str) -> bool:
    return any(value is not None and value.name == name for value in node.inputs)


@pytest.fixture(scope="module")
def folder(loud: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    (folder / WEIGHTS).write_bytes(loud.gated.weights.read_bytes())
    forms = forms_of(loud.gated)
    assert tuple(forms) == FORMS
    for name, graph in forms.items():
        (folder / f"{name}.onnx").write_bytes(graph.graph)
    return folder


@pytest.mark.parametrize("form", every_nth(4, FORMS))
def test_what_overflows_in_the_full_model_stays_wide_in_all_that_is_made_of_it(
    loud: Prepared, wide: frozenset[str], folder: Path, form: str
) -> None:
    inputs = inputs_of(loud.gated, folder)
    name = f"{form}.onnx"
    (exact, *_) = run(folder / name, inputs).values()
    half = {}
    for kept in (frozenset[str](), wide):
        lower_graphs(folder, [name], Precision.FP16, folder / "fp16", kept)
        with np.errstate(all="ignore"):
            (half[kept], *_) = evaluate(folder / "fp16" / name, inputs).values()
    assert not np.isfinite(half[frozenset()]).all()
    difference = np.abs(half[wide] - exact).max() / np.abs(exact).max()
    assert difference < TOLERANCE


def build(
    backend: Any, calls: MeasuredCalls, wide: Callable[[], frozenset[str]], loud: Prepared, graph: SerialisedGraph
) -> None:
    """Load a graph as an analysis does; without a GPU this fails when the library loads the engine."""
    building = backend.prepared_by(OnDemand(calls, wide, ignore))
    loader = building.open_weights(loud.gated.weights.read_bytes())
    misses = pytest.raises(SessionError, match=r"cannot load an engine: .*(?i:cuda)")
    with nullcontext() if torch.cuda.is_available() else misses:
        loader.load(graph)


@pytest.mark.rtx
@pytest.mark.parametrize("form", every_nth(4, ["remembering", "runnable", "observing", "without a skip"]))
def test_an_engine_of_float16_is_built_with_what_overflows_wide_and_is_never_served(
    loud: Prepared, wide: frozenset[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = forms_of(loud.gated)[form]
    built: list[onnx.ModelProto] = []
    real = on_demand.build_one

    def watched(name: str, key: Any, folder: Path, *others: Any, **options: Any) -> Any:
        built.append(onnx.load(folder / name))
        return real(name, key, folder, *others, **options)

    monkeypatch.setattr(on_demand, "build_one", watched)
    engines = EngineCache(tmp_path)
    backend = backend_of(engines, Precision.FP16)
    for _ in range(2):  # the second time it is there
        build(backend, CALLS, lambda: wide, loud, graph)
    (model,) = built
    types = types_of(model)
    shared = wide & types.keys()
    assert shared
    assert {types[name] for name in shared} == {TensorProto.FLOAT}
    assert TensorProto.FLOAT16 in types.values()
    (apart,) = (tmp_path / "measured").iterdir()
    (record,) = EngineCache(apart).records()
    assert record.key.precision is Precision.FP16
    assert engines.records() == []
    with pytest.raises(StaleEngineError, match="no tensorrt-rtx engine in fp16 of this graph"):
        engines.find(record.key.graph_sha256, record.key.weights_sha256, Precision.FP16, backend.here, {})


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model))
    return {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}


@pytest.mark.rtx
@pytest.mark.parametrize("precision", every_nth(2, [Precision.FP32, Precision.BF16]))
def test_what_cannot_overflow_is_not_looked_at_and_lies_apart_too(
    loud: Prepared, tmp_path: Path, precision: Precision
) -> None:
    pytest.importorskip("tensorrt_rtx")

    def never() -> frozenset[str]:
        raise AssertionError

    engines = EngineCache(tmp_path)
    build(backend_of(engines, precision), CALLS, never, loud, forms_of(loud.gated)["full"])
    assert engines.records() == []
    (apart,) = (tmp_path / "measured").iterdir()
    (record,) = EngineCache(apart).records()
    assert record.key.precision is precision


@pytest.mark.rtx
def test_engines_that_were_measured_longest_ago_make_room_and_those_that_are_served_stay(
    loud: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(on_demand, "MOST_BYTES", 0)
    backend, forms = backend_of(EngineCache(tmp_path)), forms_of(loud.gated)
    served = EngineCache(tmp_path).folder(test_engine_cache.KEY)
    EngineCache(tmp_path).put(test_engine_cache.record(), test_engine_cache.ENGINE_BYTES)
    for form in ("full", "without a skip"):
        build(backend, CALLS, frozenset, loud, forms[form])
        (apart,) = (tmp_path / "measured").iterdir()
        (record,) = EngineCache(apart).records()
        assert record.key.graph_sha256 == hashlib.sha256(forms[form].graph).hexdigest()
    assert served.exists()


@pytest.mark.rtx
@pytest.mark.without_gpu
@pytest.mark.parametrize("command", every_nth(2, ["analyze", "build"]))
def test_commands_find_what_overflows_before_they_build_an_engine(
    tiny_build: Path, tiny_model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    target, library, engines = "tensorrt-rtx:fp16", library_of("tensorrt-rtx"), EngineCache(tmp_path / "engines")
    cpu = torch.device("cpu")  # where inputs can be put; no engine gets as far as reading them
    backend = TensorRtBackend(library, Precision.FP16, here=library.origin(), engines=engines, gpu=cpu)
    monkeypatch.setattr("unetc.compiler.place.open_backend", lambda asked, threads: {target: backend}[asked])
    monkeypatch.setattr("unetc.compiler.prepare.STEP_COUNTS", ())
    told: list[str] = []

    def look(*_: object) -> frozenset[str]:
        told.append("look")
        return frozenset()

    monkeypatch.setattr("unetc.compiler.tensorrt.calibrate_model.overflowing_in_model", look)
    analysis = AnalysisOptions(steps=4, samples=2, bins=2, batch=2, rounds=1, threads=1, target=target)

    def tell(progress: Progress) -> None:
        told.append(progress.stage)

    profile = msgspec.structs.replace(Profile.load(tiny_build / "profile.json"), target=target)
    options = BuildOptions(plan=PlanOptions(budget=0.2), steps=4)
    model, bundle = find_model(str(tiny_model)), tmp_path / "bundle"
    commands: dict[str, Callable[[], object]] = {
        "analyze": lambda: analyze_model(model, analysis, cache=cache, on_progress=tell),
        "build": lambda: build_bundle(model, profile, bundle, options, cache=cache, on_progress=tell),
    }
    with pytest.raises(SessionError, match=r"cannot load an engine: .*(?i:cuda)"):
        commands[command]()
    assert told.count("look") == 1
    assert told.index("capture") < told.index("look") < told.index("build an engine")
    assert list((tmp_path / "engines").glob("measured/*/*/engine.trt"))


def test_an_engine_is_built_on_the_gpu_that_it_is_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[BuildRequest] = []

    def note(request: BuildRequest, folder: Path, **options: Any) -> Outcome:
        asked.append(request)
        raise EngineBuildError("far enough")

    monkeypatch.setattr("unetc.compiler.tensorrt.build_one.build_engine", note)
    second = torch.device("cuda", 1)
    engines = TensorRtBackend(
        LIBRARY, Precision.FP32, here=LIBRARY.origin(), engines=EngineCache(tmp_path), gpu=second, memory=Memory.LOW
    )
    loader = BuildingBackend(engines, CALLS, frozenset(), ignore).open_weights(b"weights")
    with pytest.raises(EngineBuildError, match="far enough"):
        loader.load(SerialisedGraph(graph=b"graph", weights=frozenset()))
    assert [request.gpu for request in asked] == [1]


def test_other_targets_build_nothing() -> None:
    backend = open_backend("onnxruntime:cpu", threads=1)
    assert backend.prepared_by(OnDemand(CALLS, frozenset, ignore)) is backend

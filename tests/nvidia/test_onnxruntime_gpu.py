"""onnxruntime for GPUs, as far as it can be tested without one: refusals, and bindings to tensors of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tests.models import Tiny, tiny_of
from unetc.backend import SerialisedGraph
from unetc.compiler.graph.specialise import specialise
from unetc.errors import MissingDependency, SessionError, UnetcError
from unetc.runtime.backends import onnxruntime_gpu
from unetc.runtime.backends.onnxruntime import HandingLoader, open_session
from unetc.runtime.backends.onnxruntime_gpu import (
    CPU,
    CUDA,
    SHAPE_ARITHMETIC,
    TENSORRT,
    OnnxRuntimeDevice,
    OnnxRuntimeGpuBackend,
    OnnxRuntimeGpuProgram,
    check_placement,
)
from unetc.runtime.backends.registry import open_backend

FOR_GPUS = CUDA in onnxruntime.get_available_providers()
"""Whether the package for GPUs is installed."""
DEVICE = OnnxRuntimeDevice(torch.device("cpu"))
READ_ON_THE_CPU = {"ConstantOfShape": 0, "Range": 0, "Reshape": 1, "Expand": 1, "Slice": 1, "Tile": 1}
"""By operator, the first input that its CUDA kernel reads from the CPU, so that the operator may run on the GPU."""


@pytest.fixture(scope="module")
def tiny(shared: Path) -> Tiny:
    return tiny_of("attention", shared)


def session_of(graph: SerialisedGraph, options: Any, weights: object) -> Any:
    """Open a session on the CPU that records the place of each node."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = open_session(graph, options, [CPU])
    session.weights = weights
    return session


def opened(tiny: Tiny, graph: SerialisedGraph, make: Any = session_of) -> Any:
    return HandingLoader(tiny.gated.weights.read_bytes(), 1, make).load(graph)


@pytest.mark.skipif(FOR_GPUS, reason="onnxruntime-gpu is installed")
@pytest.mark.parametrize("target", ["onnxruntime:cuda", "onnxruntime:tensorrt"])
def test_the_package_without_gpus_is_refused_by_name(target: str) -> None:
    with pytest.raises(MissingDependency, match=rf"target {target} needs \w+, and .* has .*CPUExecutionProvider.*pip"):
        open_backend(target, threads=1)


@pytest.mark.without_gpu
@pytest.mark.skipif(not FOR_GPUS, reason="needs onnxruntime-gpu")
def test_the_package_for_gpus_without_one_is_refused() -> None:
    with pytest.raises(SessionError, match="target onnxruntime:cuda needs an NVIDIA GPU"):
        open_backend("onnxruntime:cuda", threads=1)


@pytest.mark.without_gpu
@pytest.mark.skipif(not FOR_GPUS, reason="needs onnxruntime-gpu")
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("cuda", "opened a session with CPUExecutionProvider; expected CUDA"),
        ("tensorrt", "install TensorRT libraries.*tensorrt>=10,<11"),
    ],
)
def test_without_the_libraries_of_cuda_nothing_is_loaded(tiny: Tiny, place: str, message: str) -> None:
    backend = OnnxRuntimeGpuBackend(place, torch.device("cuda"), threads=1)
    loader = backend.open_weights(tiny.gated.weights.read_bytes())
    with pytest.raises(SessionError, match=message):
        loader.load(specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32)))


@pytest.mark.parametrize("place", ["cuda", "tensorrt"])
def test_a_session_is_asked_for_on_the_gpu_of_the_target(monkeypatch: Any, tiny: Tiny, place: str) -> None:
    asked: list[Any] = []

    def note(graph: SerialisedGraph, options: Any, providers: Any) -> Any:
        asked.extend(providers)
        return open_session(graph, options, [CPU])

    monkeypatch.setattr(onnxruntime_gpu, "open_session", note)
    backend = OnnxRuntimeGpuBackend(place, torch.device("cuda", 1), threads=1)
    with pytest.raises(SessionError, match="opened a session with CPUExecutionProvider"):
        backend.open_weights(tiny.gated.weights.read_bytes()).load(
            specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32))
        )
    assert {options["device_id"] for _, options in asked} == {"1"}
    assert dict(asked)[CUDA]["use_tf32"] == "0"


def test_without_its_libraries_tensorrt_10_is_asked_for(monkeypatch: Any, tiny: Tiny) -> None:
    session = opened(tiny, specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32)))
    with pytest.raises(SessionError, match=r"expected TensorrtExecutionProvider\..*pip install 'tensorrt>=10,<11'"):
        check_placement(session, TENSORRT)

    def refuse(graph: SerialisedGraph, options: Any, providers: Any) -> Any:
        raise SessionError("onnxruntime cannot load an engine: Please install TensorRT libraries as mentioned")

    monkeypatch.setattr(onnxruntime_gpu, "open_session", refuse)
    backend = OnnxRuntimeGpuBackend("tensorrt", torch.device("cuda", 0), threads=1)
    with pytest.raises(SessionError, match=r"install TensorRT libraries.*pip install 'tensorrt>=10,<11'"):
        backend.open_weights(tiny.gated.weights.read_bytes()).load(
            specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32))
        )


def test_a_session_that_was_opened_elsewhere_is_refused(tiny: Tiny) -> None:
    session = opened(tiny, specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32)))
    with pytest.raises(SessionError, match="session with CPUExecutionProvider; expected CUDAExecutionProvider"):
        check_placement(session, CUDA)


def test_a_session_that_computes_on_the_cpu_is_refused(tiny: Tiny) -> None:
    session = opened(tiny, specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32)))
    with pytest.raises(SessionError, match=r"would run .*Conv.* on the CPU"):
        check_placement(session, CPU)


def test_arithmetic_of_shapes_may_be_on_the_cpu() -> None:
    from onnx import parser

    text = """<ir_version: 10, opset_import: ["": 23]> g (float[b, 4] x) => (int64[2] y)
    { s = Shape(x)  y = Add(s, s) }"""
    graph = SerialisedGraph(graph=parser.parse_model(text).SerializeToString(), weights=frozenset())
    options = onnxruntime.SessionOptions()
    check_placement(session_of(graph, options, None), CPU)


@pytest.mark.parametrize("architecture", ["attention", "cross-attention"])
@pytest.mark.parametrize("functions", [[], ["GroupNormalization"], ["GroupNormalization", "Attention"]])
def test_what_depends_on_shapes_alone_may_be_on_the_cpu(shared: Path, architecture: str, functions: list[str]) -> None:
    """Place nodes as onnxruntime does (GetCpuPreferredNodes), with or without kernels for functions of ONNX."""
    import onnx
    from onnx.inliner import inline_selected_functions

    tiny = tiny_of(architecture, shared)
    graph = specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32), tiny.names)
    inlined = inline_selected_functions(
        onnx.load_model_from_string(graph.graph), [("", name) for name in functions], inline_schema_functions=True
    ).graph
    small = {one.name for one in inlined.initializer if np.prod(one.dims) <= 100}
    on_cpu: set[str] = set()
    computed: set[str] = set()
    for node in inlined.node:
        if node.op_type == "Constant":
            small |= {*node.output}
        elif node.op_type in {"Shape", "Size"} or (
            not on_cpu.isdisjoint(node.input)
            and all(name in small | on_cpu | {""} for name in node.input)
            and on_cpu.isdisjoint(node.input[READ_ON_THE_CPU.get(node.op_type, 9) :])
        ):
            on_cpu |= {*node.output}
            computed.add(node.op_type)
    assert {"Shape", "Reshape", "Div", "Concat"} <= computed <= SHAPE_ARITHMETIC


def test_tensors_are_bound_where_they_lie(tiny: Tiny) -> None:
    graph = specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32), tiny.names)
    program: OnnxRuntimeGpuProgram = opened(
        tiny, graph, lambda *parts: OnnxRuntimeGpuProgram(session_of(*parts), parts[-1], DEVICE)
    )
    inputs = tiny.inputs(batch=2, height=8, width=8)
    expected, emitted = tiny.run_emitting(opened_on_cpu(tiny, graph), inputs)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    output = torch.full((2, tiny.gated.predicted_channels, 8, 8), torch.nan)
    values = program(tensors, output)
    np.testing.assert_array_equal(output.numpy(), expected)
    assert set(values) == set(emitted) != set()
    for name, value in values.items():
        np.testing.assert_array_equal(DEVICE.to_array(value), emitted[name])
    with pytest.raises(SessionError, match="needs timestep"):
        program({"sample": tensors["sample"]}, output)
    with pytest.raises(UnetcError, match="onnxruntime failed"):
        program(tensors, torch.empty(1, 1, 8, 8))


def opened_on_cpu(tiny: Tiny, graph: SerialisedGraph) -> Any:
    return open_backend("onnxruntime:cpu", threads=1).open_weights(tiny.gated.weights.read_bytes()).load(graph)


def test_a_tensor_with_gaps_is_read_right(tiny: Tiny) -> None:
    graph = specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32))
    program: OnnxRuntimeGpuProgram = opened(
        tiny, graph, lambda *parts: OnnxRuntimeGpuProgram(session_of(*parts), parts[-1], DEVICE)
    )
    inputs = {name: torch.from_numpy(array) for name, array in tiny.inputs(batch=2, height=8, width=8).items()}
    outputs = torch.full((2, 2, tiny.gated.predicted_channels, 8, 8), torch.nan)
    program(inputs, outputs[0])
    sample = inputs["sample"].repeat_interleave(2, dim=3)[..., ::2]
    assert not sample.is_contiguous()
    program({**inputs, "sample": sample}, outputs[1])
    np.testing.assert_array_equal(outputs[1].numpy(), outputs[0].numpy())

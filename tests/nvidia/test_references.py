"""No library gets a graph that refers to bytes outside the bundle's weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.runtime.test_bundle import forge
from unetc.backend import WEIGHTS
from unetc.compiler.tensorrt.compile_bundle import compile_bundle
from unetc.compiler.tensorrt.options import CompileOptions
from unetc.compiler.tensorrt.references import check_references
from unetc.errors import CorruptArtifactError
from unetc.runtime.bundle import Bundle

FILE_BYTES = 100
FLOAT = onnx.TensorProto.FLOAT


def external(location: str = WEIGHTS, offset: object = 36, length: int = 64, size: int = 16) -> onnx.TensorProto:
    """Make a tensor whose numbers are stored in a file."""
    tensor = onnx.TensorProto(name="w", data_type=FLOAT, dims=[size], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def as_initializer(tensor: onnx.TensorProto) -> onnx.ModelProto:
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x()], [y()], [tensor])
    return helper.make_model(graph)


def as_constant(tensor: onnx.TensorProto) -> onnx.ModelProto:
    graph = helper.make_graph([helper.make_node("Constant", [], ["y"], value=tensor)], "g", [x()], [y()])
    return helper.make_model(graph)


def in_a_branch(tensor: onnx.TensorProto) -> onnx.ModelProto:
    branch = as_constant(tensor).graph
    branch.ClearField("input")
    node = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    return helper.make_model(helper.make_graph([node], "g", [x()], [y()]))


def in_a_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    model = helper.make_model(helper.make_graph([helper.make_node("f", [], ["y"], "own")], "g", [x()], [y()]))
    body = [helper.make_node("Constant", [], ["y"], value=tensor)]
    model.functions.append(helper.make_function("own", "f", [], ["y"], body, [helper.make_opsetid("", 23)]))
    return model


def in_a_default(tensor: onnx.TensorProto) -> onnx.ModelProto:
    """Make it the value of an attribute that calls of a function leave out."""
    model = in_a_function(onnx.TensorProto())
    model.functions[0].attribute_proto.append(helper.make_attribute("own", tensor))
    return model


def x() -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("x", FLOAT, [16])


def y() -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info("y", FLOAT, [16])


PLACES = [as_initializer, as_constant, in_a_branch, in_a_function, in_a_default]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"location": "../weights.safetensors"}, r"'\.\./weights\.safetensors'"),
        ({"location": "/etc/passwd"}, "'/etc/passwd'"),
        ({"location": "secret"}, "'secret'"),
        ({"offset": 37}, "'offset': '37'"),
        ({"offset": -64}, "'offset': '-64'"),
        ({"offset": "far"}, "'offset': 'far'"),
        ({"length": 60}, "'length': '60'"),
        ({"size": 17}, "expected 68 bytes"),
    ],
)
def test_what_lies_elsewhere_is_refused(
    place: Callable[[onnx.TensorProto], onnx.ModelProto], wrong: dict[str, object], message: str
) -> None:
    check_references(place(external()).SerializeToString(), "engine.onnx", FILE_BYTES)
    with pytest.raises(CorruptArtifactError, match=rf"engine\.onnx takes 'w' .*{message}.* Build the bundle again"):
        check_references(place(external(**wrong)).SerializeToString(), "engine.onnx", FILE_BYTES)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [0, 99])
def test_a_tensor_of_an_unknown_type_is_refused(kind: int) -> None:
    tensor = external()
    tensor.data_type = kind
    with pytest.raises(CorruptArtifactError, match=f"tensor 'w' of the unknown type {kind}"):
        check_references(as_initializer(tensor).SerializeToString(), "engine.onnx", FILE_BYTES)


def test_a_tensor_with_a_negative_size_is_refused() -> None:
    tensor = external(size=-1, length=-4)
    with pytest.raises(CorruptArtifactError, match=r"tensor 'w' of the shape \[-1\]"):
        check_references(as_initializer(tensor).SerializeToString(), "engine.onnx", FILE_BYTES)


def test_a_graph_for_training_is_refused() -> None:
    model = as_initializer(external())
    model.training_info.add().initialization.CopyFrom(as_initializer(external(location="secret")).graph)
    with pytest.raises(CorruptArtifactError, match=r"engine\.onnx is a graph for training"):
        check_references(model.SerializeToString(), "engine.onnx", FILE_BYTES)


def test_numbers_in_the_graph_are_no_reference() -> None:
    inside = numpy_helper.from_array(np.ones(16, np.float32), "w")
    check_references(as_initializer(inside).SerializeToString(), "engine.onnx", 0)


@pytest.mark.parametrize("graph", [b"no graph", b"\xff" * 40])
def test_what_is_no_graph_is_refused(graph: bytes) -> None:
    with pytest.raises(CorruptArtifactError, match="is not an ONNX graph"):
        check_references(graph, "engine.onnx", FILE_BYTES)


def test_every_graph_of_a_bundle_passes(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    for name, graph in bundle.graphs.items():
        check_references(graph, name, len(bundle.weights))
    full = bundle.manifest.full.graph
    with pytest.raises(CorruptArtifactError, match=f"{full} takes .* which has {len(bundle.weights) - 8}"):
        check_references(bundle.graphs[full], full, len(bundle.weights) - 8)


@pytest.mark.rtx
def test_a_bundle_that_points_elsewhere_is_not_compiled(tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    full = onnx.load_model_from_string((bundle / "engines/full.onnx").read_bytes())
    for tensor in full.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "/etc/passwd" if entry.key == "location" else entry.value
    forge(bundle, "engines/full.onnx", full.SerializeToString())
    with pytest.raises(CorruptArtifactError, match=r"full\.onnx takes .*/etc/passwd"):
        compile_bundle(bundle, CompileOptions(target="tensorrt-rtx"), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.*")), "something was built"

"""Check the source of a graph's weights, because a library reads any file that the graph refers to.

`tensorrt_rtx` up to 1.6 also reads past the end of that file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from unetc.backend import WEIGHTS
from unetc.errors import CorruptArtifactError, MissingDependency

try:
    import onnx
    from onnx import helper
except ImportError as error:
    raise MissingDependency("compiling engines needs onnx, to check graphs first: pip install 'unetc[rtx]'") from error


def check_references(graph: bytes, name: str, weights_bytes: int) -> None:
    """Refuse a graph that refers to anything but parts of the weights file, each as long as its tensor.

    A graph for training is refused too: it has further graphs, which no engine needs.

    Args:
        graph: An ONNX graph.
        name: Its name in errors.
        weights_bytes: Length of the weights file.

    Raises:
        CorruptArtifactError: If the graph refers to anything else, or cannot be read.
    """
    for tensor, place in _references(graph, name):
        offset = place.get("offset", "0")
        begin = int(offset) if offset.isdecimal() else -1
        wanted = _bytes_of(tensor, name)
        inside = place.get("location") == WEIGHTS and 0 <= begin <= weights_bytes - wanted
        if not inside or place.get("length") != str(wanted):
            raise CorruptArtifactError(
                f"{name} takes {tensor.name!r} from {place}; expected {wanted} bytes inside of {WEIGHTS}, which has "
                f"{weights_bytes}. Build the bundle again."
            )


def _bytes_of(tensor: onnx.TensorProto, name: str) -> int:
    """Compute the length of a tensor from its shape and type."""
    try:
        element = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError as error:
        raise CorruptArtifactError(
            f"{name} has a tensor {tensor.name!r} of the unknown type {tensor.data_type}. Build the bundle again."
        ) from error
    if any(size < 0 for size in tensor.dims):
        raise CorruptArtifactError(
            f"{name} has a tensor {tensor.name!r} of the shape {list(tensor.dims)}. Build the bundle again."
        )
    length: int = math.prod(tensor.dims) * element
    return length


def _references(graph: bytes, name: str) -> list[tuple[onnx.TensorProto, dict[str, str]]]:
    """List the tensors that are stored in files, each with its place."""
    try:
        model = onnx.load_model_from_string(graph)
    except Exception as error:  # protobuf raises its own class
        raise CorruptArtifactError(f"{name} is not an ONNX graph: {error}. Build the bundle again.") from error
    if model.training_info:
        raise CorruptArtifactError(f"{name} is a graph for training. Build the bundle again.")
    lying = [tensor for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL]
    return [(tensor, {entry.key: entry.value for entry in tensor.external_data}) for tensor in lying]


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Find all tensors, in nested graphs too."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_attributes(function.attribute_proto)  # values that calls of the function may leave out
        yield from _of_nodes(function.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        yield from _of_attributes(node.attribute)


def _of_attributes(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _of_graph(graph)

"""A backend whose programs are other models of the same server, called inside of its Python backend.

Every call is a request of Triton's business logic scripting, so Triton batches the calls of loops that run at the same
time. The tensors of the loop are in the memory of the process. Triton moves them to the device of a model and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unetc.backend import Array, Loader, Program, SerialisedGraph
from unetc.device import HOST, Device
from unetc.errors import SessionError
from unetc.runtime.backends.registry import take_inputs

from .served_graph import ServedGraph

VERSION = 1
"""The only version of every model; the loop calls no other."""

Utilities = Any
"""The module `triton_python_backend_utils`, which exists only inside of Triton."""


class TritonProgram:
    """One graph, as a model of the server."""

    def __init__(self, graph: ServedGraph, utilities: Utilities) -> None:
        self._graph = graph
        self._utilities = utilities

    def __call__(self, inputs: Mapping[str, NDArray[Any]], output: Array) -> Mapping[str, NDArray[Any]]:
        """Run the model; more rows than it takes at once make several requests.

        Args:
            inputs: Arrays; those that the graph does not read are ignored.
            output: The array to write into, [row, ...].

        Returns:
            The further outputs by name.

        Raises:
            SessionError: If an input is missing, or the model fails.
        """
        given = take_inputs(inputs, self._graph.inputs)
        rows, most = len(output), self._graph.most_rows
        if most is None:
            return self._request(given, output)
        parts = [
            self._request({name: value[at : at + most] for name, value in given.items()}, output[at : at + most])
            for at in range(0, rows, most)
        ]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _request(self, inputs: Mapping[str, NDArray[Any]], output: Array) -> dict[str, NDArray[Any]]:
        """Make one request, and wait for its answer."""
        graph, utilities = self._graph, self._utilities
        request = utilities.InferenceRequest(
            model_name=graph.model,
            model_version=VERSION,
            requested_output_names=list(graph.outputs),
            inputs=[utilities.Tensor(name, self._shaped(value)) for name, value in inputs.items()],
            preferred_memory=utilities.PreferredMemory(utilities.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise SessionError(f"the model {graph.model} failed: {response.error().message()}. Triton's log says more.")
        first, *further = (utilities.get_output_tensor_by_name(response, name).as_numpy() for name in graph.outputs)
        output[:] = first
        # a copy, as the memory of a response is Triton's, and branches outlive many responses
        return {name: np.array(value) for name, value in zip(graph.outputs[1:], further, strict=True)}

    def _shaped(self, value: NDArray[Any]) -> NDArray[Any]:
        """Give a value per row the axis that Triton demands after the batch."""
        return value[:, None] if self._graph.most_rows is not None and value.ndim == 1 else value


class TritonBackend:
    """Finds the model of every graph; it holds no weights."""

    device: Device = HOST

    def __init__(self, utilities: Utilities) -> None:
        """Keep the module through which models are called."""
        self._utilities = utilities

    def open_weights(self, weights: bytes) -> Loader:
        """Ignore the weights, which the models have."""
        return self

    def load(self, graph: SerialisedGraph) -> Program:
        """Read the name of the model that runs a graph; nothing is called yet.

        Raises:
            CorruptArtifactError: If the bundle is not one that was exported for Triton.
        """
        return TritonProgram(ServedGraph.from_json(graph.graph, "a graph of the loop's bundle"), self._utilities)

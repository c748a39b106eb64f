"""GatedGraph: a gated denoiser as one ONNX graph over one weights file, stored in a folder.

Every engine of a bundle is specialised from this graph, so all engines read the same initializers from the same weights
file. It is a safetensors file, and the ONNX external-data records point into it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from unetc.artifacts.profile import Component
from unetc.artifacts.reading import sha256_of
from unetc.artifacts.record import Artifact, write_atomically
from unetc.artifacts.sizes import SampleSizes
from unetc.backend import WEIGHTS, SerialisedGraph
from unetc.compiler.whole_folder import written_whole
from unetc.errors import ArtifactError
from unetc.treatments import COMPUTED, HELD

from .gate import GATES, gates_of
from .nodes import add_integers, add_name, add_node, add_reshape, input_of, shape_of
from .weights import externalise, serialise

if TYPE_CHECKING:
    from .capture import Capture

HOLDS = "holds"
"""Input of a remembering graph, [batch, component]: 1 where the given tensor replaces the branch."""

BRANCH_MEANS = "branch_means"
"""Output of an observing graph."""

_GRAPH = "gated.onnx"
_RECORD = "gated.json"


class GatedRecord(Artifact, frozen=True, kw_only=True):
    """Metadata of the graph in the folder."""

    components: tuple[Component, ...]
    inputs: tuple[str, ...]
    sizes: SampleSizes
    graph_sha256: str
    weights_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedGraph:
    """A gated denoiser: the model, its components and the folder of its weights."""

    model: ir.Model
    components: tuple[Component, ...]
    inputs: tuple[str, ...]
    sizes: SampleSizes
    folder: Path
    """Folder of the weights file that the model's initializers point into."""
    held_weights: bytes | None = None
    """Content of the weights file of a graph that has travelled, which has no folder."""

    @property
    def weights(self) -> Path:
        """Path of the weights file."""
        return self.folder / WEIGHTS

    def read_weights(self) -> bytes:
        """Read the weights file."""
        return self.weights.read_bytes() if self.held_weights is None else self.held_weights

    def pack(self) -> PackedGraph:
        """Return the graph and its weights as plain values."""
        return PackedGraph(
            graph=ir.to_proto(self.model).SerializeToString(),
            components=self.components,
            inputs=self.inputs,
            sizes=self.sizes,
            weights=self.read_weights(),
        )

    @property
    def channels(self) -> int:
        """Total width of all components, which is the length of the means input."""
        return sum(component.channels for component in self.components)

    @property
    def predicted_channels(self) -> int:
        """Channels of the prediction: as many as a sample has, or more if the denoiser also predicts a variance."""
        return next(component.channels for component in self.components if component.kind == "step")

    def runnable(self) -> SerialisedGraph:
        """Serialise with the gates defined as a function, so that a runtime can run the graph at any gate values."""
        return serialise(self.model)

    def observing(self) -> SerialisedGraph:
        """Serialise a graph that outputs every branch's mean per channel, over batch and positions.

        The means replace the prediction: [channel of all components], in the order of the means input.
        """
        model = self.model.clone()
        gates = gates_of(model.graph)
        means = [_mean_of(model.graph, gates[component.index], component) for component in self.components]
        output = add_node(model.graph, "Concat", means, {"axis": 0})
        output.name, output.dtype, output.shape = BRANCH_MEANS, ir.DataType.FLOAT, ir.Shape([self.channels])
        model.graph.outputs[:] = [output]
        common.RemoveUnusedNodesPass()(model)
        return serialise(model)

    def remembering(self) -> SerialisedGraph:
        """Serialise `runnable` with every branch as an output, and with inputs that replace any branch.

        Each component adds an input `held.INDEX` and an output `computed.INDEX`; `HOLDS` is one more input.
        `computed.INDEX` is always the branch that the graph itself computes.
        """
        model = self.model.clone()
        rows, components, _ = shape_of(input_of(model.graph, GATES))
        holds = ir.val(HOLDS, dtype=ir.DataType.FLOAT, shape=ir.Shape([rows, components]))
        model.graph.inputs.append(holds)
        gates = gates_of(model.graph)
        for component in self.components:
            gate = gates[component.index]
            branch = gate.inputs[0]
            assert branch is not None
            held = ir.val(f"{HELD}{component.index}", type=branch.type, shape=branch.shape)
            model.graph.inputs.append(held)
            emit(model.graph, gate, component)
            gate.replace_input_with(0, _choose(model.graph, gate, component, holds, held))
        common.TopologicalSortPass()(model)
        return serialise(model)

    @classmethod
    def build(cls, capture: Capture, folder: Path) -> GatedGraph:
        """Export a capture to ONNX and save it in a folder, which appears complete or not at all.

        Raises:
            CompileError: If the export fails.
            ArtifactError: If the folder cannot be written.
        """
        from .export import export  # needs torch, which a machine that only measures does not have

        model = export(capture)
        with written_whole(folder, "gated graph") as temporary:
            externalise(model, temporary / WEIGHTS)
            graph = ir.to_proto(model).SerializeToString()
            (temporary / _GRAPH).write_bytes(graph)
            record = GatedRecord(
                components=capture.components,
                inputs=capture.inputs,
                sizes=capture.sizes,
                graph_sha256=hashlib.sha256(graph).hexdigest(),
                weights_sha256=sha256_of(temporary / WEIGHTS),
            )
            write_atomically(temporary / _RECORD, record.to_json())
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> GatedGraph:
        """Open a saved gated graph.

        Raises:
            ArtifactError: If a file is missing or was changed.
        """
        record = GatedRecord.load(folder / _RECORD)
        try:
            hashes = sha256_of(folder / _GRAPH), sha256_of(folder / WEIGHTS)
        except OSError as error:
            raise ArtifactError(
                f"cannot read the cached graph {folder}: {error.strerror}. Delete this folder; unetc builds it again."
            ) from error
        if hashes != (record.graph_sha256, record.weights_sha256):
            raise ArtifactError(f"the cached graph {folder} is damaged. Delete this folder; unetc builds it again.")
        model = ir.load(folder / _GRAPH)
        return cls(
            model=model,
            components=record.components,
            inputs=record.inputs,
            sizes=record.sizes,
            folder=folder,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedGraph:
    """A gated graph on its way to another machine."""

    graph: bytes
    components: tuple[Component, ...]
    inputs: tuple[str, ...]
    sizes: SampleSizes
    weights: bytes

    def unpack(self) -> GatedGraph:
        """Read the graph; nothing is written to a disk, because specialising a graph reads no weights."""
        return GatedGraph(
            model=ir.from_proto(onnx.ModelProto.FromString(self.graph)),
            components=self.components,
            inputs=self.inputs,
            sizes=self.sizes,
            folder=Path(),
            held_weights=self.weights,
        )


def emit(graph: ir.Graph, gate: ir.Node, component: Component) -> None:
    """Make the branch of a component an output of the graph."""
    branch = gate.inputs[0]
    assert branch is not None
    graph.outputs.append(add_name(graph, branch, f"{COMPUTED}{component.index}", like=branch))


def _choose(graph: ir.Graph, gate: ir.Node, component: Component, holds: ir.Value, held: ir.Value) -> ir.Value:
    """Choose between a gate's branch and the held tensor for each sample."""
    row = add_node(graph, "Gather", [holds, add_integers(graph, component.index)], {"axis": 1})
    chosen = add_node(graph, "Cast", [row], {"to": ir.DataType.BOOL})
    per_sample = add_reshape(graph, chosen, -1, *[1] * (component.rank - 1))
    return add_node(graph, "Where", [per_sample, held, gate.inputs[0]])


def _mean_of(graph: ir.Graph, gate: ir.Node, component: Component) -> ir.Value:
    """Add the mean of a gate's branch over all axes except the channels."""
    axes = add_integers(graph, *(i for i in range(component.rank) if i != component.axis))
    return add_node(graph, "ReduceMean", [gate.inputs[0], axes], {"keepdims": 0})


def open_or_build(folder: Path, capture: Callable[[], Capture]) -> GatedGraph:
    """Load the graph cached in a folder, or call `capture` and build it if it is missing or damaged."""
    try:
        return GatedGraph.load(folder)
    except ArtifactError:
        return GatedGraph.build(capture(), folder)

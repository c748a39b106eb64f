"""Trace a denoiser once, find its components and put a gate on each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from unetc.artifacts.call_input import SAMPLE
from unetc.artifacts.profile import Component
from unetc.artifacts.sizes import SampleSizes
from unetc.call import CallSignature
from unetc.compiler.graph.denoisers.denoiser import Denoiser, denoiser_of
from unetc.compiler.graph.denoisers.inputs import forms
from unetc.errors import ModelError

from .components import Site, discover
from .gate import GATES, MEANS
from .torch_gate import gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A traced denoiser with gates."""

    program: ExportedProgram
    components: tuple[Component, ...]
    inputs: tuple[str, ...]
    """Names of the denoiser's own inputs, in order."""
    sizes: SampleSizes
    """Heights and widths that the denoiser can take."""

    def reference(self) -> nn.Module:
        """Return the gated graph as a torch module called with (*inputs, gates, means)."""
        # ONNX graphs do not check the sizes that the trace assumed, so this module does not either. For example,
        # PixArt stores positions for its trained size and computes them at every other size.
        return self.program.module(check_guards=False)


def capture(model: nn.Module, *, controlnet: bool = False, calls: CallSignature | None = None) -> Capture:
    """Trace a denoiser and gate every component.

    Args:
        model: A denoiser from diffusers on the CPU; it is switched to evaluation mode.
        controlnet: Whether to add the ControlNet inputs to the graph.
        calls: The calls of a UNet; by default they follow from its configuration.

    Raises:
        ModelError: If the class is not supported, the trace fails, or no component is found.
    """
    denoiser = denoiser_of(model.eval().requires_grad_(False), controlnet=controlnet, calls=calls)
    names = tuple(item.name for item in denoiser.inputs)
    program, sizes = _export(denoiser)
    graph = program.graph_module.graph
    placeholders = dict(zip((*names, GATES, MEANS), _user_placeholders(program), strict=True))
    sites = discover(graph, placeholders[SAMPLE], root="model")
    if all(site.component.kind == "step" for site in sites):
        raise ModelError(
            f"no component found in {type(model).__name__}: no residual add and no skip connection depends on the "
            "sample. unetc works on UNet-like denoisers."
        )
    for site in sites:
        gated = _insert(graph, site, placeholders)
        if site.join.op == "output":
            program.graph_signature.replace_all_uses(site.branch.name, gated.name)
    _spell_out(graph)
    program.graph_module.recompile()
    return Capture(
        program=program,
        components=tuple(site.component for site in sites),
        inputs=names,
        sizes=sizes,
    )


def _export(denoiser: Denoiser) -> tuple[ExportedProgram, SampleSizes]:
    """Trace with dynamic batch, height and width, or with fixed sizes if the model does not allow dynamic ones."""
    gates: list[dict[int, object]] = [{0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC}]
    errors: list[Exception] = []
    for inputs in forms(denoiser.inputs):
        (sample,) = (item for item in inputs if item.name == SAMPLE)
        height, width = sample.example.shape[2:]
        sizes = denoiser.sizes if sample.dynamic else SampleSizes(multiple=1, only=(height, width))
        values = (*(item.example for item in inputs), torch.ones(2, 3, 2), torch.zeros(7))
        shapes: list[dict[int, object]] = [dict.fromkeys((0, *item.dynamic), Dim.DYNAMIC) for item in inputs]
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                return torch.export.export(denoiser, values, dynamic_shapes=((*shapes, *gates),)), sizes
        except Exception as error:  # torch.export raises many unrelated exception classes
            errors.append(error)
    reason = next(iter(str(errors[-1]).splitlines()), type(errors[-1]).__name__)
    raise ModelError(
        f"torch.export cannot trace {type(denoiser.model).__name__}: {reason}. "
        "Models with hooks, custom attention processors or data-dependent control flow cannot be captured."
    ) from errors[-1]


def _user_placeholders(program: ExportedProgram) -> list[fx.Node]:
    names = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _insert(graph: fx.Graph, site: Site, placeholders: Mapping[str, fx.Node]) -> fx.Node:
    """Replace the edge branch → join with branch → gate → join, and return the gate."""
    component = site.component
    with graph.inserting_before(site.join):
        node = graph.call_function(
            torch.ops.unetc.gate.default,
            (site.branch, placeholders[GATES], placeholders[MEANS], component.index, component.offset, component.axis),
        )
    node.meta = {key: site.branch.meta[key] for key in ("val", "nn_module_stack") if key in site.branch.meta}
    site.join.replace_input_with(site.branch, node)
    return node


def _spell_out(graph: fx.Graph) -> None:
    """Rewrite operations that onnxruntime 1.32 refuses: masks with one row for all queries, squeezes without effect."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if mask is not None and mask.meta["val"].shape[-2] == 1:
            _repeat_mask(graph, node, node.args[0], mask)
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.squeeze.dim):
        if node.meta["val"].ndim == node.args[0].meta["val"].ndim:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _repeat_mask(graph: fx.Graph, attention: fx.Node, query: fx.Node, mask: fx.Node) -> None:
    """Repeat a mask so that every query [batch, head, query, channel] has its own row."""
    with graph.inserting_before(attention):
        count = graph.call_function(torch.ops.aten.sym_size.int, (query, 2))
        repeated = graph.call_function(torch.ops.aten.expand.default, (mask, [-1, -1, count, -1]))
    queries = query.meta["val"].shape[2]
    count.meta = {**_origin(attention), "val": queries}
    repeated.meta = {**_origin(attention), "val": mask.meta["val"].expand(-1, -1, queries, -1)}
    attention.replace_input_with(mask, repeated)


def _origin(node: fx.Node) -> dict[str, Any]:
    return {"nn_module_stack": node.meta["nn_module_stack"]} if "nn_module_stack" in node.meta else {}


__all__ = ["Capture", "capture", "gate"]

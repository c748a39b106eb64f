"""Trace a denoiser once, find its components and put a gate on each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from unetc.artifacts.profile import Component
from unetc.errors import ModelError
from unetc.graph.components import Site, discover
from unetc.graph.gate import gate

SAMPLE, TIMESTEP, CONTEXT, GATES, MEANS, OUTPUT = (
    "sample",
    "timestep",
    "encoder_hidden_states",
    "gates",
    "means",
    "out_sample",
)
"""Input and output names of the graph; those of the denoiser follow diffusers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A traced denoiser with gates."""

    program: ExportedProgram
    components: tuple[Component, ...]
    inputs: tuple[str, ...]
    """Names of the denoiser's own inputs, in order."""
    dynamic_size: bool
    """Whether height and width may change."""

    def reference(self) -> nn.Module:
        """Return the gated graph as a torch module called with (*inputs, gates, means)."""
        return self.program.module()


class _Denoiser(nn.Module):
    """Give a diffusers UNet the signature of the gated graph: positional inputs, one tensor out."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, *values: Tensor) -> Tensor:
        named = dict(zip(self.inputs, values, strict=False))  # gates and means follow; the gates are put in later
        output: Tensor = self.model(**named, return_dict=False)[0]
        return output


def capture(model: nn.Module) -> Capture:
    """Trace a diffusers UNet and gate every component.

    Args:
        model: A `UNet2DModel` or `UNet2DConditionModel` on the CPU; switched to evaluation mode.

    Raises:
        ModelError: If the class is not supported, or the trace fails, or no component is found.
    """
    model = model.eval().requires_grad_(False)
    inputs = example_inputs(model)
    program, dynamic_size = _export(model, inputs)
    graph = program.graph_module.graph
    placeholders = dict(zip((*inputs, GATES, MEANS), _user_placeholders(program), strict=True))
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
    program.graph_module.recompile()
    return Capture(
        program=program,
        components=tuple(site.component for site in sites),
        inputs=tuple(inputs),
        dynamic_size=dynamic_size,
    )


def example_inputs(model: nn.Module) -> Mapping[str, Tensor]:
    """Make inputs that fit a denoiser: batch 2, height and width different where the model allows it.

    Raises:
        ModelError: If the class is not one this version captures.
    """
    supported = ("UNet2DModel", "UNet2DConditionModel")
    name = type(model).__name__
    if name not in supported:
        raise ModelError(f"cannot capture a denoiser of class {name}. Supported: {', '.join(supported)}.")
    config: Any = model.config
    size = config.sample_size if isinstance(config.sample_size, int) else (config.sample_size or (32,))[0]
    stride = 2 ** (len(config.block_out_channels) - 1)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        SAMPLE: torch.randn(2, config.in_channels, size, size + stride, generator=generator),
        TIMESTEP: torch.tensor([10.0, 500.0]),
    }
    if name == "UNet2DConditionModel":
        needed = ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
        if unsupported := [key for key in needed if getattr(config, key, None) is not None]:
            raise ModelError(
                f"cannot capture {name} with {', '.join(unsupported)}: this condition is not supported yet."
            )
        width = config.cross_attention_dim
        inputs[CONTEXT] = torch.randn(2, 5, width if isinstance(width, int) else width[0], generator=generator)
    return inputs


def _export(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[ExportedProgram, bool]:
    """Trace with dynamic batch, height and width; with fixed height and width if the model does not allow that."""
    values = (*inputs.values(), torch.ones(2, 3, 2), torch.zeros(7))
    dynamic = Dim.DYNAMIC
    batch = {0: dynamic}
    shapes: dict[str, dict[int, object]] = {name: dict(batch) for name in inputs}
    if CONTEXT in shapes:
        shapes[CONTEXT][1] = dynamic
    shapes |= {GATES: {0: dynamic, 1: dynamic}, MEANS: {0: dynamic}}
    errors: list[Exception] = []
    for size in ({2: dynamic, 3: dynamic}, {}):
        shapes[SAMPLE] = batch | size
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                traced = torch.export.export(
                    _Denoiser(model, tuple(inputs)), values, dynamic_shapes=(tuple(shapes.values()),)
                )
            return traced, bool(size)
        except Exception as error:  # torch.export raises many unrelated classes
            errors.append(error)
    reason = next(iter(str(errors[-1]).splitlines()), type(errors[-1]).__name__)
    raise ModelError(
        f"torch.export cannot trace {type(model).__name__}: {reason}. "
        "Models with hooks, custom attention processors or data-dependent control flow cannot be captured."
    ) from errors[-1]


def _user_placeholders(program: ExportedProgram) -> list[fx.Node]:
    names = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]


def _insert(graph: fx.Graph, site: Site, placeholders: Mapping[str, fx.Node]) -> fx.Node:
    """Replace the edge branch → join by branch → gate → join, and return the gate."""
    component = site.component
    with graph.inserting_before(site.join):
        node = graph.call_function(
            torch.ops.unetc.gate.default,
            (site.branch, placeholders[GATES], placeholders[MEANS], component.index, component.offset, component.axis),
        )
    node.meta = {key: site.branch.meta[key] for key in ("val", "nn_module_stack") if key in site.branch.meta}
    site.join.replace_input_with(site.branch, node)
    return node


__all__ = ["CONTEXT", "GATES", "MEANS", "OUTPUT", "SAMPLE", "TIMESTEP", "Capture", "capture", "example_inputs", "gate"]

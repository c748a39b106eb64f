"""A text encoder as an ONNX graph over a weights file: the tokens of one prompt in, their states out."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch

from unetc.errors import CompileError, brief
from unetc.models.text_graphs import TextPart
from unetc.runtime.text import TOKENS

from .export import quietly
from .gate import OPSET
from .weights import externalise

STATES, POOLED = "states", "pooled"
"""Names of the graph's outputs."""


def export_text(part: TextPart, weights: Path) -> bytes:
    """Export a text encoder.

    Args:
        part: The encoder.
        weights: Weights file to write.

    Returns:
        An ONNX graph that maps `input_ids`, [1, length], to `states`, [1, length, width], and to `pooled`, [1, width],
        if the part has it.

    Raises:
        CompileError: If the encoder cannot be exported.
        OSError: If the file cannot be written.
    """
    example = torch.full((1, part.length), part.padding, dtype=torch.int64)
    try:
        with quietly(), torch.no_grad():
            program = torch.onnx.export(
                part.module,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[TOKENS],
                output_names=[STATES] if part.pooled is None else [STATES, POOLED],
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise CompileError(f"a text encoder cannot be exported: {brief(error)}.") from error
    assert program is not None
    model = program.model
    common.ClearMetadataAndDocStringPass()(model)
    common.RemoveUnusedNodesPass()(model)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs):
        value.metadata_props.clear()
    model.producer_name, model.producer_version = "unetc", ""
    externalise(model, weights)
    graph: bytes = ir.to_proto(model).SerializeToString()
    return graph

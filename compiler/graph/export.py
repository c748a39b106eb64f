"""Export a capture to ONNX."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch

from unetc.artifacts.call_input import SAMPLE
from unetc.backend import DOMAIN
from unetc.errors import CompileError

from . import group_norm
from .capture import Capture
from .constants import as_in_torch
from .gate import GATES, MEANS, OPSET, OUTPUT, is_gate, onnx_function
from .nodes import input_of, shape_of
from .size_names import name_sizes
from .torch_gate import TRANSLATIONS


def export(capture: Capture) -> ir.Model:
    """Export a capture; gates stay opaque nodes.

    Raises:
        CompileError: If the export fails.
    """
    try:
        with quietly():
            program = torch.onnx.export(
                capture.program,
                dynamo=True,
                optimize=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[*capture.inputs, GATES, MEANS],
                output_names=[OUTPUT],
                custom_translation_table=TRANSLATIONS,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise CompileError(f"ONNX export failed: {str(error).splitlines()[0]}.") from error
    assert program is not None
    model = program.model
    gates = sum(1 for node in model.graph if is_gate(node))
    if gates != len(capture.components):
        raise CompileError(
            f"the exported graph has {gates} gates, expected {len(capture.components)}. Please report the model."
        )
    as_in_torch(model, capture.program.graph)
    common.ClearMetadataAndDocStringPass()(model)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs):
        value.metadata_props.clear()
    name_sizes(model.graph, SAMPLE)
    batch, _, height, width = shape_of(input_of(model.graph, SAMPLE))
    prediction = model.graph.outputs[0]
    prediction.shape = ir.Shape([batch, shape_of(prediction)[1], height, width])
    # the exporter assumes that gates and means may have any size
    input_of(model.graph, GATES).shape = ir.Shape([batch, len(capture.components), 2])
    input_of(model.graph, MEANS).shape = ir.Shape([sum(component.channels for component in capture.components)])
    model.functions.clear()
    function = onnx_function(OPSET)
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1
    group_norm.from_onnx(model)
    model.producer_name, model.producer_version = "unetc", ""
    return model


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the exporter's warnings about libraries that are not needed here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

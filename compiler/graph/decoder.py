"""The decoder of a latent model as one ONNX file: samples in, images out."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch.export import Dim

from unetc.artifacts.call_input import SAMPLE
from unetc.errors import CompileError
from unetc.models.latent_decoder import LatentDecoder

from . import group_norm
from .export import quietly
from .gate import OPSET
from .size_names import name_sizes

IMAGE = "image"
"""Name of the graph's output."""


def export_decoder(decoder: LatentDecoder) -> bytes:
    """Export the decoder of a latent model, including its weights.

    Args:
        decoder: A decoder on the CPU.

    Returns:
        An ONNX graph that maps `sample`, [batch, channel, height, width], to `image`, [batch, 3, pixel height, pixel
        width], mostly in -1 to 1.

    Raises:
        CompileError: If the decoder cannot be exported.
    """
    example = torch.randn(2, decoder.latents.channels, 8, 12, generator=torch.Generator().manual_seed(0))
    try:
        with quietly(), torch.no_grad():
            program = torch.onnx.export(
                decoder.eval(),
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[SAMPLE],
                output_names=[IMAGE],
                dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise CompileError(f"the decoder cannot be exported: {str(error).splitlines()[0]}.") from error
    assert program is not None
    common.ClearMetadataAndDocStringPass()(program.model)
    name_sizes(program.model.graph, SAMPLE)
    group_norm.from_onnx(program.model)
    graph: bytes = ir.to_proto(program.model).SerializeToString()
    return graph

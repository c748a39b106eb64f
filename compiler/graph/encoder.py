"""The encoder of a latent model as one ONNX file: images in, samples out."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch.export import Dim

from unetc.artifacts.call_input import SAMPLE
from unetc.errors import CompileError
from unetc.models.latent_encoder import LatentEncoder
from unetc.models.vae import CHANNELS
from unetc.runtime.encoder import IMAGE

from . import group_norm
from .export import quietly
from .gate import OPSET
from .size_names import name_sizes


def export_encoder(encoder: LatentEncoder) -> bytes:
    """Export the encoder of a latent model, including its weights.

    Args:
        encoder: An encoder on the CPU.

    Returns:
        An ONNX graph that maps `image`, [batch, 3, pixel height, pixel width] in -1 to 1, to `sample`, [batch, channel,
        height, width].

    Raises:
        CompileError: If the encoder cannot be exported, or makes latents of another size than the decoder takes.
    """
    pixels = encoder.latents.pixels
    shape = 2, CHANNELS, 8 * pixels, 12 * pixels
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        with quietly(), torch.no_grad():
            made = encoder.eval()(example)
            program = torch.onnx.export(
                encoder,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[IMAGE],
                output_names=[SAMPLE],
                dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},),
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise CompileError(f"the encoder cannot be exported: {str(error).splitlines()[0]}.") from error
    if made.shape != (2, encoder.latents.channels, 8, 12):
        raise CompileError(
            f"the encoder makes latents of shape {tuple(made.shape)} from images of shape {shape}. Expected "
            f"{(2, encoder.latents.channels, 8, 12)}, as the decoder takes them."
        )
    assert program is not None
    common.ClearMetadataAndDocStringPass()(program.model)
    group_norm.from_onnx(program.model)
    name_sizes(program.model.graph, IMAGE)
    graph: bytes = ir.to_proto(program.model).SerializeToString()
    return graph

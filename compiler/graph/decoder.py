"""The decoder of a latent model as one ONNX file: samples in, images out."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import Tensor, nn
from torch.export import Dim

from unetc.compiler.graph.denoisers.inputs import SAMPLE
from unetc.errors import CompileError

from .gated import OPSET, quietly
from .size_names import name_sizes

IMAGE = "image"
"""Name of the graph's output."""


class _Decoder(nn.Module):
    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        config = autoencoder.config
        self.scale = 1.0 / config.scaling_factor
        self.shift = getattr(config, "shift_factor", None) or 0.0

    def forward(self, sample: Tensor) -> Tensor:
        image: Tensor = self.autoencoder.decode(sample * self.scale + self.shift, return_dict=False)[0]
        return image


def export_decoder(autoencoder: nn.Module) -> bytes:
    """Export the decoder of a diffusers autoencoder, including its weights.

    Args:
        autoencoder: An `AutoencoderKL` on the CPU.

    Returns:
        An ONNX graph that maps `sample`, [batch, channel, height, width], to `image`, [batch, 3, pixel height, pixel
        width], mostly in -1 to 1.

    Raises:
        CompileError: If the decoder cannot be exported.
    """
    config: Any = autoencoder.config
    example = torch.randn(2, config.latent_channels, 8, 12, generator=torch.Generator().manual_seed(0))
    try:
        with quietly(), torch.no_grad():
            program = torch.onnx.export(
                _Decoder(autoencoder).eval(),
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
    graph: bytes = ir.to_proto(program.model).SerializeToString()
    return graph

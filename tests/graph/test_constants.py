"""Constants of an exported graph have the bits that torch computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from diffusers.models.embeddings import get_timestep_embedding

from unetc.compiler.graph.constants import as_in_torch


class Embedding(torch.nn.Module):
    """A timestep's embedding of 320 channels, as many as Stable Diffusion has."""

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Embed."""
        return get_timestep_embedding(timestep, 320, flip_sin_to_cos=True, downscale_freq_shift=0)


def exported() -> tuple[ir.Model, torch.fx.Graph]:
    """Export the embedding."""
    program = torch.export.export(Embedding(), (torch.tensor([999.0, 1.0]),))
    onnx = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False)
    assert onnx is not None
    return onnx.model, program.graph


def frequencies(model: ir.Model) -> np.ndarray:
    """Return the constant that has one value for each pair of channels."""
    (found,) = (
        value.const_value.numpy()
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.size == 160
    )
    return found


def test_frequencies_have_the_bits_of_torch() -> None:
    model, graph = exported()
    exponents = -torch.log(torch.tensor(10000.0)).item() * torch.arange(160, dtype=torch.float32) / 160
    assert not np.array_equal(frequencies(model).ravel(), torch.exp(exponents).numpy())  # the exporter folds by numpy
    as_in_torch(model, graph)
    assert np.array_equal(frequencies(model).ravel(), torch.exp(exponents).numpy())


def test_a_constant_of_another_value_or_shape_stays() -> None:
    for change in (lambda array: array + 1, lambda array: array[..., :1]):
        model, graph = exported()
        (value,) = (one for one in model.graph.initializers.values() if one.const_value.size == 160)  # type: ignore[union-attr]
        other = change(value.const_value.numpy())  # type: ignore[union-attr]
        value.const_value = ir.tensor(other, name=value.name)
        as_in_torch(model, graph)
        assert np.array_equal(value.const_value.numpy(), other)

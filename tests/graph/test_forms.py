"""Every form of norm and attention in graphs agrees with float64, on every CPU target."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

from tests.models import relative_error
from unetc.backend import Array, SerialisedGraph
from unetc.compiler.graph import group_norm
from unetc.compiler.graph.export import quietly
from unetc.compiler.graph.gate import OPSET
from unetc.compiler.graph.lowering import lower_graph
from unetc.precision import Precision
from unetc.runtime.backends.registry import open_backend
from unetc.tensors import save_tensors

CHANNELS, HEADS = 32, 4
TARGETS = ("onnxruntime:cpu", "torch:cpu")


class ChannelsLast(nn.Module):
    """Applies a norm of the last axis to channels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return result


class Attention(nn.Module):
    """Attends over all positions; the scores are `sharpness` times as large as in a usual layer."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        heads = x.flatten(2).unflatten(1, (HEADS, -1)).transpose(2, 3)
        attended = F.scaled_dot_product_attention(heads * self.sharpness, heads * self.sharpness, heads)
        return attended.transpose(2, 3).flatten(1, 2).reshape(x.shape)


def drawn_norm(norm: nn.Module) -> nn.Module:
    """Give a norm a scale and a bias other than one and zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return norm.eval()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: drawn_norm(nn.GroupNorm(8, CHANNELS)),
    "group of one channel": lambda: drawn_norm(nn.GroupNorm(CHANNELS, CHANNELS)),
    "one group": lambda: drawn_norm(nn.GroupNorm(1, CHANNELS)),
    "layer": lambda: ChannelsLast(drawn_norm(nn.LayerNorm(CHANNELS))),
    "root mean square": lambda: ChannelsLast(drawn_norm(nn.RMSNorm(CHANNELS, eps=1e-6))),
}


OPERATORS = {
    "group": "GroupNorm",
    "layer": "LayerNormalization",
    "root mean square": "RMSNormalization",
    "attention": "Attention",
}
ATTENTION = "attention"
SHARPNESS = 128.0
"""A power of two, so that products with it are exact."""
FORMS = {**NORMS, ATTENTION: lambda: Attention(SHARPNESS)}


@functools.cache
def exported(form: str) -> SerialisedGraph:
    """Export a form as the graphs of denoisers are."""
    module = FORMS[form]()
    with quietly():
        program = torch.onnx.export(
            module, (drawn(0),), dynamo=True, verbose=False, opset_version=OPSET, input_names=["x"], output_names=["y"]
        )
    assert program is not None
    group_norm.from_onnx(program.model)
    return SerialisedGraph(graph=ir.to_proto(program.model).SerializeToString(), weights=frozenset())


def drawn(mean: float) -> Tensor:
    """Draw an image with a standard deviation of one."""
    return mean + torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))


def error(form: str, x: Tensor, target: str, precision: Precision = Precision.FP32) -> float:
    """Compare a target with float64 in torch, on the same values."""
    graph = exported(form)
    if precision is not Precision.FP32:
        graph = lower_graph(graph, precision)
    with torch.no_grad():
        expected: Array = FORMS[form]().double()(x.double()).numpy()
    backend = open_backend(target, threads=1)
    output = backend.device.full(expected.shape, np.nan)
    backend.open_weights(save_tensors({})).load(graph)({"x": backend.device.put(x.numpy())}, output)
    return relative_error(backend.device.to_array(output), expected)


@pytest.mark.parametrize("form", OPERATORS)
def test_the_forms_are_those_of_denoisers(form: str) -> None:
    assert OPERATORS[form].encode() in exported(form).graph


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize(("mean", "bound"), [(0, 1e-6), (100, 1e-5), (1000, 1e-4), (10_000, 1e-3)])
def test_norms_keep_their_digits_far_from_zero(form: str, mean: float, bound: float, target: str) -> None:
    """Bounds grow with the mean, because float32 rounds the values in proportion to it."""
    assert error(form, drawn(mean), target) < bound


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_scores_of_attention_may_exceed_float16(precision: Precision, target: str) -> None:
    x = drawn(0).half().float()
    heads = x.flatten(2).unflatten(1, (HEADS, -1)).transpose(2, 3) * SHARPNESS
    assert (heads @ heads.transpose(2, 3)).max() > 2 * torch.finfo(torch.float16).max
    assert error(ATTENTION, x, target, precision) < (1e-4 if precision is Precision.FP32 else 2e-3)

"""Graphs of torch share weights, slice them once, and are compiled without a graph break."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import parser
from safetensors.torch import load
from torch._inductor.exc import InductorError

from tests.models import Tiny, relative_error, tiny_of
from unetc.compiler.graph.specialise import specialise
from unetc.errors import SessionError
from unetc.runtime.backends.torch import Compiled
from unetc.runtime.backends.torch_device import TorchProgram
from unetc.runtime.backends.torch_graph import Translation, translate
from unetc.treatments import Treatment

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(shared: Path) -> Tiny:
    return tiny_of("attention", shared)


def translation_of(tiny: Tiny, treatments: dict[str, Treatment], weights: dict[str, torch.Tensor]) -> Translation:
    graph = specialise(tiny.gated, treatments, np.zeros(tiny.gated.channels, dtype=np.float32))
    return translate(graph.graph, weights, CPU)


def test_engines_share_the_weights_and_narrowed_ones_fold_their_slices(tiny: Tiny) -> None:
    weights = load(tiny.gated.weights.read_bytes())
    skip = next(component.name for component in tiny.gated.components if component.kind == "skip")
    whole, narrowed = (translation_of(tiny, own, weights) for own in ({}, {skip: Treatment.DROP}))
    shared = {tensor.data_ptr() for tensor in weights.values()}
    own = [buffer for buffer in whole.module.buffers() if buffer.data_ptr() not in shared]
    assert sum(buffer.nbytes for buffer in own) < 0.02 * sum(tensor.nbytes for tensor in weights.values())
    sliced = [buffer for buffer in narrowed.module.buffers() if buffer.data_ptr() not in shared and buffer.dim() == 4]
    assert sliced
    assert all(buffer.is_contiguous() for buffer in sliced)
    assert len([*narrowed.module.buffers()]) <= len([*whole.module.buffers()]) + len(sliced) + 4
    assert not [
        node
        for node in narrowed.module.graph.nodes
        if node.target is torch.ops.aten.slice.Tensor and node.args[0].op == "get_attr"
    ]


def test_a_graph_has_no_tensor_of_sizes(tiny: Tiny) -> None:
    translation = translation_of(tiny, {}, load(tiny.gated.weights.read_bytes()))
    names = {node.name for node in translation.module.graph.nodes}
    assert not [name for name in names if name.startswith(("_stack", "full", "arange"))]


@pytest.mark.nightly
def test_a_graph_compiles_whole_for_any_size(tiny: Tiny) -> None:
    translation = translation_of(tiny, {}, load(tiny.gated.weights.read_bytes()))
    compiled = torch.compile(translation.module, fullgraph=True)
    for batch, height, width in ((2, 8, 8), (3, 12, 8), (4, 16, 20)):
        inputs = tiny.inputs(batch=batch, height=height, width=width)
        tensors = [torch.from_numpy(inputs[name]) for name in translation.inputs]
        with torch.no_grad():
            (expected,), (output,) = translation.module(*tensors), compiled(*tensors)
        assert relative_error(output.numpy(), expected.numpy()) < 1e-5


@pytest.mark.parametrize("treatment", [Treatment.DROP, Treatment.MEAN])
def test_a_narrowed_graph_is_followed_whole(tiny: Tiny, treatment: Treatment) -> None:
    """torch.compile traces sliced norms and convolutions; its slow compiler is not run."""
    skips = {component.name: treatment for component in tiny.gated.components if component.kind == "skip"}
    translation = translation_of(tiny, skips, load(tiny.gated.weights.read_bytes()))
    followed = torch.compile(translation.module, fullgraph=True, backend="eager")
    inputs = tiny.inputs(batch=2, height=16, width=16)
    tensors = [torch.from_numpy(inputs[name]) for name in translation.inputs]
    with torch.no_grad():
        (expected,), (output,) = translation.module(*tensors), followed(*tensors)
    assert torch.equal(output, expected)


def compiled_program(patch: pytest.MonkeyPatch, compiler: Callable[..., Any]) -> TorchProgram:
    """Make a small program that another compiler than torch's slow one compiles."""
    graph = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 23]>
        graph (float[b, 3, h, w] x) => (float[b, 3, h, w] y) { y = Sigmoid (x) }"""
    )
    translation = translate(graph.SerializeToString(), {}, CPU)
    patch.setattr(torch, "compile", compiler)
    return TorchProgram(Compiled(translation.module), translation.inputs, translation.outputs)


def test_where_no_compilation_takes_all_sizes_each_of_many_is_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch_compile = partial(torch.compile, backend="eager")

    def fails_at_any_size(module: Any, dynamic: bool | None = None, **options: Any) -> Any:
        def fail(*inputs: torch.Tensor) -> None:
            raise InductorError(RuntimeError("sizes"), None)  # type: ignore[no-untyped-call]

        return fail if dynamic is None else torch_compile(module, dynamic=dynamic, **options)

    program = compiled_program(monkeypatch, fails_at_any_size)
    limit = torch._dynamo.config.recompile_limit
    for batch in range(1, limit + 4):
        output = torch.empty(batch, 3, 4, 4)
        program({"x": torch.zeros(batch, 3, 4, 4)}, output)
        assert torch.equal(output, torch.full_like(output, 0.5))
    assert torch._dynamo.config.recompile_limit == limit
    assert "for each size separately" in caplog.text


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*inputs: torch.Tensor) -> None:
        raise AssertionError("no\nsuch loop")

    program = compiled_program(monkeypatch, lambda module, **options: fail)
    with pytest.raises(SessionError, match="torch failed: the compiler fails with AssertionError: no such loop"):
        program({"x": torch.zeros(1, 3, 4, 4)}, torch.empty(1, 3, 4, 4))

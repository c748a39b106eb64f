"""The form of a component says what its removal takes out of the graph."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.models import ARCHITECTURES, Tiny, daily, tiny_of
from unetc.backend import SerialisedGraph
from unetc.compiler.graph.forms import removals_of
from unetc.compiler.graph.specialise import specialise
from unetc.treatments import Treatment


@pytest.fixture(scope="module", params=daily(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest, shared: Path) -> Tiny:
    return tiny_of(request.param, shared)


@functools.cache
def engine_without(tiny: Tiny, *names: str) -> SerialisedGraph:
    none = np.zeros(tiny.gated.channels, np.float32)
    return specialise(tiny.gated, dict.fromkeys(names, Treatment.DROP), none)


def work(engine: SerialisedGraph) -> Counter[object]:
    """Count the layers of an engine by the shapes of their weights."""
    graph = onnx.load_model_from_string(engine.graph).graph
    shapes = {one.name: tuple(one.dims) for one in graph.initializer}
    return Counter(
        (node.op_type, tuple(shapes.get(name) for name in node.input))
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul", "Attention", "GroupNorm", "LayerNormalization")
    )


def test_weights_that_nothing_else_reads_are_found(tiny: Tiny) -> None:
    full = engine_without(tiny)
    removals = removals_of(tiny.gated, (4, 16, 16))
    for component in tiny.gated.components:
        freed = full.weights - engine_without(tiny, component.name).weights
        assert removals[component.name].weights & full.weights == freed, component.name


def test_components_of_one_form_take_the_same_layers_out(tiny: Tiny) -> None:
    full, removals = work(engine_without(tiny)), removals_of(tiny.gated, (4, 16, 16))
    found: dict[object, Counter[object]] = {}
    for component in tiny.gated.components:
        gone = full - work(engine_without(tiny, component.name))
        assert found.setdefault(removals[component.name].form, gone) == gone, component.name


def test_blocks_of_another_size_have_another_form(shared: Path) -> None:
    tiny = tiny_of("attention", shared)
    removals = removals_of(tiny.gated, (4, 16, 16))
    forms = {name: removal.form for name, removal in removals.items()}
    assert forms["up_blocks.0.resnets.0"] != forms["up_blocks.1.resnets.0"]
    assert forms["mid_block.resnets.0"] == forms["mid_block.resnets.1"]

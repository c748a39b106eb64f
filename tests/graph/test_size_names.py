"""Dynamic sizes of a graph have readable names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.models import Tiny, tiny_of
from unetc.compiler.engines import compile_full
from unetc.compiler.graph.specialise import specialise
from unetc.treatments import COMPUTED, HELD, Treatment


def sizes_of(values: object) -> dict[str, list[str | int]]:
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in values  # type: ignore[attr-defined]
    }


@pytest.fixture(scope="module", params=["attention", "cross-attention"])
def tiny(request: pytest.FixtureRequest, shared: Path) -> Tiny:
    return tiny_of(request.param, shared)


def test_inputs_and_the_prediction_are_named_after_the_sample(tiny: Tiny) -> None:
    graph = onnx.load_from_string(compile_full(tiny.gated).graph).graph
    inputs, outputs = sizes_of(graph.input), sizes_of(graph.output)
    (prediction,) = outputs.values()
    for sizes in (inputs["sample"], prediction):
        assert [sizes[axis] for axis in (0, 2, 3)] == ["batch", "height", "width"]
    assert inputs["timestep"] == ["batch"]
    if "encoder_hidden_states" in inputs:
        assert inputs["encoder_hidden_states"][:2] == ["batch", "tokens"]


def test_branches_are_arithmetic_over_these_names(tiny: Tiny) -> None:

    means = np.zeros(tiny.gated.channels, np.float32)
    name = tiny.names[0]
    graphs = (
        specialise(tiny.gated, {}, means, [name]).graph,
        specialise(tiny.gated, {name: Treatment.HOLD}, means).graph,
    )
    emitting, holding = (onnx.load_from_string(graph).graph for graph in graphs)
    index = tiny.gated.components[0].index
    assert sizes_of(emitting.output)[f"{COMPUTED}{index}"] == sizes_of(holding.input)[f"{HELD}{index}"]
    words = {
        word for size in sizes_of(holding.input)[f"{HELD}{index}"] if isinstance(size, str) for word in size.split()
    }
    assert not any(word.lstrip("(").startswith("s") and word[1:].isdigit() for word in words)

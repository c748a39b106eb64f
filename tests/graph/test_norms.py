"""Norms with the epsilon of their model, on values far from zero."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import numpy as np
import pytest
import torch

from tests.models import ARCHITECTURES, condition_well, relative_error
from unetc.backend import Array
from unetc.compiler.graph.capture import capture
from unetc.compiler.graph.denoisers.denoiser import denoiser_of
from unetc.compiler.graph.gate import GATES, MEANS, gate_values
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.specialise import specialise
from unetc.runtime.backends.registry import open_backend
from unetc.treatments import Treatment

diffusers: Any = untyped_diffusers

pytestmark = pytest.mark.nightly

KINDS = ("cross-attention", "attention")


@functools.cache
def model_with(kind: str, bias: float) -> Any:
    """Build a denoiser whose norms keep their epsilon, and whose first convolution adds a bias."""
    name, config = ARCHITECTURES[kind]
    model = getattr(diffusers, name)(**config)
    condition_well(model, seed=0, own_eps=True)
    model.conv_in.bias.data += bias
    return model.eval()


@functools.cache
def gated_of(kind: str, bias: float, folder: Path) -> GatedGraph:
    return GatedGraph.build(capture(model_with(kind, bias)), folder / f"{kind}-{bias:g}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("norms")


def inputs_of(kind: str) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for item in denoiser_of(model_with(kind, 0)).inputs:
        shape = (2, item.example.shape[1], 16, 16) if item.name == "sample" else item.example.shape
        inputs[item.name] = rng.standard_normal(shape).astype(np.float32)
    return inputs | {"timestep": np.array([20.0, 700.0], np.float32)}


@torch.no_grad()
def exact(kind: str, bias: float) -> Array:
    """Run diffusers' denoiser in float64."""
    model = copy.deepcopy(model_with(kind, bias)).double()
    inputs = {name: torch.from_numpy(value).double() for name, value in inputs_of(kind).items()}
    output: Array = model(**inputs).sample.numpy()
    return output


def error_of(kind: str, bias: float, target: str, folder: Path) -> float:
    """Compare the full engine on a target with float64."""
    gated, expected = gated_of(kind, bias, folder), exact(kind, bias)
    engine = specialise(gated, {}, np.zeros(gated.channels, np.float32))
    backend = open_backend(target, threads=1)
    program = backend.open_weights(gated.weights.read_bytes()).load(engine)
    output = backend.device.empty(expected.shape)
    program({name: backend.device.put(value) for name, value in inputs_of(kind).items()}, output)
    return relative_error(backend.device.to_array(output), expected)


@pytest.mark.parametrize("target", ["onnxruntime:cpu", "torch:cpu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bias", "bound"), [(0, 3e-6), (100, 2e-5), (1000, 2e-4), (10_000, 5e-4)])
def test_norms_far_from_zero_are_right(kind: str, bias: float, bound: float, target: str, folder: Path) -> None:
    assert error_of(kind, bias, target, folder) < bound


@pytest.mark.parametrize("kind", KINDS)
def test_the_law_holds_at_the_models_own_epsilon(kind: str, folder: Path) -> None:
    """Remove each residual branch alone: no group of channels becomes constant, so that a small epsilon is harmless."""
    gated = gated_of(kind, 0, folder)
    loader = open_backend("onnxruntime:cpu", threads=1).open_weights(gated.weights.read_bytes())
    measured = loader.load(gated.runnable())
    inputs, means = inputs_of(kind), np.random.default_rng(1).standard_normal(gated.channels, dtype=np.float32)
    shape = exact(kind, 0).shape
    for number, component in enumerate(own for own in gated.components if own.kind == "residual"):
        treatments = {component.name: (Treatment.DROP, Treatment.MEAN)[number % 2]}
        expected, actual = (np.full(shape, np.nan, np.float32) for _ in range(2))
        gates = np.stack([gate_values(gated.components, treatments)] * 2)
        measured({**inputs, GATES: gates, MEANS: means}, expected)
        loader.load(specialise(gated, treatments, means))(inputs, actual)
        assert relative_error(actual, expected) < 1e-5, treatments

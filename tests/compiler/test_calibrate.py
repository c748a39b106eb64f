"""What is looked at to find what float16 cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import unetc
from unetc.backend import WEIGHTS
from unetc.compiler.tensorrt.calibrate import overflowing_values, trajectory
from unetc.progress import ignore
from unetc.runtime.bundle import Bundle
from unetc.sampler.noise import initial_noise
from unetc.treatments import HELD


def test_probes_are_what_the_full_model_sees_while_it_samples(tiny_bundle: Path) -> None:
    bundle, session = Bundle.open(tiny_bundle), unetc.load(tiny_bundle)
    probes = trajectory(bundle)
    steps = len(probes)
    table = bundle.scheduler.table(steps)
    assert list(probes) == table.timesteps.tolist()
    noise = initial_noise(0, range(2), bundle.manifest.sample_shape)
    seen = [noise * np.float32(table.initial_scale)]
    session.sample(noise=noise, seed=0, steps=steps, full_model=True, on_step=lambda step: seen.append(step.sample))
    for (timestep, probe), sample, scale in zip(probes.items(), seen[:-1], table.input_scale, strict=True):
        np.testing.assert_array_equal(probe["sample"], sample * np.float32(scale))
        np.testing.assert_array_equal(probe["timestep"], np.float32(timestep))


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture
def path_of(bundle: Bundle, tmp_path: Path) -> Callable[[str], Path]:
    """Write graphs beside their weights; in those of controls one value more is computed, of 10⁹ times the sample."""
    manifest = bundle.manifest
    known = {engine.graph for engine in (manifest.full, *manifest.engines)}
    (tmp_path / WEIGHTS).write_bytes(bundle.weights)

    def write(graph: str) -> Path:
        model = onnx.load_model_from_string(bundle.graphs[graph])
        if graph not in known:
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1e9), "factor"))
            model.graph.node.append(onnx.helper.make_node("Mul", ["sample", "factor"], ["only in controls"]))
        path = tmp_path / graph.replace("/", ".")
        path.write_bytes(model.SerializeToString())
        return path

    return write


def test_values_of_all_engines_are_looked_at(
    bundle: Bundle, path_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert overflowing_values(bundle, path_of, ignore) == set()  # a trained model stays far below the limit
    monkeypatch.setattr("unetc.compiler.graph.overflow.LIMIT", 0.0)
    every = overflowing_values(bundle, path_of, ignore)
    engines = (bundle.manifest.full, *bundle.manifest.engines)
    names = {name for engine in engines for name in layers_of(bundle.graphs[engine.graph])}
    assert names
    assert names <= every


def test_engines_of_controls_are_looked_at_if_asked_for(bundle: Bundle, path_of: Callable[[str], Path]) -> None:
    read = {value.name for e in bundle.manifest.all_engines() for value in graph_of(bundle, e.graph).input}
    assert any(name.startswith(HELD) for name in read), "no control holds anything, so this test misses half"
    assert overflowing_values(bundle, path_of, ignore, controls=True) == {"only in controls"}


def graph_of(bundle: Bundle, path: str) -> onnx.GraphProto:
    return onnx.load_model_from_string(bundle.graphs[path]).graph


def layers_of(graph: bytes) -> list[str]:
    """List outputs of a graph's nodes that are never all zero."""
    nodes = onnx.load_model_from_string(graph).graph.node
    return [node.output[0] for node in nodes if node.op_type in ("Conv", "GroupNormalization", "MatMul")]

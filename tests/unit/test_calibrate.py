"""What is looked at to find what float16 cannot hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import unetc
from unetc.backend import WEIGHTS
from unetc.progress import ignore
from unetc.runtime.bundle import Bundle
from unetc.solver.noise import initial_noise
from unetc.workflow.calibrate import overflowing_values, trajectory


def test_probes_are_what_the_full_model_sees_while_it_samples(tiny_bundle: Path) -> None:
    bundle, session = Bundle.open(tiny_bundle), unetc.load(tiny_bundle)
    probes = trajectory(bundle)
    steps = len(probes)
    table = bundle.solver.table(steps)
    assert list(probes) == table.timesteps.tolist()
    noise = initial_noise(0, range(2), bundle.manifest.sample_shape)
    seen = [noise * np.float32(table.initial_scale)]
    session.sample(noise=noise, seed=0, steps=steps, lossless=True, on_step=lambda step: seen.append(step.sample))
    for (timestep, probe), sample, scale in zip(probes.items(), seen[:-1], table.input_scale, strict=True):
        np.testing.assert_array_equal(probe["sample"], sample * np.float32(scale))
        np.testing.assert_array_equal(probe["timestep"], np.float32(timestep))


def test_values_of_all_engines_are_looked_at(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)
    (tmp_path / WEIGHTS).write_bytes(bundle.weights)

    def path_of(graph: str) -> Path:
        path = tmp_path / graph.replace("/", ".")
        path.write_bytes(bundle.graphs[graph])
        return path

    assert overflowing_values(bundle, path_of, ignore) == set()  # a trained model stays far below the limit
    monkeypatch.setattr("unetc.compiler.overflow.LIMIT", 0.0)
    every = overflowing_values(bundle, path_of, ignore)
    engines = (bundle.manifest.full, *bundle.manifest.engines)
    names = {name for engine in engines for name in layers_of(bundle.graphs[engine.graph])}
    assert names
    assert names <= every


def layers_of(graph: bytes) -> list[str]:
    """List outputs of a graph's nodes that are never all zero."""
    nodes = onnx.load_model_from_string(graph).graph.node
    return [node.output[0] for node in nodes if node.op_type in ("Conv", "GroupNormalization", "MatMul")]

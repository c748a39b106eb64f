"""All engines of a bundle are searched for values that float16 cannot hold, without the libraries of capturing."""

from __future__ import annotations

import subprocess
import sys
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
    """Write graphs into the folder of their weights; graphs of controls also compute the sample times 10⁹."""
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


@pytest.mark.nightly
def test_engines_of_controls_are_looked_at_if_asked_for(bundle: Bundle, path_of: Callable[[str], Path]) -> None:
    read = {value.name for e in bundle.manifest.all_engines() for value in graph_of(bundle, e.graph).input}
    assert any(name.startswith(HELD) for name in read), "no control holds anything, so this test misses half"
    assert overflowing_values(bundle, path_of, ignore, controls=True) == {"only in controls"}


SEARCH = """
import sys
from pathlib import Path

blocked = {"diffusers", "onnxscript", "scipy", "torch", "transformers", "triton"}
sys.modules |= dict.fromkeys(blocked)  # Python then takes them for missing

from unetc.compiler.tensorrt import compile_bundle
from unetc.compiler.tensorrt.calibrate import overflowing_values
from unetc.compiler.tensorrt.private_folder import lower_inside
from unetc.compiler.tensorrt.references import check_references
from unetc.precision import Precision
from unetc.progress import ignore
from unetc.runtime.bundle import Bundle

bundle, folder = Bundle.open(Path(sys.argv[1])), Path(sys.argv[2])
full = bundle.manifest.full.graph
check_references(bundle.graphs[full], full, len(bundle.weights))
wide = overflowing_values(bundle, lambda graph: folder / graph.replace("/", "."), ignore)
lower_inside(folder, [full.replace("/", ".")], Precision.FP16, wide)
"""


def test_compiling_needs_neither_torch_nor_diffusers(
    bundle: Bundle, tiny_bundle: Path, path_of: Callable[[str], Path], tmp_path: Path
) -> None:
    for graph in bundle.graphs:
        path_of(graph)
    command = [sys.executable, "-c", SEARCH, str(tiny_bundle), str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert list((tmp_path / "fp16").glob("*.onnx"))


def graph_of(bundle: Bundle, path: str) -> onnx.GraphProto:
    return onnx.load_model_from_string(bundle.graphs[path]).graph


def layers_of(graph: bytes) -> list[str]:
    """List outputs of a graph's nodes that are never all zero."""
    nodes = onnx.load_model_from_string(graph).graph.node
    return [node.output[0] for node in nodes if node.op_type in ("Conv", "GroupNormalization", "MatMul")]

"""One suite for all backends: engines compute the same as the gated graph, alone, in turns, and while sampling.

The gated graph runs in onnxruntime, which test_law compares with torch and torch with diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unetc
from tests.graph.test_law_of_reuse import Reference, inputs_at
from tests.models import ARCHITECTURES, TRANSFORMERS, Reuse, Tiny, daily, relative_error, tiny_of
from tests.stand_ins import tensorrt_on_cpu
from tests.stand_ins.tensorrt_on_cpu import CpuTensorRt
from unetc.analyzer.denoiser import GatedDenoiser
from unetc.backend import Array, Backend, Program, SerialisedGraph
from unetc.compiler.graph.gate import GATES, MEANS, gate_values
from unetc.compiler.graph.gated import HOLDS
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.tensorrt.on_demand import OnDemand
from unetc.device import Tensor
from unetc.environment import cache_folder
from unetc.errors import MissingDependency, SessionError
from unetc.nvidia.cache import EngineCache
from unetc.nvidia.sizes import Range, Sizes
from unetc.precision import Precision
from unetc.progress import ignore
from unetc.runtime.backends.registry import Memory, open_backend
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session
from unetc.sampler.noise import initial_noise
from unetc.treatments import Treatment

DROP, MEAN, HOLD, FORECAST = Treatment.DROP, Treatment.MEAN, Treatment.HOLD, Treatment.FORECAST


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a target may be from onnxruntime on the CPU."""

    prediction: float
    """Relative to the largest number. Kernels sum in different orders, in about forty layers; see test_law."""
    sample: float
    """Absolute, of samples in -1 to 1. Differences of predictions pass through the following steps."""


EXACT = Tolerance(prediction=1e-4, sample=1e-3)
ROUNDED = {
    Precision.FP32: Tolerance(prediction=1e-2, sample=1e-2),
    Precision.FP16: Tolerance(prediction=1e-2, sample=1e-2),
    Precision.BF16: Tolerance(prediction=8e-2, sample=8e-2),
}
"""Tolerances of targets that round their factors, by precision: about four times the measured error on the CPU.

On a GPU convolutions in float32 are in TF32, which has 10 bits as float16 has: 1e-3 of a prediction and 2e-3 of a
sample with TF32 emulated, 2e-3 and 3e-3 in float16. bfloat16 has 7 bits: 2e-2 of both. An engine that reuses changes
samples by 0.2, so a wrong computation is noticed.
"""


def tolerance_of(target: str) -> Tolerance:
    precision = Precision.of_target(target)
    return EXACT if precision is Precision.FP32 and not on_gpu(target) else ROUNDED[precision]


GPU, WITHOUT_GPU = pytest.mark.gpu, pytest.mark.without_gpu
TARGETS = [
    pytest.param(("onnxruntime:cpu", Memory.FAST), id="onnxruntime:cpu"),
    pytest.param(("onnxruntime:cpu", Memory.LOW), id="onnxruntime:cpu-low", marks=pytest.mark.nightly),
    pytest.param(("torch:cpu", Memory.FAST), id="torch:cpu"),
    pytest.param(("torch:cpu:fp16", Memory.FAST), id="torch:cpu:fp16", marks=pytest.mark.nightly),
    pytest.param(("torch:cpu:bf16", Memory.FAST), id="torch:cpu:bf16", marks=pytest.mark.nightly),
    pytest.param(("torch:cpu:compiled", Memory.FAST), id="torch:cpu:compiled", marks=pytest.mark.nightly),
    pytest.param((tensorrt_on_cpu.NAME, Memory.FAST), id="tensorrt-on-cpu", marks=WITHOUT_GPU),
    pytest.param(
        (tensorrt_on_cpu.NAME, Memory.LOW), id="tensorrt-on-cpu-low", marks=[WITHOUT_GPU, pytest.mark.nightly]
    ),
    pytest.param(("torch:cuda", Memory.FAST), id="torch:cuda", marks=GPU),
    pytest.param(("torch:cuda:fp16", Memory.FAST), id="torch:cuda:fp16", marks=[GPU, pytest.mark.nightly]),
    pytest.param(("torch:cuda:bf16", Memory.FAST), id="torch:cuda:bf16", marks=[GPU, pytest.mark.nightly]),
    pytest.param(("torch:cuda:compiled", Memory.FAST), id="torch:cuda:compiled", marks=[GPU, pytest.mark.nightly]),
    pytest.param(("onnxruntime:cuda", Memory.FAST), id="onnxruntime:cuda", marks=GPU),
    pytest.param(("onnxruntime:cuda:fp16", Memory.FAST), id="onnxruntime:cuda:fp16", marks=[GPU, pytest.mark.nightly]),
    pytest.param(("onnxruntime:tensorrt", Memory.FAST), id="onnxruntime:tensorrt", marks=[GPU, pytest.mark.nightly]),
    pytest.param(("tensorrt", Memory.FAST), id="tensorrt", marks=[GPU, pytest.mark.nightly]),
    pytest.param(("tensorrt-rtx", Memory.FAST), id="tensorrt-rtx", marks=[GPU, pytest.mark.nightly]),
    pytest.param(("tensorrt-rtx", Memory.LOW), id="tensorrt-rtx-low", marks=[GPU, pytest.mark.nightly]),
    pytest.param(("tensorrt-rtx:fp16", Memory.FAST), id="tensorrt-rtx:fp16", marks=[GPU, pytest.mark.nightly]),
]


def on_gpu(target: str) -> bool:
    return "cpu" not in target.split(":")


class Target:
    """A backend by its name, with the ranges of the calls that it gets in this file."""

    def __init__(self, name: str, memory: Memory) -> None:
        self.name = name
        self._memory = memory
        self._backend = None if name == tensorrt_on_cpu.NAME else open_backend(name, threads=1, memory=memory)
        self.tolerance = tolerance_of(name)

    def backend(self, tiny: Tiny | None = None) -> Backend:
        """Open the target for a model, or for bundles of the tiny one."""
        least, most = (16, 32) if tiny is None else (min(sides(tiny)), max(sides(tiny)))
        side = Range(least=least, usual=least, most=most)
        rows = {} if tiny is None else tiny.inputs(batch=1, height=most, width=most)
        calls = MeasuredCalls(
            sizes=Sizes(batch=Range(least=1, usual=2, most=4), height=side, width=side),
            rows={name: array.shape[1:] for name, array in rows.items() if name not in ("sample", "timestep")},
        )
        if self._backend is None:
            return CpuTensorRt(tensorrt_on_cpu.LIBRARY, self._memory, calls, EngineCache.inside(cache_folder()))
        return self._backend.prepared_by(OnDemand(calls, frozenset, ignore))


class Runner:
    """Runs graphs of one model on one backend."""

    def __init__(self, tiny: Tiny, target: Target) -> None:
        self.tiny = tiny
        backend = target.backend(tiny)
        self.device = backend.device
        self.agrees = target.tolerance.prediction
        self._loader = backend.open_weights(tiny.gated.weights.read_bytes())

    def load(self, graph: SerialisedGraph) -> Program:
        return self._loader.load(graph)

    def run(self, program: Program, inputs: Mapping[str, Tensor]) -> tuple[Array, Mapping[str, Tensor]]:
        """Run with arrays or outputs of programs; elements that are not written stay NaN."""
        batch, _, height, width = inputs["sample"].shape
        output = self.device.full((batch, self.tiny.gated.predicted_channels, height, width), np.nan)
        put = {name: self.device.put(v) if isinstance(v, np.ndarray) else v for name, v in inputs.items()}
        emitted = program(put, output)
        return self.device.to_array(output), emitted


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    name, memory = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNETC_CACHE", str(tmp_path_factory.mktemp("cache")))  # where engines are built ahead
        if name == tensorrt_on_cpu.NAME:
            tensorrt_on_cpu.without_streams(patch)
        try:
            target = Target(name, memory)
        except (SessionError, MissingDependency) as error:
            if not on_gpu(name) or (name.startswith("torch:") and torch.cuda.is_available()):
                raise
            pytest.skip(str(error))
        yield target


@pytest.fixture(scope="module", params=daily([*ARCHITECTURES, *TRANSFORMERS]))
def tiny(request: pytest.FixtureRequest, shared: Path) -> Tiny:
    return tiny_of(request.param, shared)


@pytest.fixture(scope="module")
def reuse(shared: Path) -> Reuse:
    tiny = tiny_of("attention", shared)
    level = next(component.name for component in tiny.gated.components if component.kind == "level")
    return Reuse(tiny, {level: HOLD}, {name: FORECAST for name in tiny.names if name.endswith("resnets.0")})


@pytest.fixture
def runner(tiny: Tiny, target: Target) -> Runner:
    return Runner(tiny, target)


def sizes(tiny: Tiny) -> list[tuple[int, int, int]]:
    """List batches, heights and widths that a model takes."""
    if tiny.gated.sizes.only is None:
        return [(1, 2 * tiny.stride, 2 * tiny.stride), (3, 4 * tiny.stride, 3 * tiny.stride)]
    return [(1, 8, 8), (3, 8, 8)]


def sides(tiny: Tiny) -> set[int]:
    """List the heights and widths that a model takes."""
    return {side for _, *both in sizes(tiny) for side in both}


def means_of(tiny: Tiny) -> Array:
    return 0.5 * np.random.default_rng(0).standard_normal(tiny.gated.channels, dtype=np.float32)


def drawn(tiny: Tiny, seed: int, *treatments: Treatment) -> dict[str, Treatment]:
    """Draw an assignment that keeps about two thirds of the components."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(-2 * len(treatments), len(treatments), len(tiny.names))
    return {name: treatments[i] for name, i in zip(tiny.names, chosen, strict=True) if i >= 0}


def test_an_engine_computes_what_the_gated_graph_computes(runner: Runner) -> None:
    tiny, means = runner.tiny, means_of(runner.tiny)
    for seed in range(4):
        assignment = drawn(tiny, seed, DROP, MEAN) if seed else {}
        program = runner.load(specialise(tiny.gated, assignment, means))
        for batch, height, width in sizes(tiny):
            inputs = tiny.inputs(batch=batch, height=height, width=width, seed=seed)
            gates = np.repeat(gate_values(tiny.gated.components, assignment)[None], batch, axis=0)
            expected = tiny.run(tiny.program, {**inputs, GATES: gates, MEANS: means})
            assert relative_error(runner.run(program, inputs)[0], expected) < runner.agrees, assignment


def test_engines_in_turns_compute_what_the_gated_graph_computes(runner: Runner) -> None:
    tiny, means = runner.tiny, means_of(runner.tiny)
    assignments = [{}, drawn(tiny, 1, HOLD), drawn(tiny, 2, DROP, HOLD, FORECAST), drawn(tiny, 3, FORECAST)]
    engines = [
        runner.load(specialise(tiny.gated, engine.treatments, means, engine.emits))
        for engine in with_emissions(assignments, tiny.gated.components)
    ]
    reference, branches = Reference(tiny, means), BranchCache(device=runner.device)
    for step, engine in enumerate((0, 1, 2, 0, 3, 1, 3, 2)):
        inputs, timestep = inputs_at(tiny, step, sizes(tiny)[1])
        expected = reference.step(assignments[engine], inputs, timestep)
        output, emitted = runner.run(
            engines[engine], {**inputs, **branches.inputs(timestep, rows=len(inputs["timestep"]))}
        )
        branches.store(emitted, timestep)
        assert relative_error(output, expected) < 2 * runner.agrees, f"step {step}"


def test_what_is_emitted_is_not_overwritten(runner: Runner) -> None:
    tiny = runner.tiny
    program = runner.load(specialise(tiny.gated, {}, means_of(tiny), tiny.names))
    size = sizes(tiny)[1]
    _, first = runner.run(program, inputs_at(tiny, 0, size)[0])
    before = {name: runner.device.to_array(value) for name, value in first.items()}
    _, second = runner.run(program, inputs_at(tiny, 1, size)[0])
    assert len(before) == len(tiny.names)
    for name, value in before.items():
        np.testing.assert_array_equal(runner.device.to_array(first[name]), value)
        assert np.abs(runner.device.to_array(second[name]) - value).max() > 0


def test_the_analysis_sees_the_same_on_every_backend(tiny: Tiny, target: Target) -> None:
    own = GatedDenoiser(tiny.gated, target.backend(tiny))
    reference = GatedDenoiser(tiny.gated, open_backend("onnxruntime:cpu", threads=1))
    batch, height, width = sizes(tiny)[1]
    sample = tiny.inputs(batch=batch, height=height, width=width)["sample"]
    if {*tiny.gated.inputs} != {"sample", "timestep"}:
        pytest.skip("GatedDenoiser is given conditions where a model takes some; the engines above are, too")
    means = reference.branch_means(sample, 500.0)
    assert relative_error(own.branch_means(sample, 500.0), means) < target.tolerance.prediction
    gates = np.stack([gate_values(tiny.gated.components, drawn(tiny, seed, DROP, MEAN)) for seed in range(batch)])
    predicted = own.predict(sample, 500.0, gates=gates, means=means)
    expected = reference.predict(sample, 500.0, gates=gates, means=means)
    assert relative_error(predicted, expected) < target.tolerance.prediction
    holds = np.random.default_rng(0).integers(0, 2, (batch, len(tiny.names))).astype(np.float32)
    recalled = []
    for denoiser in (own, reference):
        branches = BranchCache()
        for timestep in (900.0, 700.0):
            denoiser.compute_branches(sample * np.float32(timestep / 1000), timestep, branches, log_snr=0.0)
        reused = {index: (FORECAST, HOLD)[index % 2] for index in range(len(tiny.names))}
        recalled.append(denoiser.recall(sample, 500.0, branches, log_snr=0.0, treatments=reused, holds=holds))
    assert relative_error(*recalled) < 2 * target.tolerance.prediction
    assert HOLDS not in tiny.gated.inputs


def test_sampling_gives_the_same_images(target: Target, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    expected = Session.of(bundle, open_backend("onnxruntime:cpu", threads=1))
    session = Session.of(bundle, target.backend())
    noise = initial_noise(3, range(2), (1, 32, 24))
    options: list[dict[str, Any]] = [{"batch": 3, "steps": 20}, {"noise": noise, "steps": 7}, {"full_model": True}]
    for own in options:
        sample = session.sample(seed=1, **own)
        assert sample.dtype == np.float32
        np.testing.assert_allclose(sample, expected.sample(seed=1, **own), atol=target.tolerance.sample)
    assert session.non_finite_steps == 0


def test_sampling_with_reuse_gives_the_same_images(target: Target, reuse: Reuse, shared: Path) -> None:
    weights = tiny_of("attention", shared).gated.weights.read_bytes()

    def session(backend: Backend) -> Session:
        loader = backend.open_weights(weights)
        full, *programs = (loader.load(graph) for graph in (reuse.full, *reuse.graphs))
        return reuse.session(backend, full, programs, (0, 1, 0, 2))

    expected, own = (
        session(backend) for backend in (open_backend("onnxruntime:cpu", threads=1), target.backend(reuse.tiny))
    )
    used: list[int] = []
    sample = own.sample(3, seed=1, on_step=lambda step: used.append(step.engine))
    assert used == [0, 1, 0, 2, 0, 1, 0]
    np.testing.assert_allclose(sample, expected.sample(3, seed=1), atol=target.tolerance.sample)
    assert np.abs(sample - own.sample(3, seed=1, full_model=True)).max() > 2 * target.tolerance.sample
    serial = [own.sample(1 + seed % 3, seed=seed) for seed in range(6)]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(lambda seed: own.sample(1 + seed % 3, seed=seed), range(6)))
    for one, other in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_seed_gives_the_same_bits_again(target: Target, tiny_bundle: Path) -> None:
    session = Session.of(Bundle.open(tiny_bundle), target.backend())
    seen: list[Array] = []
    first = session.sample(2, seed=4, on_step=lambda step: seen.append(step.sample))
    np.testing.assert_array_equal(session.sample(2, seed=4), first)
    np.testing.assert_array_equal(seen[-1], first)
    assert len(seen) == session.steps


def test_wrong_inputs_are_errors_of_unetc(target: Target, tiny_bundle: Path) -> None:
    session = Session.of(Bundle.open(tiny_bundle), target.backend())
    with pytest.raises(SessionError):
        session.sample(noise=np.zeros((1, 1, 15, 15), np.float32))
    bundle = Bundle.open(tiny_bundle)
    backend = target.backend()
    program = backend.open_weights(bundle.weights).load(bundle.graph_of(bundle.manifest.full))
    device = backend.device
    with pytest.raises(SessionError, match="needs timestep"):
        program({"sample": device.full((1, 1, 16, 16), 0.0)}, device.empty((1, 1, 16, 16)))
    session.sample()


def test_a_bundle_samples_on_another_target_than_it_was_built_for(tiny_bundle: Path) -> None:
    np.testing.assert_allclose(
        unetc.load(tiny_bundle, target="torch:cpu").sample(seed=2),
        unetc.load(tiny_bundle).sample(seed=2),
        atol=EXACT.sample,
    )

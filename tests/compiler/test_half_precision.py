"""Graphs in half precision are made when a bundle is built for such a target, and loaded by torch and onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

import unetc
from tests.graph.test_law_of_reuse import Reference, inputs_at
from tests.models import Reuse, Tiny, relative_error, tiny_of
from tests.nvidia.test_cache import ORIGIN
from tests.tiny_build import once
from unetc.analyzer.verify import VerifyOptions, verify
from unetc.artifacts import Plan, Profile
from unetc.artifacts.manifest import Manifest
from unetc.backend import WEIGHTS, Array, Backend, SerialisedGraph
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.graph.lowering import lower_graph, lower_graphs
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.search.repair import RepairOptions
from unetc.compiler.tensorrt.on_demand import OnDemand
from unetc.conditions import UNCONDITIONAL
from unetc.errors import CorruptArtifactError, NonFiniteError, SessionError
from unetc.models.find import find_model
from unetc.nvidia.cache import EngineCache
from unetc.nvidia.library import LIBRARIES
from unetc.precision import LARGEST, Precision, rounded_from
from unetc.progress import ignore
from unetc.runtime.backends.onnxruntime import HandingLoader
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.backends.tensorrt import TensorRtBackend
from unetc.runtime.backends.torch import WeightsOnDevice
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session
from unetc.treatments import Treatment

HALF = (Precision.FP16, Precision.BF16)
AGREES = {Precision.FP16: 1e-2, Precision.BF16: 8e-2}
"""Tolerance relative to the largest number. One rounding changes a number by 5e-4 in float16 and by 4e-3 in bfloat16,
and about twenty follow each other. Engines that hold branches add the error of the previous step."""


def half(target: str, precision: Precision, calls: MeasuredCalls) -> Backend:
    """Open a target in half precision for graphs in float32."""
    backend = open_backend(f"{target}:{precision}", threads=1)
    assert backend.reads is precision
    return backend.prepared_by(OnDemand(calls, frozenset, ignore))


@pytest.fixture(scope="module")
def tiny(shared: Path) -> Tiny:
    return tiny_of("attention", shared)


@pytest.fixture(scope="module")
def reuse(tiny: Tiny) -> Reuse:
    level = next(component.name for component in tiny.gated.components if component.kind == "level")
    skip = next(component.name for component in tiny.gated.components if component.kind == "skip")
    forecast = {name: Treatment.FORECAST for name in tiny.names if name.endswith("resnets.0")}
    return Reuse(tiny, {level: Treatment.HOLD}, {**forecast, skip: Treatment.DROP})


@pytest.mark.parametrize("precision", HALF)
def test_engines_in_turns_compute_nearly_what_the_gated_graph_computes(
    tiny: Tiny, reuse: Reuse, precision: Precision
) -> None:
    backend = half("torch:cpu", precision, MeasuredCalls.of(Reuse.SHAPE, 3, 3, UNCONDITIONAL))
    loader, device = backend.open_weights(tiny.gated.weights.read_bytes()), backend.device
    programs = [loader.load(graph) for graph in reuse.graphs]
    reference, branches = Reference(tiny, np.zeros(tiny.gated.channels, np.float32)), BranchCache(device=device)
    for step, engine in enumerate((0, 1, 2, 0, 1, 1, 2)):
        inputs, timestep = inputs_at(tiny, step, (3, 16, 12))
        expected = reference.step(reuse.engines[engine].treatments, inputs, timestep)
        output = device.empty(expected.shape)
        given = {name: device.put(value) for name, value in inputs.items()}
        branches.store(programs[engine]({**given, **branches.inputs(timestep, rows=len(output))}, output), timestep)
        assert 0 < relative_error(device.to_array(output), expected) < AGREES[precision], f"step {step}"


def test_a_graph_lowered_alone_is_one_that_is_lowered_with_its_weights(
    tiny: Tiny, reuse: Reuse, tmp_path: Path
) -> None:
    """onnxruntime computes the same bits with weights rounded by the loader and with weights rounded in a file."""
    weights, inputs = tiny.gated.weights.read_bytes(), tiny.inputs(batch=2, height=8, width=8)
    (tmp_path / WEIGHTS).write_bytes(weights)
    (tmp_path / "full.onnx").write_bytes(reuse.full.graph)
    lower_graphs(tmp_path, ["full.onnx"], Precision.FP16, tmp_path / "fp16")
    written = (tmp_path / "fp16" / WEIGHTS).read_bytes()
    both = {
        HandingLoader(written, 1): SerialisedGraph(
            graph=(tmp_path / "fp16/full.onnx").read_bytes(), weights=frozenset(load(written))
        ),
        HandingLoader(weights, 1): lower_graph(reuse.full, Precision.FP16),
    }
    outputs = [np.empty_like(inputs["sample"]) for _ in both]
    for (loader, graph), output in zip(both.items(), outputs, strict=True):
        loader.load(graph)(inputs, output)
    np.testing.assert_array_equal(*outputs)
    assert all(
        name.endswith(".fp16") or name in load(weights) for name in lower_graph(reuse.full, Precision.FP16).weights
    )


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1), st.sampled_from(HALF))
def test_a_weight_is_rounded_and_never_becomes_infinite(numbers: list[float], precision: Precision) -> None:
    array = np.array(numbers, np.float32)
    weights = WeightsOnDevice(save({"w": array}), torch.device("cpu"))
    rounded = weights[precision.name_of("w")]
    assert rounded.isfinite().all()
    clipped = torch.from_numpy(np.clip(array, -LARGEST[precision], LARGEST[precision]))
    assert torch.equal(rounded, clipped.to(rounded.dtype))
    assert torch.equal(weights["w"], torch.from_numpy(array))


def test_a_name_says_what_a_weight_is_rounded_from() -> None:
    assert rounded_from("a.weight.fp16", {"a.weight"}) == ("a.weight", Precision.FP16)
    assert rounded_from("a.weight.bf16", {"a.weight"}) == ("a.weight", Precision.BF16)
    assert rounded_from("a.weight", {"a.weight"}) is None
    assert rounded_from("a.fp16", {"a.fp16", "a"}) is None, "a weight of the file has priority"
    assert rounded_from("b.fp16", {"a"}) is None
    assert [Precision.of_target(name) for name in ("torch:cpu", "torch:cuda:compiled:bf16", "tensorrt:fp16")] == [
        Precision.FP32,
        Precision.BF16,
        Precision.FP16,
    ]


@pytest.fixture(scope="module")
def half_bundle(shared: Path, tiny_model: Path, tiny_build: Path, cache: Path) -> Path:
    """Build the tiny bundle for torch in float16."""

    def make(folder: Path) -> None:
        profile = msgspec.structs.replace(Profile.load(tiny_build / "profile.json"), target="torch:cpu:fp16")
        plan = msgspec.structs.replace(Plan.load(tiny_build / "plan.json"), profile_sha256=profile.sha256())
        repair = RepairOptions(evaluations=2, tune=False)
        options = BuildOptions(plan=PlanOptions(budget=0.3), steps=4, random_plans=1, repair=repair)
        build(find_model(str(tiny_model)), profile, folder, options, cache=cache, plan=plan)

    return once(shared / "half-bundle", make)


def test_a_bundle_for_half_precision_has_its_graphs_in_both(half_bundle: Path, tiny_bundle: Path) -> None:
    exact, low = unetc.load(half_bundle, target="torch:cpu"), unetc.load(half_bundle)
    same = unetc.load(tiny_bundle, target="torch:cpu")
    same.tuned = None
    expected = same.sample(2, seed=5)
    np.testing.assert_allclose(exact.sample(2, seed=5), expected, atol=1e-6)  # the same plan, made by hand
    assert 0 < np.abs(low.sample(2, seed=5) - expected).max() < AGREES[Precision.FP16]
    full = exact.sample(2, seed=5, full_model=True)
    assert 0 < np.abs(low.sample(2, seed=5, full_model=True) - full).max() < AGREES[Precision.FP16]
    assert np.abs(full - expected).max() > 10 * AGREES[Precision.FP16], "the plan would show"
    bundle = Bundle.open(half_bundle)
    names = {engine.lowered.graph for engine in bundle.manifest.all_engines() if engine.lowered}
    assert names == {f"fp16/{engine.graph}" for engine in bundle.manifest.all_engines()} <= bundle.graphs.keys()
    assert verify(Bundle.open(half_bundle), VerifyOptions(rounds=1)).target == "torch:cpu:fp16"


def test_a_precision_that_a_bundle_was_not_built_for_is_refused(half_bundle: Path, tiny_bundle: Path) -> None:
    for path, target in ((tiny_bundle, "torch:cpu:fp16"), (half_bundle, "torch:cpu:bf16")):
        with pytest.raises(SessionError, match=r"has no graphs in .* Build it for a target that ends with"):
            unetc.load(path, target=target)


def louder(bundle: Bundle, factor: float) -> Bundle:
    """Multiply the first layer of a bundle in memory; norms make the values after it small again."""
    weights: Mapping[str, Array] = load(bundle.weights)
    (first,) = (name for name in weights if name.endswith("conv_in.weight"))
    return replace(bundle, weights=save({**weights, first: weights[first] * np.float32(factor)}))


def test_what_float16_cannot_hold_is_computed_in_float32(half_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = louder(Bundle.open(half_bundle), 1e6)
    low, exact = (Session.of(bundle, open_backend(t, threads=1)) for t in ("torch:cpu:fp16", "torch:cpu"))
    np.testing.assert_array_equal(low.sample(2, seed=1), exact.sample(2, seed=1, full_model=True))
    assert low.non_finite_steps == low.steps
    assert caplog.text.count("the full model takes its turn") == low.steps
    np.testing.assert_array_equal(low.sample(1, full_model=True), exact.sample(1, full_model=True))
    broken = Session.of(louder(bundle, np.inf), open_backend("torch:cpu:fp16", threads=1))
    with pytest.raises(NonFiniteError, match="and the full model produced NaN"):
        broken.sample()


def test_tensorrt_knows_itself_in_float32(tmp_path: Path) -> None:
    def backend(precision: Precision) -> TensorRtBackend:
        engines, gpu = EngineCache(tmp_path), torch.device("cpu")
        return TensorRtBackend(LIBRARIES["tensorrt"], precision, here=ORIGIN, engines=engines, gpu=gpu)

    low = backend(Precision.FP16)
    exact = low.exact()
    assert exact is not None
    assert (low.precision, exact.precision, low.reads) == (Precision.FP16, Precision.FP32, Precision.FP32)
    assert exact.exact() is None


def test_a_manifest_that_promises_a_weight_that_is_not_there_is_refused(half_bundle: Path) -> None:
    bundle = Bundle.open(half_bundle)
    full = bundle.manifest.full
    assert full.lowered is not None
    named = msgspec.structs.replace(full.lowered, weights=(*full.lowered.weights, "absent.fp16"))
    graph = bundle.graph_of(msgspec.structs.replace(full, lowered=named), Precision.FP16)
    with pytest.raises(SessionError, match=r"has no 'absent.fp16'. Build the bundle again"):
        HandingLoader(bundle.weights, 1).load(graph)


def test_a_manifest_without_all_graphs_is_refused(half_bundle: Path) -> None:
    record = json.loads((half_bundle / "manifest.json").read_text())
    Manifest.from_json(json.dumps(record).encode(), "manifest.json")
    for change in ({"precision": "fp32"}, {"full": {**record["full"], "lowered": None}}):
        with pytest.raises(CorruptArtifactError, match="every graph must exist in the bundle's precision"):
            Manifest.from_json(json.dumps({**record, **change}).encode(), "manifest.json")

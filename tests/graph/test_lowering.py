"""Half precision stays close to float32 at every size, and sensitive nodes stay float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors import safe_open
from safetensors.numpy import save

from tests.models import Tiny, relative_error, tiny_of
from unetc.backend import WEIGHTS, SerialisedGraph
from unetc.compiler.graph.lowering import lower_graph, lower_graphs
from unetc.compiler.graph.overflow import overflowing
from unetc.compiler.graph.specialise import specialise
from unetc.errors import EngineBuildError
from unetc.precision import Precision
from unetc.treatments import COMPUTED, EARLIER, EXTRAPOLATION, HELD, Treatment

SIZES = {"least": (1, 8, 8), "usual": (2, 16, 16), "most": (4, 24, 16), "odd": (3, 10, 14)}
TOLERANCE = 5e-3
"""Relative to the largest number: one rounding to 11 bits is 5e-4, and about twenty follow each other here."""

Values = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def tiny(shared: Path) -> Tiny:
    return tiny_of("cross-attention", shared)


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an engine that emits two branches, and one that holds and forecasts them and drops a skip."""
    folder = tmp_path_factory.mktemp("lowering")
    (folder / WEIGHTS).write_bytes(tiny.gated.weights.read_bytes())
    means = np.zeros(tiny.gated.channels, np.float32)
    first = {component.kind: component.name for component in reversed(tiny.gated.components)}
    reused = {first["level"]: Treatment.HOLD, first["residual"]: Treatment.FORECAST}
    full = specialise(tiny.gated, {}, means, emits=tuple(reused))
    fast = specialise(tiny.gated, {**reused, first["skip"]: Treatment.DROP}, means)
    (folder / "full.onnx").write_bytes(full.graph)
    (folder / "fast.onnx").write_bytes(fast.graph)
    lower_graphs(folder, ["full.onnx", "fast.onnx"], Precision.FP16, folder / "fp16")
    lower_graphs(folder, ["full.onnx", "fast.onnx"], Precision.BF16, folder / "bf16")
    return folder


def run(path: Path, inputs: Values) -> Values:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    read = {value.name for value in session.get_inputs()}
    assert read <= inputs.keys()
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {name: inputs[name] for name in read}), strict=True))


def evaluate(path: Path, inputs: Values) -> Values:
    """Run node by node in numpy, which rounds each result to half precision; onnxruntime skips many roundings."""
    evaluator = ReferenceEvaluator(onnx.load(path))
    values = {name: inputs[name] for name in evaluator.input_names}
    return dict(zip(evaluator.output_names, evaluator.run(None, values), strict=True))


def test_rounding_every_value_changes_little(tiny: Tiny, folder: Path) -> None:
    inputs: Values = dict(tiny.inputs(batch=1, height=8, width=8))
    exact, half = run(folder / "full.onnx", inputs), evaluate(folder / "fp16" / "full.onnx", inputs)
    for name, value in exact.items():
        assert 0 < relative_error(half[name], value) < 2 * TOLERANCE, name


@pytest.mark.parametrize("size", SIZES)
def test_half_precision_is_close_at_every_size(tiny: Tiny, folder: Path, size: str) -> None:
    batch, height, width = SIZES[size]
    inputs: Values = dict(tiny.inputs(batch=batch, height=height, width=width))
    exact, half = (run(path / "full.onnx", inputs) for path in (folder, folder / "fp16"))
    earlier = run(folder / "full.onnx", inputs | {"timestep": inputs["timestep"] + 10})
    for name, value in exact.items():
        assert half[name].dtype == np.float32
        assert 0 < relative_error(half[name], value) < TOLERANCE, name
        if name.startswith(COMPUTED):
            index = name.removeprefix(COMPUTED)
            inputs |= {
                HELD + index: value,
                EARLIER + index: earlier[name],
                EXTRAPOLATION + index: np.ones(1, np.float32),
            }
    exact, half = (run(path / "fast.onnx", inputs) for path in (folder, folder / "fp16"))
    assert 0 < relative_error(half["out_sample"], exact["out_sample"]) < TOLERANCE


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_all_graphs_read_one_weights_file_of_half_the_size(folder: Path, precision: str) -> None:
    before, after = ((path / WEIGHTS).stat().st_size for path in (folder, folder / precision))
    assert 0.5 < after / before < 0.75  # the last layer and nodes on inputs alone stay float32; names take space
    with safe_open(folder / precision / WEIGHTS, "np") as file:
        stored = set(file.keys())
    read = set()
    for name in ("full.onnx", "fast.onnx"):
        proto = onnx.load(folder / precision / name, load_external_data=False)
        onnx.checker.check_model(folder / precision / name, full_check=True)
        external = [one for one in proto.graph.initializer if one.data_location == TensorProto.EXTERNAL]
        assert all(one.external_data[0].value == WEIGHTS for one in external)
        read |= {one.name for one in external}
    assert read == stored


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_borders_time_and_the_last_layer_stay_wide(folder: Path, precision: str) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(folder / precision / "fast.onnx"), check_type=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    types |= {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    assert {types[value.name] for value in (*model.graph.input, *model.graph.output)} == {TensorProto.FLOAT}
    nodes = list(model.graph.node)
    operators = {"Sin", "Cos"}
    wide = [types[node.input[0]] for node in nodes if node.op_type in operators]
    assert wide == [TensorProto.FLOAT, TensorProto.FLOAT]
    last = [node for node in nodes if node.op_type == "Conv"][-1]
    assert types[last.input[0]] == TensorProto.FLOAT
    (forecast,) = (node for node in nodes if node.op_type == "Sub")  # held - earlier
    assert types[forecast.output[0]] == TensorProto.FLOAT
    low = TensorProto.FLOAT16 if precision == "fp16" else TensorProto.BFLOAT16
    convolutions = [types[node.input[0]] for node in nodes if node.op_type == "Conv"]
    assert convolutions.count(low) == len(convolutions) - 1


def test_values_that_overflow_can_be_kept_wide(tmp_path: Path) -> None:
    graph = """<ir_version: 10, opset_import: ["": 23]>
        large (float[n, 4] sample) => (float[n, 4] out)
        <float[4, 4] weight = {9, 0, 0, 0, 0, 9, 0, 0, 0, 0, 9, 0, 0, 0, 0, 9}> {
        grown = MatMul(sample, weight)  sum = MatMul(grown, weight)  back = Div(sum, sum)  out = MatMul(back, weight)
        }"""
    (tmp_path / "large.onnx").write_bytes(onnx.parser.parse_model(graph).SerializeToString())
    (tmp_path / WEIGHTS).write_bytes(save({}))
    inputs: Values = {"sample": np.full((1, 4), 1000, np.float32)}
    found, (exact,) = overflowing(tmp_path / "large.onnx", [inputs])
    assert found == {"grown", "sum"}
    np.testing.assert_array_equal(exact["out"], np.full((1, 4), 9))
    for wide, finite in (((), False), (found, True)):
        lower_graphs(tmp_path, ["large.onnx"], Precision.FP16, tmp_path / "fp16", wide)
        assert np.isfinite(evaluate(tmp_path / "fp16" / "large.onnx", inputs)["out"]).all() == finite


@pytest.mark.parametrize("sign", [1, -1])
def test_attention_whose_products_overflow_stays_wide(tmp_path: Path, sign: int) -> None:
    text = """<ir_version: 10, opset_import: ["": 23]>
        attention (float[1, 2, 8] sample) => (float[1, 2, 8] out)
        <float[8, 8] weight, float[8, 8] other> {
        query = MatMul(sample, weight)  key = MatMul(sample, other)
        seen = Attention <q_num_heads = 1, kv_num_heads = 1> (query, key, sample)  out = MatMul(seen, weight)
        }"""
    model = onnx.parser.parse_model(text)
    for name, factor in (("weight", 300), ("other", 300 * sign)):
        model.graph.initializer.append(numpy_helper.from_array(np.eye(8, dtype=np.float32) * factor, name))
    (tmp_path / "attention.onnx").write_bytes(model.SerializeToString())
    (tmp_path / WEIGHTS).write_bytes(save({}))
    inputs: Values = {"sample": np.ones((1, 2, 8), np.float32)}  # 8 * 300 * 300 / sqrt(8), about 250,000
    found, (exact,) = overflowing(tmp_path / "attention.onnx", [inputs])
    assert found == {"seen.logits"}
    assert overflowing(tmp_path / "attention.onnx", [{"sample": inputs["sample"] / 10}])[0] == set()
    lower_graphs(tmp_path, ["attention.onnx"], Precision.FP16, tmp_path / "fp16", found)
    half = evaluate(tmp_path / "fp16" / "attention.onnx", inputs)
    assert relative_error(half["out"], exact["out"]) < TOLERANCE
    lowered = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "fp16" / "attention.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in lowered.graph.value_info}
    assert (types["query"], types["seen"]) == (TensorProto.FLOAT16, TensorProto.FLOAT)


def test_the_statistics_of_a_norm_that_is_spelled_out_stay_wide(tmp_path: Path) -> None:
    graph = """<ir_version: 10, opset_import: ["": 23]>
        norm (float[n, 4] sample) => (float[n, 4] out)
        <float[4, 4] weight = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, float[1, 4] scale = {1, 1, 1, 1},
         float[1] epsilon = {0.0001}, int64[1] axes = {1}, int64[2] shape = {1, 4}> {
        x = MatMul(sample, weight)  mean = ReduceMean(x, axes)  squared = Mul(x, x)  squares = ReduceMean(squared, axes)
        part = Mul(mean, mean)  variance = Sub(squares, part)  sum = Add(variance, epsilon)  deviation = Sqrt(sum)
        own = Reshape(scale, shape)  factor = Div(own, deviation)  centred = Sub(x, mean)  normal = Mul(centred, factor)
        out = MatMul(normal, weight)
        }"""
    (tmp_path / "norm.onnx").write_bytes(onnx.parser.parse_model(graph).SerializeToString())
    (tmp_path / WEIGHTS).write_bytes(save({}))
    inputs: Values = {"sample": np.array([[300, 301, 302, 303]], np.float32)}  # float16 cannot hold their squares
    assert overflowing(tmp_path / "norm.onnx", [{"sample": inputs["sample"] / 10}])[0] == set()
    lower_graphs(tmp_path, ["norm.onnx"], Precision.FP16, tmp_path / "fp16")
    exact, half = (evaluate(path / "norm.onnx", inputs)["out"] for path in (tmp_path, tmp_path / "fp16"))
    assert relative_error(half, exact) < TOLERANCE
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "fp16" / "norm.onnx"))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    statistics = {"mean", "squared", "squares", "part", "variance", "sum", "deviation", "factor"}
    assert {types[name] for name in statistics} == {TensorProto.FLOAT}
    assert {types[name] for name in ("x", "centred", "normal")} == {TensorProto.FLOAT16}


@pytest.mark.parametrize("place", range(4))
def test_a_nan_is_seen_wherever_it_stands(tmp_path: Path, place: int) -> None:
    sample = np.ones(4, np.float32)
    sample[place] = -1
    text = (
        '<ir_version: 10, opset_import: ["" : 23]> root (float[4] sample) => (float[4] image) { image = Sqrt (sample) }'
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "root.onnx")
    assert overflowing(tmp_path / "root.onnx", [{"sample": sample}])[0] == {"image"}


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(EngineBuildError, match=r"unknown precision 'fp8'\. Available: fp32, fp16, bf16"):
        Precision.parse("fp8")


def test_positions_are_counted_in_float32() -> None:
    """Compute positions from a size alone, as PixArt and FLUX do; float16 has no odd numbers beyond 2048."""
    size, kind = 4099, TensorProto.FLOAT
    nodes = [
        onnx.helper.make_node("Shape", ["sample"], ["shape"]),
        onnx.helper.make_node("Squeeze", ["shape"], ["size"]),
        onnx.helper.make_node("Cast", ["size"], ["most"], to=kind),
        onnx.helper.make_node("Range", ["zero", "most", "one"], ["positions"]),
        onnx.helper.make_node("Unsqueeze", ["positions", "axis"], ["column"]),
        onnx.helper.make_node("MatMul", ["column", "weight"], ["prediction"]),  # the last layer stays float32
    ]
    numbers = [onnx.helper.make_tensor(name, kind, [], [value]) for name, value in (("zero", 0.0), ("one", 1.0))]
    numbers += [onnx.helper.make_tensor("weight", kind, [1, 1], [1.0])]
    numbers += [onnx.helper.make_tensor("axis", TensorProto.INT64, [1], [1])]
    sample = onnx.helper.make_tensor_value_info("sample", kind, ["n"])
    prediction = onnx.helper.make_tensor_value_info("prediction", kind, ["n", 1])
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "counting", [sample], [prediction], numbers),
        opset_imports=[onnx.helper.make_opsetid("", 23)],
    )
    low = lower_graph(SerialisedGraph(graph=model.SerializeToString(), weights=frozenset()), Precision.FP16)
    (counted,) = ReferenceEvaluator(onnx.load_model_from_string(low.graph)).run(
        None, {"sample": np.zeros(size, np.float32)}
    )
    np.testing.assert_array_equal(counted[:, 0], np.arange(size))

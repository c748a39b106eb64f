"""Every operator of the torch backend computes the same as onnxruntime; unknown operators are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import parser

from tests.models import relative_error
from unetc.backend import DOMAIN, Array, SerialisedGraph
from unetc.compiler.graph.gate import OPSET
from unetc.compiler.graph.group_norm import definition
from unetc.errors import SessionError
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.backends.torch_operators import OPERATORS

NO_WEIGHTS = (2).to_bytes(8, "little") + b"{}"

LIBRARIES_AGREE = 1e-5
"""Tolerance for one operator with tens of summands: order of summation and approximations of erf and tanh differ."""

BODIES: Mapping[str, str] = {
    "Abs": "y = Abs (x)",
    "Add": "y = Add (x, x)",
    "Add with a scalar": "two = Constant <value_float = 2.0> () y = Add (two, x)",
    "And": "zero = Constant <value_float = 0.0> () a = Less (x, zero) b = And (a, a) y = Cast <to = 1> (b)",
    "ArgMax": "i = ArgMax <axis = 1, keepdims = 0> (x) y = Cast <to = 1> (i)",
    "ArgMax, first of equal ones": """
        zero = Constant <value_float = 0.0> () large = Greater (x, zero) n = Cast <to = 6> (large)
        i = ArgMax <axis = -1> (n) y = Cast <to = 1> (i)
        """,
    "Attention": "y = Attention (x, x, x)",
    "Attention with a scale and a mask": """
        zero = Constant <value_float = -0.5> () line = ReduceMax <keepdims = 1> (x, axes)
        s = Shape <start = 2, end = 3> (x) both = Concat <axis = 0> (s, s) one = Constant <value_ints = [1]> ()
        wide = Expand (line, both) seen = Greater (wide, zero) y = Attention <scale = 0.3> (x, x, x, seen)
        """,
    "Attention with an added mask": """
        t = Transpose <perm = [0, 1, 3, 2]> (x) m = MatMul (x, t) y = Attention (x, x, x, m)
        """,
    "Attention, causal": "y = Attention <is_causal = 1> (x, x, x)",
    "Attention with fewer heads of keys": """
        from = Constant <value_ints = [0]> () to = Constant <value_ints = [2]> () along = Constant <value_ints = [1]> ()
        k = Slice (x, from, to, along) y = Attention (x, k, k)
        """,
    "AveragePool": "y = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)",
    "AveragePool over padding": """
        y = AveragePool <kernel_shape = [3, 2], pads = [1, 0, 1, 0], count_include_pad = 1> (x)
        """,
    "AveragePool beside padding": "y = AveragePool <kernel_shape = [3, 2], pads = [1, 0, 1, 0]> (x)",
    "Cast": "i = Cast <to = 7> (x) y = Cast <to = 1> (i)",
    "Cast of a size": """
        s = Shape <start = 3, end = 4> (x) one = Squeeze (s) f = Cast <to = 1> (one) y = Div (x, f)
        """,
    "Clip": "low = Constant <value_float = -0.5> () y = Clip (x, low)",
    "Concat": "y = Concat <axis = 1> (x, x)",
    "Constant": "c = Constant <value_floats = [1.0, 2.0]> () y = Identity (c)",
    "ConstantOfShape": "s = Shape (x) y = ConstantOfShape <value = float[1] {3.0}> (s)",
    "ConstantOfShape of zeros": "s = Shape (x) y = ConstantOfShape (s)",
    "Conv": "y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, kernel)",
    "Conv with strides and uneven pads": """
        y = Conv <kernel_shape = [3, 3], pads = [0, 1, 1, 2], strides = [2, 1], dilations = [1, 2]> (x, kernel, outer)
        """,
    "Cos": "y = Cos (x)",
    "Div": "y = Div (x, x)",
    "Div of sizes": """
        s = Shape <start = 1, end = 4> (x) d = Constant <value_ints = [2]> () h = Div (s, d) y = Cast <to = 1> (h)
        """,
    "Einsum": """
        turned = Transpose <perm = [0, 1, 3, 2]> (x) y = Einsum <equation = "bchw,bcwv->bchv"> (x, turned)
        """,
    "Equal": "e = Equal (x, x) y = Cast <to = 1> (e)",
    "Erf": "y = Erf (x)",
    "Exp": "y = Exp (x)",
    "Expand": "s = Constant <value_ints = [2, 1, 1, 1, 1]> () y = Expand (x, s)",
    "Flatten": "y = Flatten <axis = 2> (x)",
    "GatherND": """
        i = Constant <value_ints = [1, 2, 0, 1]> () s = Constant <value_ints = [2, 2]> () two = Reshape (i, s)
        y = GatherND (x, two)
        """,
    "Gather": "i = Constant <value_ints = [1, -1, 0]> () y = Gather <axis = 1> (x, i)",
    "Gather of one": "i = Constant <value_int = -2> () y = Gather <axis = 1> (x, i)",
    "Gather by computed indices": "a = Abs (x) i = Cast <to = 7> (a) flat = Constant <value_ints = [0, 1]> () "
    "t = ReduceMax <keepdims = 0> (i, flat) three = Constant <value_int = 3> () u = Min (t, three) "
    "y = Gather <axis = 1> (x, u)",
    "Gelu": "y = Gelu (x)",
    "Gelu, approximate": 'y = Gelu <approximate = "tanh"> (x)',
    "Gemm": "f = Flatten <axis = 3> (x) y = Gemm <transB = 1> (f, f)",
    "Gemm with a bias": "f = Flatten <axis = 3> (x) y = Gemm <transA = 1> (f, f, bias)",
    "Greater": "zero = Constant <value_float = 0.0> () g = Greater (x, zero) y = Cast <to = 1> (g)",
    "GroupNorm": "y = unetc.GroupNorm <num_groups = 2, epsilon = 0.1> (x, four, four)",
    "GroupNormalization": "y = GroupNormalization <num_groups = 2, epsilon = 0.1> (x, four, four)",
    "Identity": "y = Identity (x)",
    "LayerNormalization": "y = LayerNormalization <axis = -1, epsilon = 0.1> (x, bias, bias)",
    "LayerNormalization without a bias": "y = LayerNormalization <axis = -1> (x, bias)",
    "LayerNormalization of the last two axes": """
        t = Transpose <perm = [0, 2, 1, 3]> (x) s = Constant <value_ints = [4, 8]> () wide = Expand (bias, s)
        y = LayerNormalization <axis = 2> (t, wide, wide)
        """,
    "Less": "zero = Constant <value_float = 0.0> () g = Less (x, zero) y = Cast <to = 1> (g)",
    "Log": "a = Abs (x) y = Log (a)",
    "MatMul": "t = Transpose <perm = [0, 1, 3, 2]> (x) y = MatMul (x, t)",
    "Max": "z = Neg (x) y = Max (x, z)",
    "Min": "z = Neg (x) y = Min (x, z, z)",
    "Mish": "y = Mish (x)",
    "Mul": "y = Mul (x, bias)",
    "Mul by the own sigmoid": "g = Sigmoid (x) y = Mul (x, g)",
    "Mul by another sigmoid": "z = Neg (x) g = Sigmoid (z) y = Mul (g, x)",
    "Neg": "y = Neg (x)",
    "Not": "zero = Constant <value_float = 0.0> () g = Less (x, zero) n = Not (g) y = Cast <to = 1> (n)",
    "Pad": """
        p = Constant <value_ints = [0, 1, 0, 0, 0, 0, 2, 3]> () v = Constant <value_float = 0.5> ()
        y = Pad (x, p, v)
        """,
    "Pad with a value in a vector": """
        p = Constant <value_ints = [0, 1, 0, 0, 0, 0, 2, 3]> () v = Constant <value_floats = [0.5]> ()
        y = Pad (x, p, v)
        """,
    "Pad of some axes": "p = Constant <value_ints = [1, 2]> () a = Constant <value_ints = [-1]> () y = Pad (x, p, , a)",
    "Pad by reflection": 'p = Constant <value_ints = [0, 0, 1, 2, 0, 0, 2, 1]> () y = Pad <mode = "reflect"> (x, p)',
    "Pad by the edge": 'p = Constant <value_ints = [0, 0, 1, 2, 0, 0, 2, 1]> () y = Pad <mode = "edge"> (x, p)',
    "Pow": "three = Constant <value_float = 3.0> () y = Pow (x, three)",
    "RMSNormalization": "y = RMSNormalization <axis = -1, epsilon = 0.1> (x, bias)",
    "RMSNormalization from an axis on": "y = RMSNormalization <axis = 3> (x, bias)",
    "Range": """
        s = Shape <start = 3, end = 4> (x) end = Squeeze (s) zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> () r = Range (zero, end, one) y = Cast <to = 1> (r)
        """,
    "Reciprocal": "y = Reciprocal (x)",
    "ReduceMax": "y = ReduceMax <keepdims = 0> (x, axes)",
    "ReduceMean": "y = ReduceMean (x, axes)",
    "ReduceMean of all": "y = ReduceMean <keepdims = 0> (x)",
    "ReduceSum": "y = ReduceSum <keepdims = 0> (x, axes)",
    "ReduceSum of no axes, which is of all": """
        zero = Constant <value_ints = [0]> () none = Slice (axes, zero, zero) y = ReduceSum (x, none)
        """,
    "ReduceSum of no axes, which is of none": """
        zero = Constant <value_ints = [0]> () none = Slice (axes, zero, zero)
        y = ReduceSum <noop_with_empty_axes = 1> (x, none)
        """,
    "Relu": "y = Relu (x)",
    "Reshape": "s = Constant <value_ints = [0, 2, -1]> () y = Reshape (x, s)",
    "Reshape to sizes": """
        first = Shape <start = 0, end = 1> (x) last = Shape <start = 2, end = 4> (x)
        two = Constant <value_ints = [2, 2]> ()
        s = Concat <axis = 0> (first, two, last) y = Reshape <allowzero = 1> (x, s)
        """,
    "Resize": """
        s = Shape <start = 0, end = 2> (x) t = Shape <start = 2, end = 4> (x) three = Constant <value_int = 3> ()
        more = Mul (t, three) sizes = Concat <axis = 0> (s, more)
        y = Resize <nearest_mode = "floor", coordinate_transformation_mode = "asymmetric"> (x, , , sizes)
        """,
    "Resize by scales": """
        scales = Constant <value_floats = [1.0, 1.0, 2.0, 1.5]> ()
        y = Resize <nearest_mode = "floor", coordinate_transformation_mode = "asymmetric"> (x, , scales)
        """,
    "Shape": "s = Shape <start = 1> (x) y = Cast <to = 1> (s)",
    "Shape from an axis on, of a computed tensor": """
        a = Abs (x) s = Shape <start = 2> (a) t = Shape <end = -1> (a) both = Concat <axis = 0> (s, t)
        y = Cast <to = 1> (both)
        """,
    "Shape from an axis on, of a normalised tensor": """
        a = GroupNormalization <num_groups = 2> (x, four, four) s = Shape <start = 2> (a) y = Cast <to = 1> (s)
        """,
    "Shape from an axis on, of a tensor with a group norm of unetc": """
        a = unetc.GroupNorm <num_groups = 2, epsilon = 0.1> (x, four, four) s = Shape <start = 2> (a)
        y = Cast <to = 1> (s)
        """,
    "Shape from the end": "s = Shape <start = -2> (x) y = Cast <to = 1> (s)",
    "Sigmoid": "y = Sigmoid (x)",
    "Sin": "y = Sin (x)",
    "Slice": """
        from = Constant <value_ints = [1, -3]> () to = Constant <value_ints = [9223372036854775807, -1]> ()
        along = Constant <value_ints = [1, -1]> () by = Constant <value_ints = [2, 1]> ()
        y = Slice (x, from, to, along, by)
        """,
    "Slice of sizes": """
        s = Shape <start = 0, end = 4> (x) from = Constant <value_ints = [1]> () to = Constant <value_ints = [3]> ()
        p = Slice (s, from, to) y = Cast <to = 1> (p)
        """,
    "Slice to a size": """
        from = Constant <value_ints = [0]> () to = Shape <start = 2, end = 3> (x) along = Constant <value_ints = [3]> ()
        y = Slice (x, from, to, along)
        """,
    "Softmax": "y = Softmax <axis = 1> (x)",
    "Softplus": "y = Softplus (x)",
    "Split": "s = Constant <value_ints = [1, 3]> () unused, y = Split <axis = 1> (x, s)",
    "Split evenly": "unused, y = Split <axis = -1, num_outputs = 2> (x)",
    "Sqrt": "a = Abs (x) y = Sqrt (a)",
    "Squeeze": "a = Constant <value_ints = [1]> () z = ReduceSum (x, a) y = Squeeze (z, a)",
    "Sub": "y = Sub (x, bias)",
    "Sub of sizes": """
        s = Shape <start = 2, end = 4> (x) one = Constant <value_int = 1> () t = Sub (one, s) y = Cast <to = 1> (t)
        """,
    "Tanh": "y = Tanh (x)",
    "Tile": "r = Constant <value_ints = [1, 2, 1, 3]> () y = Tile (x, r)",
    "Transpose": "y = Transpose <perm = [3, 0, 2, 1]> (x)",
    "Transpose of all": "y = Transpose (x)",
    "Unsqueeze": "a = Constant <value_ints = [0, -1, 2]> () y = Unsqueeze (x, a)",
    "Unsqueeze from both ends": """
        f = Flatten <axis = 2> (x) a = Constant <value_ints = [3, -3]> () y = Unsqueeze (f, a)
        """,
    "Unsqueeze from the end": "a = Constant <value_ints = [-1, -4]> () y = Unsqueeze (x, a)",
    "Where": "zero = Constant <value_float = 0.0> () g = Less (x, zero) z = Neg (x) y = Where (g, z, zero)",
    "Where of sizes": """
        s = Shape <start = 0, end = 4> (x) six = Constant <value_int = 6> () e = Equal (s, six)
        one = Constant <value_ints = [1, 1, 1, 1]> () t = Where (e, one, s) y = Cast <to = 1> (t)
        """,
}
"""Nodes of a graph from x to y, by operator and special case."""


def model_of(body: str) -> bytes:
    """Make a graph of x, [batch, 4, height, width]."""
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>
        graph (float[n, 4, h, w] x) => (float y)
        <float[2, 4, 3, 3] kernel = {{{", ".join(f"{0.1 * (i % 7) - 0.3:.1f}" for i in range(72))}}},
         float[2] outer = {{0.5, -1.0}}, float[4] four = {{1.0, 2.0, -1.0, 0.5}}, int64[2] axes = {{2, 3}},
         float[8] bias = {{1.0, 0.5, -1.0, 2.0, 0.1, -0.2, 0.3, 1.5}}>
        {{ {body} }}"""
    )
    model.functions.append(ir.to_proto(definition(OPSET)))
    return model.SerializeToString()


def drawn(batch: int = 2, height: int = 6) -> Array:
    return np.random.default_rng(0).standard_normal((batch, 4, height, 8), dtype=np.float32)


def run(target: str, graph: bytes, x: NDArray[np.float32], shape: tuple[int, ...]) -> Array:
    backend = open_backend(target, threads=1)
    output = backend.device.full(shape, np.nan)
    program = backend.open_weights(NO_WEIGHTS).load(SerialisedGraph(graph=graph, weights=frozenset()))
    program({"x": backend.device.put(x)}, output)
    return backend.device.to_array(output)


def expected(graph: bytes, x: NDArray[np.float32]) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it remarks on every initializer that a graph does not use
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    result: Array = session.run(None, {"x": x})[0]
    return result


def test_every_operator_is_tried() -> None:
    assert {re.split(r"\W", name)[0] for name in BODIES} == {*OPERATORS}


@pytest.mark.parametrize("name", BODIES)
def test_an_operator_computes_what_onnxruntime_computes(name: str) -> None:
    graph = model_of(BODIES[name])
    for x in (drawn(), drawn(batch=3, height=4)):
        wanted = expected(graph, x)
        result = run("torch:cpu", graph, x, wanted.shape)
        assert relative_error(result, wanted) < LIBRARIES_AGREE


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("y = Selu (x)", "operator Selu"),
        ("y = LpPool <kernel_shape = [2, 2]> (x)", "operator LpPool"),
        ("y = AveragePool <kernel_shape = [3, 3], ceil_mode = 1> (x)", "AveragePool with ceil_mode"),
        ("y = AveragePool <kernel_shape = [2, 2], pads = [0, 0, 1, 1]> (x)", "AveragePool with uneven pads"),
        ('y = Conv <auto_pad = "SAME_UPPER", kernel_shape = [3, 3]> (x, kernel)', "Conv with auto_pad"),
        (
            's = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> () y = Resize <mode = "linear"> (x, , s)',
            "Resize with mode",
        ),
        ("f = Flatten <axis = 3> (x) y = Gemm <transB = 1, alpha = 2.0> (f, f)", "Gemm with alpha"),
        (
            'p = Constant <value_ints = [0, 0, 1, 2, 0, 0, 2, 1]> () y = Pad <mode = "wrap"> (x, p)',
            "Pad with mode 'wrap'",
        ),
        ("y = Attention <softcap = 2.0> (x, x, x)", "Attention with softcap"),
        ("y = LayerNormalization <axis = 2> (x, bias)", r"LayerNormalization with axis 2 and a scale of shape \[8\]"),
        ("y = RMSNormalization <axis = -2> (x, bias)", r"RMSNormalization with axis -2 and a scale of shape \[8\]"),
        (
            "one = Constant <value_floats = [2.0]> () y = RMSNormalization (x, one)",
            r"RMSNormalization with axis -1 and a scale of shape \[1\]",
        ),
        (
            "one = Constant <value_floats = [2.0]> () y = LayerNormalization (x, bias, one)",
            r"LayerNormalization with a bias of shape \[1\] beside a scale of shape \[8\]",
        ),
        (
            "y = LayerNormalization <stash_type = 10> (x, bias)",
            "LayerNormalization with stash_type 10",
        ),
        (
            "p = Constant <value_ints = [0, 1, 0, 0, 0, 0, 2, 3]> () m = ReduceMax (x) y = Pad (x, p, m)",
            "Pad with numbers that are computed",
        ),
        ("i = Cast <to = 7> (x) y = ConstantOfShape (i)", "ConstantOfShape with numbers that are computed"),
        ("i = Cast <to = 3> (x) y = Cast <to = 1> (i)", "Cast with type 3"),
    ],
)
def test_what_is_not_known_is_refused_by_name(body: str, message: str) -> None:
    with pytest.raises(SessionError, match=message):
        run("torch:cpu", model_of(body), drawn(), (2, 4, 6, 8))


def test_an_operator_of_another_domain_is_refused_by_name() -> None:
    graph = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 23, "com.example" : 1]>
        graph (float[n] x) => (float[n] y) { y = com.example.Launch (x) }"""
    ).SerializeToString()
    with pytest.raises(SessionError, match=r"operator com\.example\.Launch"):
        run("torch:cpu", graph, drawn(), (1,))


def test_a_call_that_fails_is_an_error_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SessionError, match="torch failed: "):
        run("torch:cpu", model_of("y = MatMul (x, x)"), drawn(), (2, 4, 6, 8))
    assert capfd.readouterr().err == ""


def test_a_graph_that_reads_what_nothing_computes_is_refused() -> None:
    with pytest.raises(SessionError, match="reads 'z', which nothing before it computes"):
        run("torch:cpu", model_of("y = Abs (z) z = Neg (x)"), drawn(), (2, 4, 6, 8))


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(SessionError, match="torch cannot load an engine"):
        run("torch:cpu", b"\xffno graph", drawn(), (1,))

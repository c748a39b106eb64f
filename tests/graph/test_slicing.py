"""Readers of a concatenation with a constant part are narrowed without changing their result."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.models import Tiny, relative_error, tiny_of
from unetc.artifacts.profile import Component
from unetc.artifacts.sizes import SampleSizes
from unetc.backend import DOMAIN, GROUP_NORM, Array, SerialisedGraph
from unetc.compiler.graph import group_norm
from unetc.compiler.graph.gate import GATES, MEANS, OPSET, gate_values, onnx_function
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.slicing import PARTIAL
from unetc.compiler.graph.specialise import specialise
from unetc.runtime.backends.registry import Memory, open_backend
from unetc.treatments import Treatment

DROP, MEAN = Treatment.DROP, Treatment.MEAN

SILU = "sigmoid = Sigmoid(normal) active = Mul(sigmoid, normal)"
CONV1 = "Conv<kernel_shape=[1, 1]>"
CONV3 = "Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>"

READERS: Mapping[str, str] = {
    "conv": f"out_sample = {CONV3}(joined, weight3, bias)",
    "conv without bias": f"out_sample = {CONV3}(joined, weight3)",
    "shortcut": f"out_sample = {CONV1}(joined, weight1, bias)",
    "shortcut without bias": f"out_sample = {CONV1}(joined, weight1)",
    "unpadded": "out_sample = Conv<kernel_shape=[3, 3]>(joined, weight3, bias)",
    "strided": "out_sample = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]>(joined, weight3, bias)",
    "norm": f"normal = NORM(joined, scale, shift) out_sample = {CONV3}(normal, weight3, bias)",
    "norm, relu": f"normal = NORM(joined, scale, shift) active = Relu(normal) out_sample = {CONV3}(active, weight3)",
    "norm, silu": f"normal = NORM(joined, scale, shift) {SILU} out_sample = {CONV3}(active, weight3, bias)",
    "norm, silu, shortcut": f"normal = NORM(joined, scale, shift) {SILU} out_sample = {CONV1}(active, weight1, bias)",
    "norm, silu, uneven": f"""normal = NORM(joined, scale, shift) {SILU}
        out_sample = Conv<kernel_shape=[3, 3], pads=[0, 2, 1, 0], strides=[1, 2]>(active, weight3, bias)""",
    "norm, silu, dilated": f"""normal = NORM(joined, scale, shift) {SILU}
        out_sample = Conv<kernel_shape=[3, 3], pads=[2, 2, 2, 2], dilations=[2, 2]>(active, weight3, bias)""",
    "block": f"""normal = NORM(joined, scale, shift) {SILU} inner = {CONV3}(active, weight3, bias)
        shortcut = {CONV1}(joined, weight1, bias) out_sample = Add(shortcut, inner)""",
    "two convs behind a norm": f"""normal = NORM(joined, scale, shift) {SILU} inner = {CONV3}(active, weight3, bias)
        shortcut = {CONV1}(active, weight1, bias) out_sample = Add(shortcut, inner)""",
}
"""Readers of `joined`, a concatenation of eight channels, that are narrowed."""

OTHERS: Mapping[str, str] = {
    "other operator": f"active = Tanh(joined) out_sample = {CONV1}(active, weight1, bias)",
    "grouped": "out_sample = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=2>(joined, grouped, bias)",
    "automatic padding": 'out_sample = Conv<kernel_shape=[3, 3], auto_pad="SAME_UPPER">(joined, weight3, bias)',
    "computed weight": f"computed = Neg(weight1) out_sample = {CONV1}(joined, computed, bias)",
    "norm, other operator": f"""normal = NORM(joined, scale, shift) {SILU} inner = {CONV1}(active, weight1, bias)
        mean = ReduceMean<keepdims=1>(active) out_sample = Add(inner, mean)""",
    "norm, not quite SiLU": f"""normal = NORM(joined, scale, shift) sigmoid = Sigmoid(normal)
        active = Mul(sigmoid, joined) out_sample = {CONV1}(active, weight1, bias)""",
    "sigmoid read twice": f"""normal = NORM(joined, scale, shift) {SILU} inner = {CONV1}(active, weight1, bias)
        gate = {CONV1}(sigmoid, weight1, bias) out_sample = Add(inner, gate)""",
}
"""Readers of `joined` that keep the concatenation."""

PARAMETERS: Mapping[str, tuple[int, ...]] = {
    "scale": (8,),
    "shift": (8,),
    "weight1": (6, 8, 1, 1),
    "weight3": (6, 8, 3, 3),
    "grouped": (6, 4, 3, 3),
    "bias": (6,),
    "encoder": (5, 3, 1, 1),
}

TWO_PARTS = ("sample", "skip")


@dataclass(frozen=True, slots=True)
class Block:
    """A concatenation and its readers; its parts are inputs, and some of them have gates."""

    gated: GatedGraph
    widths: Mapping[str, int]

    def inputs(self, batch: int, height: int, width: int) -> dict[str, Array]:
        """Draw the parts far from zero, so that the mean that a norm subtracts matters."""
        rng = np.random.default_rng(0)
        return {
            name: (1 + rng.standard_normal((batch, channels, height, width))).astype(np.float32)
            for name, channels in self.widths.items()
        }

    def error(self, engine: SerialisedGraph, treatments: Mapping[str, Treatment], means: Array, *size: int) -> float:
        """Compare an engine with the gated graph."""
        inputs = self.inputs(*size)
        rows = gate_values(self.gated.components, treatments)
        gates = {GATES: np.repeat(rows[np.newaxis], size[0], axis=0), MEANS: means}
        return relative_error(run(engine, inputs), run(self.gated.runnable(), inputs | gates))


def make_block(
    reader: str,
    widths: Sequence[int],
    *,
    gates: Sequence[str] = ("skip",),
    parts: Sequence[str] = TWO_PARTS,
    groups: int = 4,
) -> Block:
    """Make a block whose parts have the given widths, in order; the widths sum to eight.

    A part called "encoded" is computed from the sample; the others are inputs.
    """
    channels = dict(zip(parts, widths, strict=True))
    components = tuple(
        Component(name=name, kind="skip", owner="", index=i, channels=channels[name], axis=1, offset=offset, nested=())
        for i, (name, offset) in enumerate(
            zip(gates, itertools.accumulate((channels[name] for name in gates), initial=0), strict=False)
        )
    )
    gating = "".join(
        f"gated_{component.name} = {DOMAIN}.Gate<index=[{component.index}], begin=[{component.offset}], "
        f"end=[{component.offset + component.channels}], per_sample=[-1, 1, 1, 1], per_channel=[1, -1, 1, 1]>"
        f"({component.name}, gates, means)\n"
        for component in components
    )
    joined = ", ".join(f"gated_{part}" if part in gates else part for part in parts)
    given = {part: width for part, width in channels.items() if part != "encoded"}
    inputs = ", ".join(f"float[b, {width}, h, w] {part}" for part, width in given.items())
    encoder = f"encoded = {CONV1}(sample, encoder)" if "encoded" in channels else ""
    text = f"""<ir_version: 10, opset_import: ["": {OPSET}, "{DOMAIN}": 1]>
        block ({inputs}, float[b, c, 2] gates, float[n] means) => (float[b, 6, x, y] out_sample) {{
            {encoder} {gating} joined = Concat<axis=1>({joined})
            {reader.replace("NORM", f"GroupNormalization<num_groups={groups}, epsilon=0.1>")}
        }}"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(1)
    for name, shape in PARAMETERS.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype("f4"), name))
    model = ir.serde.deserialize_model(proto)
    definition = onnx_function(OPSET)
    model.functions[definition.identifier()] = definition
    group_norm.from_onnx(model)
    gated = GatedGraph(
        model=model,
        components=components,
        inputs=tuple(given),
        sizes=SampleSizes(multiple=1),
        folder=Path(),
    )
    return Block(gated, given)


def run(graph: SerialisedGraph, inputs: Mapping[str, Array]) -> Array:
    """Run a graph with any output size."""
    session = onnxruntime.InferenceSession(graph.graph, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    output: Array = session.run(None, {name: array for name, array in inputs.items() if name in names})[0]
    return output


def operators(engine: SerialisedGraph) -> Counter[str]:
    """Count the operators of an engine."""
    return Counter(node.op_type for node in onnx.load_model_from_string(engine.graph).graph.node)


def draw_means(block: Block) -> Array:
    """Draw the means."""
    return np.random.default_rng(2).standard_normal(block.gated.channels, dtype=np.float32)


def keeps_concatenation(engine: SerialisedGraph) -> bool:
    """Check whether an engine still concatenates all parts."""
    nodes = onnx.load_model_from_string(engine.graph).graph.node
    return any("joined" in node.output for node in nodes)


@pytest.mark.parametrize("treatment", [DROP, MEAN])
@pytest.mark.parametrize("parts", [TWO_PARTS, TWO_PARTS[::-1]])
@pytest.mark.parametrize("reader", READERS)
def test_readers_are_narrowed_exactly(reader: str, parts: Sequence[str], treatment: Treatment) -> None:
    block = make_block(READERS[reader], (3, 5), parts=parts)
    means = draw_means(block)
    engine = specialise(block.gated, {"skip": treatment}, means)
    assert not keeps_concatenation(engine)
    for size in ((1, 5, 7), (3, 8, 4)):
        assert block.error(engine, {"skip": treatment}, means, *size) < 1e-5


@pytest.mark.parametrize("treatment", [DROP, MEAN])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("width", range(1, 8))
def test_seam_of_a_norm_may_lie_anywhere(width: int, groups: int, treatment: Treatment) -> None:
    for parts in (TWO_PARTS, TWO_PARTS[::-1]):
        block = make_block(READERS["block"], (width, 8 - width), parts=parts, groups=groups)
        means = draw_means(block)
        engine = specialise(block.gated, {"skip": treatment}, means)
        assert not keeps_concatenation(engine)
        assert block.error(engine, {"skip": treatment}, means, 3, 4, 5) < 1e-5


@pytest.mark.parametrize("treatment", [DROP, MEAN])
@pytest.mark.parametrize("reader", OTHERS)
def test_other_readers_keep_the_concatenation(reader: str, treatment: Treatment) -> None:
    block = make_block(OTHERS[reader], (3, 5))
    means = draw_means(block)
    engine = specialise(block.gated, {"skip": treatment}, means)
    assert keeps_concatenation(engine)
    assert block.error(engine, {"skip": treatment}, means, 3, 5, 7) < 1e-5


def test_reader_is_narrowed_beside_one_that_is_not() -> None:
    reader = f"""inner = {CONV3}(joined, weight3, bias) active = Tanh(joined)
        other = {CONV1}(active, weight1, bias) out_sample = Add(inner, other)"""
    block = make_block(reader, (3, 5))
    means = draw_means(block)
    engine = specialise(block.gated, {"skip": MEAN}, means)
    assert keeps_concatenation(engine)
    assert operators(engine)["Slice"]
    assert block.error(engine, {"skip": MEAN}, means, 2, 5, 7) < 1e-5


@pytest.mark.parametrize(
    ("gates", "narrowed"),
    [(("first",), False), (("middle",), False), (("first", "middle"), True), (("first", "last"), False)],
)
def test_one_part_at_an_end_must_be_left(gates: Sequence[str], narrowed: bool) -> None:
    block = make_block(READERS["block"], (3, 1, 4), gates=gates, parts=("first", "middle", "last"))
    means = draw_means(block)
    treatments = dict(zip(gates, (MEAN, DROP), strict=False))
    engine = specialise(block.gated, treatments, means)
    assert keeps_concatenation(engine) is not narrowed
    assert block.error(engine, treatments, means, 2, 5, 7) < 1e-5


def test_concatenation_that_lost_both_parts_stays() -> None:
    block = make_block(READERS["block"], (3, 5), gates=TWO_PARTS)
    means = draw_means(block)
    treatments = {"sample": MEAN, "skip": DROP}
    engine = specialise(block.gated, treatments, means)
    assert keeps_concatenation(engine)
    assert block.error(engine, treatments, means, 2, 5, 7) < 1e-5


def test_dropped_skip_adds_nothing_to_a_shortcut() -> None:
    block = make_block(READERS["shortcut"], (3, 5))
    engine = specialise(block.gated, {"skip": DROP}, draw_means(block))
    assert operators(engine) == {"Slice": 1, "Conv": 1, "Identity": 1}


def test_mean_adds_a_bias_to_a_shortcut() -> None:
    block = make_block(READERS["shortcut"], (3, 5))
    model = onnx.load_model_from_string(specialise(block.gated, {"skip": MEAN}, draw_means(block)).graph)
    (convolution,) = (node for node in model.graph.node if node.op_type == "Conv")
    assert [node.op_type for node in model.graph.node if convolution.output[0] in node.input] == ["Identity"]


def test_what_only_a_dropped_skip_needed_is_gone() -> None:
    block = make_block(READERS["block"], (3, 5), parts=("sample", "encoded"), gates=("encoded",))
    for treatments, is_left in (({}, True), ({"encoded": DROP}, False), ({"encoded": MEAN}, False)):
        engine = specialise(block.gated, treatments, draw_means(block))
        names = {tensor.name for tensor in onnx.load_model_from_string(engine.graph).graph.initializer}
        assert ("encoder" in names) is is_left
        assert block.error(engine, treatments, draw_means(block), 2, 5, 7) < 1e-5


@pytest.fixture(scope="session")
def tiny(shared: Path) -> Tiny:
    return tiny_of("attention", shared)


SEAMS: Mapping[str, tuple[int, int]] = {
    "skip:down_blocks.1.attentions.0→up_blocks.0.resnets.0": (16, 32),
    "skip:down_blocks.0.downsamplers.0.conv→up_blocks.0.resnets.1": (16, 24),
    "level:up_blocks.0.upsamplers.0": (8, 24),
}
"""Computed and total channels of some concatenations; with four groups, only the first has no mixed group."""


def test_engine_holds_no_copy_of_weights(tiny: Tiny) -> None:
    means = np.ones(tiny.gated.channels, dtype=np.float32)
    full = specialise(tiny.gated, {}, means)
    for name in SEAMS:
        engine = specialise(tiny.gated, {name: MEAN}, means)
        inline = [
            tensor
            for tensor in onnx.load_model_from_string(engine.graph).graph.initializer
            if not tensor.external_data and tensor.data_type == onnx.TensorProto.FLOAT
        ]
        assert max(np.prod(tensor.dims) for tensor in inline) <= 81
        assert engine.weights <= full.weights


@pytest.mark.parametrize("memory", Memory)
@pytest.mark.parametrize("treatment", [DROP, MEAN])
@pytest.mark.parametrize("name", SEAMS)
def test_onnxruntime_slices_the_weights_when_it_loads(
    tiny: Tiny, name: str, treatment: Treatment, memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "optimised.onnx"
    new_options = onnxruntime.SessionOptions

    def saving_options() -> onnxruntime.SessionOptions:
        options = new_options()
        options.optimized_model_filepath = str(path)
        # no processor-specific layout, which would pad channels to fit the registers
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        return options

    monkeypatch.setattr(onnxruntime, "SessionOptions", saving_options)
    engine = specialise(tiny.gated, {name: treatment}, np.linspace(-1, 1, tiny.gated.channels, dtype=np.float32))
    backend = open_backend("onnxruntime:cpu", threads=1, memory=memory)
    backend.open_weights(tiny.gated.weights.read_bytes()).load(engine)
    graph = onnx.load(path, load_external_data=False).graph  # mapped weights stay where they are
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    constant = [node.op_type for node in graph.node if all(value in shapes for value in node.input if value)]
    assert set(constant) <= {"Cast"}, "the definition of a norm casts its parameters; all else should be folded"
    computed, channels = SEAMS[name]
    read = {shapes[node.input[1]] for node in graph.node if node.op_type in {"Conv", "FusedConv"}}
    out = 8 if name.startswith("level") else 16
    for kernel in ((1, 1), (3, 3)):
        assert (out, computed, *kernel) in read
        assert (out, channels, *kernel) not in read


@pytest.mark.parametrize("treatment", [DROP, MEAN])
def test_what_takes_the_place_of_a_value_has_its_name(shared: Path, treatment: Treatment) -> None:
    tiny = tiny_of("cross-attention", shared)
    means = np.ones(tiny.gated.channels, np.float32)
    full = made_of_weights(specialise(tiny.gated, {}, means))
    for component in tiny.gated.components:
        if component.kind == "skip":
            engine = specialise(tiny.gated, {component.name: treatment}, means)
            assert PARTIAL.encode() in engine.graph, "nothing was narrowed"
            kept = {weight: name for weight, name in made_of_weights(engine).items() if weight in full}
            assert kept
            assert kept.items() <= full.items()


def made_of_weights(engine: SerialisedGraph) -> dict[str, str]:
    """Map the weight that each convolution or norm reads, whole or sliced, to the name of the result."""
    graph = onnx.load_model_from_string(engine.graph).graph
    sliced = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Slice"}
    found = {}
    for node in graph.node:
        if node.op_type in ("Conv", GROUP_NORM):
            weight = sliced.get(node.input[1], node.input[1])
            found[weight] = node.output[0].removesuffix(PARTIAL)
    return found

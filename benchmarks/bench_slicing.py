"""How fast is a residual block after dropping its skip, compared with a block built without one?

    python benchmarks/bench_slicing.py            # about 3 minutes on one thread

The benchmark times four engines of one block alternately: with the skip kept, dropped, or replaced by its mean, and a
block that never had one. Prints the results and writes `results/slicing.json`: the median times, and the median over
rounds of each engine's time relative to the last one.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from command_line import add_results
from result_file import write

from unetc.artifacts.call_input import SAMPLE
from unetc.artifacts.profile import Component
from unetc.artifacts.sizes import SampleSizes
from unetc.backend import DOMAIN, SerialisedGraph
from unetc.compiler.graph import group_norm
from unetc.compiler.graph.gate import OPSET
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.graph.weights import serialise
from unetc.runtime.backends.registry import Memory, open_backend
from unetc.tensors import save_tensors
from unetc.timing import interleaved_ms
from unetc.treatments import Treatment

HERE = Path(__file__).parent
SKIP = "skip"
NO_WEIGHTS = save_tensors({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A residual block after a concatenation, and the size of its input."""

    name: str
    trunk: int
    skip: int
    out: int
    groups: int
    size: int
    batch: int


CASES = (
    Case(name="digits, 4x4", trunk=128, skip=128, out=128, groups=8, size=4, batch=8),
    Case(name="digits, 8x8, uneven", trunk=128, skip=64, out=64, groups=8, size=8, batch=8),
    Case(name="digits, 16x16, uneven", trunk=64, skip=24, out=24, groups=8, size=16, batch=8),
    Case(name="digits, 32x32", trunk=16, skip=16, out=16, groups=8, size=32, batch=8),
    Case(name="Stable Diffusion, 32x32", trunk=320, skip=320, out=320, groups=32, size=32, batch=2),
    Case(name="Stable Diffusion, 32x32, uneven", trunk=640, skip=320, out=320, groups=32, size=32, batch=2),
    Case(name="Stable Diffusion, 16x16", trunk=640, skip=640, out=640, groups=32, size=16, batch=2),
    Case(name="Stable Diffusion, 16x16, uneven", trunk=1280, skip=640, out=640, groups=32, size=16, batch=2),
)
"""Blocks of the reference model and of Stable Diffusion; if uneven, a norm group mixes trunk and skip channels."""


def block(case: Case, *, with_skip: bool) -> ir.Model:
    """Build a residual block with random weights."""
    channels = case.trunk + (case.skip if with_skip else 0)
    gate = f"index=[0], begin=[0], end=[{case.skip}], per_sample=[-1, 1, 1, 1], per_channel=[1, -1, 1, 1]"
    join = f"""
        gated_skip = {DOMAIN}.Gate<{gate}>(skip, gates, means)
        joined = Concat<axis=1>(sample, gated_skip)"""
    inputs = f", float[b, {case.skip}, h, w] skip, float[b, c, 2] gates, float[n] means"
    norm = f"num_groups={case.groups}, epsilon=1e-5"
    text = f"""<ir_version: 10, opset_import: ["": {OPSET}, "{DOMAIN}": 1]>
        block (float[b, {case.trunk}, h, w] sample, float[b, {case.out}, 1, 1] embedding{inputs if with_skip else ""})
            => (float[b, {case.out}, h, w] out_sample) {{
        {join if with_skip else "joined = Identity(sample)"}
        normal1 = GroupNormalization<{norm}>(joined, scale1, shift1)
        sigmoid1 = Sigmoid(normal1)
        active1 = Mul(normal1, sigmoid1)
        inner = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(active1, weight1, bias1)
        timed = Add(inner, embedding)
        normal2 = GroupNormalization<{norm}>(timed, scale2, shift2)
        sigmoid2 = Sigmoid(normal2)
        active2 = Mul(normal2, sigmoid2)
        residual = Conv<kernel_shape=[3, 3], pads=[1, 1, 1, 1]>(active2, weight2, bias2)
        shortcut = Conv<kernel_shape=[1, 1]>(joined, weight3, bias3)
        out_sample = Add(shortcut, residual)
        }}"""
    rng = np.random.default_rng(0)
    shapes = {
        "weight1": (case.out, channels, 3, 3),
        "weight2": (case.out, case.out, 3, 3),
        "weight3": (case.out, channels, 1, 1),
        **dict.fromkeys(("scale1", "shift1"), (channels,)),
        **dict.fromkeys(("scale2", "shift2", "bias1", "bias2", "bias3"), (case.out,)),
    }
    proto = onnx.parser.parse_model(text)
    for name, shape in shapes.items():
        array = rng.standard_normal(shape, dtype=np.float32) / np.sqrt(np.prod(shape[1:], dtype=np.float32))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.serde.deserialize_model(proto)
    group_norm.from_onnx(model)
    return model


def engines(case: Case) -> Iterator[tuple[str, SerialisedGraph]]:
    """Specialise the block for each treatment, and build the native one."""
    component = Component(name=SKIP, kind="skip", owner="", index=0, channels=case.skip, axis=1, offset=0, nested=())
    gated = GatedGraph(
        model=block(case, with_skip=True),
        components=(component,),
        inputs=(SAMPLE, "embedding", SKIP),
        sizes=SampleSizes(multiple=1),
        folder=HERE,
    )
    means = np.random.default_rng(1).standard_normal(case.skip, dtype=np.float32)
    for treatment in (Treatment.KEEP, Treatment.DROP, Treatment.MEAN):
        yield treatment, specialise(gated, {SKIP: treatment}, means)
    yield "native", serialise(block(case, with_skip=False))


def measure(case: Case, *, memory: Memory, threads: int, rounds: int) -> dict[str, object]:
    """Time the engines of a block alternately."""
    rng = np.random.default_rng(2)
    inputs = {
        name: rng.standard_normal((case.batch, channels, size, size), dtype=np.float32)
        for name, channels, size in (
            (SAMPLE, case.trunk, case.size),
            (SKIP, case.skip, case.size),
            ("embedding", case.out, 1),
        )
    }
    output = np.empty((case.batch, case.out, case.size, case.size), dtype=np.float32)
    loader = open_backend("onnxruntime:cpu", threads=threads, memory=memory).open_weights(NO_WEIGHTS)

    def call(graph: SerialisedGraph) -> Callable[[], object]:
        program = loader.load(graph)
        return lambda: program(inputs, output)

    graphs = dict(engines(case))
    times = interleaved_ms([call(graph) for graph in graphs.values()], rounds=rounds)
    ratios = np.median(times / times[:, -1:], axis=0)
    return {
        **asdict(case),
        "memory": memory,
        "median_ms": dict(zip(graphs, np.median(times, axis=0).round(3).tolist(), strict=True)),
        "ratio_to_native": dict(zip(graphs, ratios.round(3).tolist(), strict=True)),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    add_results(parser)
    options = parser.parse_args()
    results = []
    for memory in Memory:
        for case in CASES:
            results.append(measure(case, memory=memory, threads=options.threads, rounds=options.rounds))
            print(json.dumps(results[-1]))
    record = {
        "load_average": os.getloadavg(),  # over the last 1, 5 and 15 minutes; each thread of this process counts as 1
        "results": results,
    }
    write(options.results, "slicing", record)


if __name__ == "__main__":
    main()

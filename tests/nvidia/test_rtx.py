"""The real library, which needs no GPU, builds or refuses small graphs, and its builds can be stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, parser
from safetensors.numpy import save

from unetc.backend import WEIGHTS
from unetc.compiler.tensorrt import builder
from unetc.compiler.tensorrt.messages import STEPS, BuildRequest
from unetc.compiler.tensorrt.supervise import CHILD, Outcome, build_engine
from unetc.errors import EngineBuildError
from unetc.nvidia.key import RECIPE, Effort
from unetc.nvidia.sizes import Range, Sizes

pytestmark = pytest.mark.rtx

HEAD = """<ir_version: 10, opset_import: ["": 23]>
engine (float[b, 4, h, 8] sample, float[b, 4, halved, 8] held_0) => (float[b, 4, h, 8] out)
<float[4, 4, 1, 1] weight = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}>"""
ATTENTION = "mixed = Conv(sample, weight)  out = Attention(mixed, held_0, held_0)"
DETERMINANT = "mixed = Conv(sample, weight)  odd = Det(held_0)  out = Add(mixed, odd)"
FIXED = Range(least=8, usual=8, most=8)
SIZES = Sizes(batch=Range(least=1, usual=2, most=4), height=Range(least=4, usual=8, most=8), width=FIXED)


@pytest.fixture(autouse=True)
def library() -> None:
    pytest.importorskip("tensorrt_rtx")


def write(folder: Path, body: str) -> BuildRequest:
    """Write a graph whose weight is stored in a safetensors file, as in a bundle."""
    model = parser.parse_model(f"{HEAD} {{ {body} }}")
    model.graph.input[1].type.tensor_type.shape.dim[2].dim_param = "((h - 1)//2) + 1"
    (weight,) = model.graph.initializer
    weight.ClearField("float_data")
    weight.data_location = TensorProto.EXTERNAL
    data = save({"weight": np.ones((4, 4, 1, 1), np.float32)})
    (folder / WEIGHTS).write_bytes(data)
    for key, value in {"location": WEIGHTS, "offset": len(data) - 64, "length": 64}.items():
        weight.external_data.add(key=key, value=str(value))
    (folder / "engine.onnx").write_bytes(model.SerializeToString())
    return BuildRequest(
        target="tensorrt-rtx",
        graph="engine.onnx",
        engine="engine.trt",
        timing="timing.cache",
        sizes=SIZES,
        rows={},
        effort=Effort(),
    )


def build(request: BuildRequest, folder: Path, told: list[int], command: tuple[str, ...] = CHILD) -> Outcome:
    return build_engine(request, folder, time_limit_s=300, on_advance=told.append, command=command)


def test_attention_in_float32_is_built_of_plain_operators(tmp_path: Path) -> None:
    told: list[int] = []
    outcome = build(write(tmp_path, ATTENTION), tmp_path, told)
    assert outcome.tries == 1
    assert outcome.engine.stat().st_size > 0
    assert outcome.built.shapes == {
        "sample": ((1, 4, 4, 8), (2, 4, 8, 8), (4, 4, 8, 8)),
        "held_0": ((1, 4, 2, 8), (2, 4, 4, 8), (4, 4, 4, 8)),
    }
    assert told == sorted(told)
    assert len(set(told)) > 5
    assert told[-1] <= STEPS


def test_the_caller_gives_all_memory_at_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only then can engines be captured; engines that were built otherwise have another `RECIPE`."""
    import tensorrt_rtx

    asked: list[bool] = []
    make = tensorrt_rtx.Builder.build_serialized_network

    def note(self: object, network: object, config: Any) -> object:
        asked.append(config.get_flag(tensorrt_rtx.BuilderFlag.REQUIRE_USER_ALLOCATION))
        return make(self, network, config)

    monkeypatch.setattr(tensorrt_rtx.Builder, "build_serialized_network", note)
    builder.build(write(tmp_path, ATTENTION), tmp_path, lambda done: True)
    assert (asked, RECIPE) == ([True], 2)


def test_a_library_that_cannot_start_is_an_error_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx

    def start(logger: Any) -> Any:
        logger.log(tensorrt_rtx.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(tensorrt_rtx, "Runtime", start)
    built = builder.build(write(tmp_path, ATTENTION), tmp_path, lambda done: True)
    assert built.scratch_bytes is None
    monkeypatch.setattr(tensorrt_rtx, "Builder", start)
    with pytest.raises(EngineBuildError, match="tensorrt_rtx cannot start: CUDA initialization failure with error: 35"):
        builder.build(write(tmp_path, ATTENTION), tmp_path, lambda done: True)


def test_the_weights_are_those_beside_the_graph(tmp_path: Path) -> None:
    request = write(tmp_path, ATTENTION)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-8])
    with pytest.raises(EngineBuildError, match="refuses the graph"):
        build(request, tmp_path, [])
    (tmp_path / WEIGHTS).write_bytes(whole[:-64] + np.full(16, 2, np.float32).tobytes())
    twos = build(request, tmp_path, []).engine.read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole)
    ones = build(request, tmp_path, []).engine.read_bytes()
    assert np.full(16, 2, np.float32).tobytes() in twos
    assert np.full(16, 2, np.float32).tobytes() not in ones


def test_an_operator_that_the_parser_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"refuses the graph.*Det"):
        build(write(tmp_path, DETERMINANT), tmp_path, [])
    assert not (tmp_path / "engine.trt").exists()


def test_a_full_disk_is_said_and_not_tried_again(tmp_path: Path) -> None:
    told: list[int] = []
    full = ("bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *CHILD)  # KiB that a file may have
    with pytest.raises(EngineBuildError, match=r"^cannot read or write .*: File too large. Set TMPDIR to a folder"):
        build(write(tmp_path, ATTENTION), tmp_path, told, full)
    assert told.count(0) == 1

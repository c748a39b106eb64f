"""Engines are run as the documentation of TensorRT demands; checked with its stand-in for the CPU."""

from __future__ import annotations

import enum
import gc
import inspect
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import Tiny, tiny_of
from tests.stand_ins import tensorrt_on_cpu
from tests.stand_ins.cuda_on_cpu import Cuda
from tests.stand_ins.tensorrt_on_cpu import LIBRARY, CpuTensorRt
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.errors import SessionError, ShapeMismatch
from unetc.nvidia.cache import EngineCache
from unetc.nvidia.kernels import KernelFile
from unetc.nvidia.sizes import Range, Sizes
from unetc.precision import Precision
from unetc.runtime.backends.cuda_graph import CaptureCheck
from unetc.runtime.backends.registry import Memory
from unetc.runtime.backends.tensorrt import Engine, Execution, TensorRtBackend
from unetc.runtime.bundle import Bundle
from unetc.runtime.engine_pool import LoadedLater
from unetc.runtime.session import Session

pytestmark = pytest.mark.without_gpu  # on a GPU, the real library is tested

SIDE = Range(least=8, usual=16, most=16)
CALLS = MeasuredCalls(sizes=Sizes(batch=Range(least=1, usual=2, most=3), height=SIDE, width=SIDE), rows={})


@pytest.fixture(autouse=True)
def _streams(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_on_cpu.without_streams(monkeypatch)


@pytest.fixture(scope="module")
def tiny(shared: Path) -> Tiny:
    return tiny_of("attention", shared)


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Record the execution contexts that are made."""
    made: list[Any] = []
    make = tensorrt_on_cpu.ICudaEngine.create_execution_context

    def record(self: Any, how: Any) -> Any:
        made.append(make(self, how))
        return made[-1]

    monkeypatch.setattr(tensorrt_on_cpu.ICudaEngine, "create_execution_context", record)
    yield made
    made.clear()


def load(tiny: Tiny, folder: Path, memory: Memory = Memory.FAST) -> Any:
    backend = CpuTensorRt(LIBRARY, memory, CALLS, EngineCache(folder))
    graph = specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32))
    return backend.open_weights(tiny.gated.weights.read_bytes()).load(graph)


def run(tiny: Tiny, program: Any, batch: int = 2, side: int = 16) -> torch.Tensor:
    inputs = {name: torch.from_numpy(v) for name, v in tiny.inputs(batch=batch, height=side, width=side).items()}
    output = torch.full((batch, tiny.gated.predicted_channels, side, side), torch.nan)
    assert program(inputs, output) == {}
    return output


def test_every_shape_has_a_context_of_its_own(tiny: Tiny, tmp_path: Path, contexts: list[Any]) -> None:
    program = load(tiny, tmp_path)
    first = run(tiny, program)
    for batch, side in ((1, 8), (2, 16), (1, 8)):
        run(tiny, program, batch, side)
    assert torch.equal(run(tiny, program), first)
    assert [context.shapes["sample"][::2] for context in contexts] == [(2, 16), (1, 8)]
    assert all(context.user_managed for context in contexts)


def test_low_memory_has_one_context_and_lets_the_engine_go(tiny: Tiny, tmp_path: Path, contexts: list[Any]) -> None:
    expected = run(tiny, load(tiny, tmp_path))
    contexts.clear()
    program = load(tiny, tmp_path, Memory.LOW)
    assert isinstance(program, LoadedLater)
    assert contexts == []
    run(tiny, program, 1, 8)
    assert torch.equal(run(tiny, program), expected)
    (engine,) = (weakref.ref(context.engine) for context in contexts)
    contexts.clear()
    assert engine() is not None
    program.release()
    gc.collect()
    assert engine() is None
    assert torch.equal(run(tiny, program), expected)


def test_finished_kernels_are_there_at_the_next_start(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    given: list[bytes] = []
    take = tensorrt_on_cpu.IRuntimeCache.deserialize
    monkeypatch.setattr(
        tensorrt_on_cpu.IRuntimeCache, "deserialize", lambda self, blob: given.append(blob) or take(self, blob)
    )
    run(tiny, load(tiny, tmp_path))
    assert given == []
    run(tiny, load(tiny, tmp_path))
    assert given == [tensorrt_on_cpu.KERNELS]
    (kept,) = tmp_path.glob("*/kernels-*")
    assert kept.read_bytes().endswith(tensorrt_on_cpu.KERNELS)


def test_a_session_runs_the_engines_that_take_one_sample_of_its_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, side = Bundle.open(tiny_bundle), Range(least=16, usual=16, most=16)
    for least, most in ((1, 2), (4, 8)):
        sizes = Sizes(batch=Range(least=least, usual=least, most=most), height=side, width=side)
        backend = CpuTensorRt(LIBRARY, Memory.FAST, MeasuredCalls(sizes=sizes, rows={}), EngineCache(tmp_path))
        session = Session.of(bundle, backend)
    assert session.sample().shape == (1, 1, 16, 16)


def test_a_call_out_of_range_never_reaches_the_library(tiny: Tiny, tmp_path: Path, contexts: list[Any]) -> None:
    program = load(tiny, tmp_path)
    with pytest.raises(ShapeMismatch, match="--batch 1,2,4"):
        run(tiny, program, batch=4)
    assert contexts == []


def test_what_the_library_says_is_the_error(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    program = load(tiny, tmp_path)
    monkeypatch.setattr(tensorrt_on_cpu, "SCRATCH_BYTES", 2**20)
    monkeypatch.setattr(tensorrt_on_cpu.IExecutionContext, "set_device_memory", lambda *given: None)
    with pytest.raises(SessionError, match=r"tests.stand_ins.tensorrt_on_cpu failed: no scratch memory"):
        run(tiny, program)
    monkeypatch.setattr(tensorrt_on_cpu.Runtime, "deserialize_cuda_engine", lambda self, serialized: self.refuse())
    monkeypatch.setattr(
        tensorrt_on_cpu.Runtime, "refuse", lambda self: self.logger.log(1, "of another GPU"), raising=False
    )
    with pytest.raises(SessionError, match=r"cannot load an engine: of another GPU\..* 8.0 .*--on-this-gpu"):
        load(tiny, tmp_path)


def test_a_shape_that_the_library_refuses_is_the_error(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    def refuse(context: Any, name: str, shape: Any) -> bool:
        message = f"{name} is out of the call ranges"
        context.engine.logger.log(tensorrt_on_cpu.ILogger.Severity.ERROR, message)
        return False

    program = load(tiny, tmp_path)
    monkeypatch.setattr(tensorrt_on_cpu.IExecutionContext, "set_input_shape", refuse)
    with pytest.raises(SessionError, match=r"tests.stand_ins.tensorrt_on_cpu failed: sample is out of the call ranges"):
        run(tiny, program)


def test_a_library_that_misses_the_driver_is_the_error(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    def start(logger: Any) -> Any:
        logger.log(tensorrt_on_cpu.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(tensorrt_on_cpu, "Runtime", start)
    with pytest.raises(SessionError, match=r"cannot load an engine: CUDA initialization failure with error: 35"):
        load(tiny, tmp_path)


def test_what_needs_another_goes_before_it(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    gone: list[str] = []

    def watch(owner: Any, name: str) -> None:
        make = getattr(owner, name)

        def watched(*given: Any) -> Any:
            made = make(*given)
            weakref.finalize(made, gone.append, name)
            return made

        monkeypatch.setattr(owner, name, watched)

    watch(tensorrt_on_cpu.ICudaEngine, "create_execution_context")
    watch(tensorrt_on_cpu.ICudaEngine, "create_runtime_config")
    watch(tensorrt_on_cpu.IRuntimeConfig, "create_runtime_cache")
    watch(tensorrt_on_cpu.Runtime, "deserialize_cuda_engine")
    for memory in Memory:
        program = load(tiny, tmp_path, memory)
        run(tiny, program)
        del program
        gc.collect()
        assert gone == [
            "create_execution_context",
            "create_runtime_config",
            "create_runtime_cache",
            "deserialize_cuda_engine",
        ]
        gone.clear()


def test_inputs_are_taken_as_they_lie(tiny: Tiny, tmp_path: Path) -> None:
    """Strided inputs, and inputs at unaligned addresses, are copied first."""
    program = load(tiny, tmp_path)
    expected = run(tiny, program)
    sample = torch.from_numpy(tiny.inputs(batch=2, height=16, width=16)["sample"])
    timestep = torch.from_numpy(tiny.inputs(batch=2, height=16, width=16)["timestep"])
    padded = torch.empty(2, 3, 16, 32)[:, : sample.shape[1], :, 3:19]
    padded.copy_(sample)
    output = torch.full((2, tiny.gated.predicted_channels, 16, 16), torch.nan)
    program({"sample": padded, "timestep": timestep}, output)
    assert torch.equal(output, expected)


def test_the_library_is_asked_whether_calls_can_be_captured(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    load(tiny, tmp_path)
    engines = EngineCache(tmp_path)
    record, serialized = engines.open(engines.records()[0].key)
    execution = Execution(
        Engine(LIBRARY, serialized, KernelFile(engines, record, LIBRARY.origin())), torch.device("cpu")
    )
    assert isinstance(execution, CaptureCheck)
    assert not execution.is_capturable()
    monkeypatch.delattr(tensorrt_on_cpu.IExecutionContext, "is_stream_capturable")  # as with tensorrt
    assert execution.is_capturable()


def test_an_engine_is_loaded_on_the_gpu_of_the_target_in_any_thread(
    tiny: Tiny, tmp_path: Path, monkeypatch: Any
) -> None:
    load(tiny, tmp_path)
    engines = EngineCache(tmp_path)
    (record,) = engines.records()
    Cuda().install(monkeypatch)
    backend = TensorRtBackend(
        LIBRARY, Precision.FP32, here=LIBRARY.origin(), engines=engines, gpu=torch.device("cuda", 1), memory=Memory.LOW
    )
    where: list[int] = []
    deserialize = tensorrt_on_cpu.Runtime.deserialize_cuda_engine

    def note(self: Any, serialized: bytes) -> Any:
        where.append(torch.cuda.current_device())
        return deserialize(self, serialized)

    monkeypatch.setattr(tensorrt_on_cpu.Runtime, "deserialize_cuda_engine", note)
    backend.open_weights(tiny.gated.weights.read_bytes()).load_engine(*engines.open(record.key))
    assert where == [1]
    assert torch.cuda.current_device() == 0


@pytest.mark.rtx
def test_the_real_library_has_what_its_stand_in_has() -> None:
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    checked = 0
    for name, own in inspect.getmembers(tensorrt_on_cpu, inspect.isclass):
        if own.__module__ != tensorrt_on_cpu.__name__ or name in {"CpuTensorRt", "CpuLoader"}:
            continue
        real = getattr(tensorrt_rtx, name)
        members = own.__members__ if issubclass(own, enum.Enum) else vars(own)
        for member in members:
            if not member.startswith("_") and member not in OWN:
                assert hasattr(real, member), f"{name}.{member}"
                checked += 1
    assert checked > 30


OWN = {"engine", "user_managed", "shapes", "addresses", "scratch", "kernels", "strategy", "cache", "session"}
"""Fields that only the stand-in has."""

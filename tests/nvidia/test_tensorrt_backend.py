"""Engines are found, refused, and handed to the real library; most of this is checked without a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from tests.every_day import every_nth
from tests.models import tiny_of
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.tensorrt.compile_bundle import compile_bundle
from unetc.compiler.tensorrt.on_demand import BuildingBackend
from unetc.compiler.tensorrt.options import CompileOptions
from unetc.errors import SessionError, ShapeMismatch, StaleEngineError
from unetc.nvidia.cache import EngineCache
from unetc.nvidia.call_ranges import check_call
from unetc.nvidia.kernels import KernelFile
from unetc.nvidia.library import library_of
from unetc.nvidia.sizes import Range, Sizes
from unetc.precision import Precision
from unetc.runtime.backends.registry import Memory, open_backend
from unetc.runtime.backends.tensorrt import Engine, Execution, TensorRtBackend
from unetc.runtime.backends.torch_device import gpu_of
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session

pytestmark = pytest.mark.rtx

TARGET = "tensorrt-rtx"


@pytest.fixture(scope="module")
def cache(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("cache")
    compile_bundle(tiny_bundle, CompileOptions(target=TARGET, batch="1,2"), cache=folder)
    return folder


@pytest.fixture
def backend(cache: Path) -> TensorRtBackend:
    return backend_of(EngineCache(cache / "engines"))


def backend_of(
    engines: EngineCache, precision: Precision = Precision.FP32, memory: Memory = Memory.FAST, **origin: str
) -> TensorRtBackend:
    """Make a backend as on a GPU; without a GPU, the library is the first to fail."""
    library = library_of(TARGET)
    gpu = gpu_of(TARGET) if torch.cuda.is_available() else torch.device("cpu")
    here = msgspec.structs.replace(library.origin(), **origin)
    return TensorRtBackend(library, precision, here=here, engines=engines, gpu=gpu, memory=memory)


@pytest.mark.without_gpu
def test_without_a_gpu_the_target_says_what_to_do(cache: Path) -> None:
    with pytest.raises(SessionError, match=r"target tensorrt-rtx needs an NVIDIA GPU.*or use onnxruntime:cpu"):
        open_backend(TARGET, threads=1)


@pytest.mark.without_gpu
@pytest.mark.parametrize("memory", Memory)
def test_an_engine_that_is_found_reaches_the_library_which_misses_the_gpu(
    cache: Path, tiny_bundle: Path, memory: Memory
) -> None:
    backend = backend_of(EngineCache(cache / "engines"), memory=memory)
    with pytest.raises(SessionError, match=r"tensorrt_rtx [\d.]+ cannot load an engine: .*(?i:cuda)"):
        Session.of(Bundle.open(tiny_bundle), backend)


@pytest.mark.gpu
def test_an_engine_that_is_found_is_loaded_and_captured(
    cache: Path, tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    bundle, engines = Bundle.open(tiny_bundle), EngineCache(cache / "engines")
    session = Session.of(bundle, backend_of(engines))
    streamed = Session.of(bundle, backend_of(engines, memory=Memory.LOW))
    np.testing.assert_array_equal(streamed.sample(2), session.sample(2))
    with pytest.raises(ShapeMismatch, match="unetc compile BUNDLE --target tensorrt-rtx --batch 1,2,3"):
        session.sample(3)
    assert "no CUDA graph" not in caplog.text


@pytest.mark.gpu
def test_finished_kernels_are_stored_and_used_at_the_next_start(
    cache: Path, tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    bundle, engines = Bundle.open(tiny_bundle), EngineCache(cache / "engines")
    first = Session.of(bundle, backend_of(engines)).sample(2)
    kept = {path: path.read_bytes() for path in (cache / "engines").glob("*/kernels-*")}
    assert kept
    with caplog.at_level("INFO"):
        np.testing.assert_array_equal(Session.of(bundle, backend_of(engines)).sample(2), first)
    assert "made again" not in caplog.text
    assert {path: path.read_bytes() for path in (cache / "engines").glob("*/kernels-*")} == kept


@pytest.mark.gpu
def test_a_shape_outside_the_call_ranges_is_an_error_that_quotes_the_library(cache: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    engines, library, gpu = EngineCache(cache / "engines"), library_of(TARGET), gpu_of(TARGET)
    record, serialized = engines.open(engines.records()[0].key)
    engine = Engine(library, serialized, KernelFile(engines, record, library.here()))
    largest = {name: most for name, (_, _, most) in record.shapes.items()}
    shapes = [tuple(2 * size if i == 0 else size for i, size in enumerate(largest[name])) for name in engine.inputs]
    with pytest.raises(RuntimeError) as caught:
        Execution(engine, gpu)(*(torch.zeros(shape, device=gpu) for shape in shapes))
    assert str(caught.value) not in ("", "it gives no reason")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"library": "1.7.0"}, "1 for library .*here"),
        ({"unetc": "0.0.9"}, "1 for unetc .*here"),
        ({"platform": "Windows AMD64"}, "1 for platform .*here"),
        ({"target": "tensorrt"}, "no tensorrt engine in fp32"),
    ],
)
def test_an_engine_for_another_place_is_never_loaded(
    cache: Path, tiny_bundle: Path, changed: dict[str, str], message: str
) -> None:
    with pytest.raises(StaleEngineError, match=rf"{message}.*unetc compile BUNDLE --target"):
        Session.of(Bundle.open(tiny_bundle), backend_of(EngineCache(cache / "engines"), **changed))


def test_an_engine_of_another_precision_or_other_weights_is_never_loaded(cache: Path, tiny_bundle: Path) -> None:
    bundle, engines = Bundle.open(tiny_bundle), EngineCache(cache / "engines")
    graph = bundle.graph_of(bundle.manifest.full)
    with pytest.raises(StaleEngineError, match="unetc compile BUNDLE --target tensorrt-rtx --precision fp16"):
        backend_of(engines, Precision.FP16).open_weights(bundle.weights).load(graph)
    with pytest.raises(StaleEngineError, match="no tensorrt-rtx engine in fp32 of this graph"):
        backend_of(engines).open_weights(bundle.weights + b" ").load(graph)


def test_an_engine_of_others_is_never_loaded(cache: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(cache / "engines", tmp_path / "engines", ignore=shutil.ignore_patterns("secret"))
    with pytest.raises(StaleEngineError, match=r"1 not built here \(loading one runs code"):
        Session.of(Bundle.open(tiny_bundle), backend_of(EngineCache(tmp_path / "engines")))


def test_the_range_of_a_built_engine_decides_what_it_takes(cache: Path, tiny_bundle: Path) -> None:
    for record in EngineCache(cache / "engines").records():
        shapes = {name: most for name, (_, _, most) in record.shapes.items()}
        check_call(record, shapes)
        with pytest.raises(ShapeMismatch, match=r"--batch 1,2,3 --height 16 --width 16"):
            check_call(record, shapes | {"sample": (3, 1, 16, 16)})


@pytest.mark.without_gpu
@pytest.mark.parametrize("form", every_nth(3, ["remembering", "runnable", "observing"]))
def test_what_an_analysis_runs_is_built_once_and_reaches_the_library(
    shared: Path, cache: Path, tmp_path: Path, form: str
) -> None:
    tiny = tiny_of("cross-attention", shared)
    side = Range(least=8, usual=8, most=8)
    rows = {name: array.shape[1:] for name, array in tiny.inputs(batch=1, height=8, width=8).items()}
    calls = MeasuredCalls(sizes=Sizes(batch=Range(least=1, usual=2, most=4), height=side, width=side), rows=rows)
    engines = EngineCache(tmp_path)
    told: list[str] = []
    backend = BuildingBackend(backend_of(engines), calls, frozenset(), lambda progress: told.append(progress.stage))
    loader = backend.open_weights(tiny.gated.weights.read_bytes())
    graph = getattr(tiny.gated, form)()
    for stages in ({"build an engine"}, set()):
        told.clear()
        with pytest.raises(SessionError, match=r"cannot load an engine: .*(?i:cuda)"):
            loader.load(graph)
        assert {*told} == stages
    (record,) = engines.records()
    assert record.shapes["sample"][2][0] == record.shapes["gates"][2][0] == 4

"""Modules are captured once for each shape; graphs of several loaders, threads and streams do each other no harm."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import Reuse, Tiny, relative_error, tiny_of
from tests.stand_ins.cuda_on_cpu import DEVICE, PRIVATE, Cuda, Stream
from unetc.backend import Array, Backend
from unetc.compiler.graph.specialise import specialise
from unetc.runtime.backends.cuda_graph import KEPT_GRAPHS, CapturedModule, Pool
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.backends.torch_device import Module, TorchDevice, gpu_of
from unetc.runtime.batching.limits import BatchLimits
from unetc.treatments import Treatment

CPU = torch.device("cpu")


class Modules:
    """Makes modules, counts them, and records the tensors that they are called with."""

    def __init__(self, inside: Callable[[], None] = lambda: None) -> None:
        self.made = 0
        self.inside = inside
        self.inputs: list[Tensor] = []

    def __call__(self) -> Module:
        self.made += 1

        def double(tensor: Tensor) -> tuple[Tensor, ...]:
            self.inside()
            self.inputs.append(tensor)
            return (2 * tensor,)

        return double


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    cuda.install(monkeypatch)
    return cuda


@pytest.mark.without_gpu
def test_what_cannot_be_captured_is_called_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    modules = Modules()
    captured = CapturedModule(modules, Pool(CPU))
    for value in (1.0, 3.0):
        (result,) = captured(torch.full((2,), value))
        assert result.tolist() == [2 * value] * 2
    assert modules.made == 1
    assert caplog.text.count("no CUDA graph could be captured") == 1


@pytest.mark.without_gpu
def test_every_shape_has_a_module_of_its_own_and_those_used_last_are_kept() -> None:
    modules = Modules()
    captured = CapturedModule(modules, Pool(CPU))
    sizes = range(1, KEPT_GRAPHS + 1)
    for size in (*sizes, *reversed(sizes)):
        captured(torch.ones(size))
    assert modules.made == KEPT_GRAPHS
    captured(torch.ones(KEPT_GRAPHS + 1))
    for size in sizes[:-1]:
        captured(torch.ones(size))
    assert modules.made == KEPT_GRAPHS + 1
    captured(torch.ones(KEPT_GRAPHS))
    assert modules.made == KEPT_GRAPHS + 2


def test_graphs_of_all_calls_that_a_server_prepares_are_kept() -> None:
    assert len(BatchLimits(rows=64).prepared) <= KEPT_GRAPHS


@pytest.mark.without_gpu
def test_a_graph_that_goes_takes_no_memory_of_others_along(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Stream(0)  # one of the 32 that torch returns in turns
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: one)
    first, second = (CapturedModule(Modules(cuda.multiply), Pool(DEVICE)) for _ in range(2))
    first(torch.ones(1))
    second(torch.ones(1))
    del first
    gc.collect()
    second(torch.ones(1))
    second(torch.ones(2))
    second(torch.ones(1))


@pytest.mark.without_gpu
def test_graphs_of_a_pool_share_no_workspace_that_one_of_them_takes_along(cuda: Cuda) -> None:
    captured = CapturedModule(Modules(cuda.multiply), Pool(DEVICE))
    for size in (1, 2, 3, 4, 5, 2):
        captured(torch.ones(size))


@pytest.mark.without_gpu
def test_turns_in_several_streams_follow_each_other(cuda: Cuda) -> None:
    captured = CapturedModule(Modules(), Pool(DEVICE))
    for stream in (Stream(0), Stream(0), cuda.defaults[0]):
        cuda.set(stream)
        captured(torch.ones(1))


@pytest.mark.without_gpu
def test_a_graph_runs_to_its_end_before_it_goes(cuda: Cuda) -> None:
    captured = CapturedModule(Modules(), Pool(DEVICE))
    for size in range(1, KEPT_GRAPHS + 2):
        captured(torch.ones(size))
    assert cuda.log == [
        *["a graph is captured"] * KEPT_GRAPHS,
        "the process waits",
        "a graph is deleted",
        "a graph is captured",
    ]


@pytest.mark.without_gpu
def test_loaders_capture_one_after_the_other_and_nobody_waits_for_the_gpu_meanwhile(cuda: Cuda) -> None:
    loaders = [CapturedModule(Modules(lambda: time.sleep(0.01)), Pool(DEVICE)) for _ in range(3)]
    device = TorchDevice(DEVICE)
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(loader, torch.ones(1)) for loader in loaders]
        for call in calls:
            while not call.done():
                device.synchronize()
            call.result()


@pytest.mark.without_gpu
def test_a_capture_that_fails_leaves_nothing_behind(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(DEVICE)
    whole = CapturedModule(Modules(cuda.multiply), pool)
    whole(torch.ones(1))
    (result,) = CapturedModule(Modules(cuda.spoil), pool)(torch.ones(1))
    assert result.tolist() == [2]
    assert "one by one: operation not permitted when stream is capturing" in caplog.text
    assert cuda.current is cuda.defaults[0]
    assert cuda.recording == set()
    assert cuda.released == [1]
    caplog.clear()
    for size in (1, 2):
        whole(torch.ones(size))
    assert caplog.text == ""


@pytest.mark.without_gpu
def test_what_says_that_it_cannot_be_captured_is_not(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(DEVICE)
    asked: list[Stream] = []

    class Refusing:
        def __call__(self, tensor: Tensor) -> tuple[Tensor, ...]:
            cuda.spoil()
            return (2 * tensor,)

        def is_capturable(self) -> bool:
            asked.append(cuda.current)
            return False

    (result,) = CapturedModule(Refusing, pool)(torch.ones(1))
    assert result.tolist() == [2]
    assert asked == [pool.stream]
    assert "one by one: its library says that it cannot be captured" in caplog.text


@pytest.mark.without_gpu
def test_all_shapes_are_tried_and_captured_in_one_stream(cuda: Cuda) -> None:
    captured = CapturedModule(Modules(), Pool(DEVICE))
    for size in (1, 2, 3):
        captured(torch.ones(size))
    assert cuda.streams_made == 1


@pytest.mark.without_gpu
def test_a_thread_runs_on_the_gpu_of_the_target_whatever_its_own_is(cuda: Cuda) -> None:
    with cuda.on(1):
        gpu = gpu_of("torch:cuda")
    inside: list[int] = []

    def note() -> None:
        inside.append(torch.cuda.current_device())
        cuda.spoil()

    captured = CapturedModule(Modules(note), Pool(gpu))
    captured(torch.ones(1))  # tries, is refused and runs
    assert inside == [1] * 5
    cuda.defaults[1].before.add(-1)
    with TorchDevice(gpu).stream():
        assert (torch.cuda.current_device(), cuda.current.device, cuda.current.before) == (1, 1, {-1})
    assert (torch.cuda.current_device(), cuda.current) == (0, cuda.defaults[0])


@pytest.mark.without_gpu
def test_threads_that_come_together_share_the_stream_of_a_device(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.cuda.Stream

    def slowly(device: Any) -> Any:
        time.sleep(0.02)
        return make(device)

    monkeypatch.setattr(torch.cuda, "Stream", slowly)
    device, together = TorchDevice(DEVICE), threading.Barrier(4)

    def request() -> Stream:
        together.wait()
        with device.stream():
            return cuda.current

    with ThreadPoolExecutor(4) as threads:
        streams = {call.result() for call in [threads.submit(request) for _ in range(4)]}
    assert len(streams) == 1


@pytest.mark.without_gpu
def test_what_is_the_same_tensor_as_before_is_not_copied_into_a_graph_again(cuda: Cuda) -> None:
    modules = Modules()
    captured = CapturedModule(modules, Pool(DEVICE))
    given = torch.ones(3)
    captured(given)
    own = modules.inputs[-1]  # the memory that the graph reads
    calls = len(modules.inputs)

    def copied(tensor: Tensor) -> bool:
        own.fill_(-1)
        captured(tensor)
        assert own.tolist() in ([-1.0] * 3, tensor.tolist())
        return own.tolist() == tensor.tolist()

    assert not copied(given)
    given.add_(1)
    assert copied(given)
    assert not copied(given)
    given[0] = 5
    assert copied(given)
    assert copied(given.clone())
    assert copied(given)
    assert copied(given[:])  # a new view is the only sign of a kernel's writes
    with torch.inference_mode():  # torch does not count the writes to its tensors
        frozen = torch.ones(3)
    assert copied(frozen)
    assert copied(frozen)
    values = given.tolist()
    del given
    gc.collect()
    assert copied(torch.tensor(values))
    assert len(modules.inputs) == calls, "the module was called instead of the graph"


@pytest.mark.without_gpu
def test_a_graph_that_is_captured_in_inference_mode_serves_outside_of_it(cuda: Cuda) -> None:
    modules = Modules()
    captured = CapturedModule(modules, Pool(DEVICE))
    with torch.inference_mode():
        captured(torch.ones(2))
    own = modules.inputs[-1]  # the memory that the graph reads
    captured(torch.full((2,), 3.0))
    assert own.tolist() == [3, 3]
    with torch.inference_mode():
        captured(torch.full((2,), 4.0))
    assert own.tolist() == [4, 4]
    assert cuda.log == ["a graph is captured"]


def test_torch_declares_what_is_private_to_it() -> None:
    declared = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    for name in PRIVATE:
        assert f"def {name}(" in declared


@pytest.fixture
def backend() -> Backend:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    return open_backend("torch:cuda", threads=1)


class Loaded:
    """A full model with a separate loader, and therefore a separate pool."""

    def __init__(self, tiny: Tiny, backend: Backend) -> None:
        self._tiny = tiny
        self._device = backend.device
        graph = specialise(tiny.gated, {}, np.zeros(tiny.gated.channels, np.float32))
        self._program = backend.open_weights(tiny.gated.weights.read_bytes()).load(graph)

    def __call__(self, batch: int) -> Array:
        inputs = {name: self._device.put(v) for name, v in self._tiny.inputs(batch=batch, height=8, width=8).items()}
        output = self._device.full((batch, self._tiny.gated.predicted_channels, 8, 8), np.nan)
        self._program(inputs, output)
        return self._device.to_array(output)


@pytest.mark.gpu
def test_a_loader_that_goes_takes_nothing_of_another_along(
    shared: Path, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = tiny_of("cross-attention", shared)
    first, second = Loaded(tiny, backend), Loaded(tiny, backend)
    first(2)
    expected = second(2)
    del first
    gc.collect()
    torch.cuda.empty_cache()
    second(3)  # a capture also empties the memory cache
    np.testing.assert_array_equal(second(2), expected)
    assert np.isfinite(expected).all()
    assert "no CUDA graph" not in caplog.text


@pytest.mark.gpu
def test_graphs_that_were_let_go_are_captured_again(shared: Path, backend: Backend) -> None:
    tiny = tiny_of("cross-attention", shared)
    model, host = Loaded(tiny, backend), Loaded(tiny, open_backend("torch:cpu", threads=1))
    results = {batch: model(batch) for batch in (1, 2, 3, 4, 5)}
    for batch in (2, 1, 5, 2):
        np.testing.assert_allclose(model(batch), results[batch], rtol=1e-4, atol=1e-5)
        assert relative_error(model(batch), host(batch)) < 1e-2


@pytest.mark.gpu
def test_after_a_capture_that_failed_others_succeed(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    gpu = gpu_of("torch:cuda")
    pool, around = Pool(gpu), torch.cuda.current_stream()

    def reads_back(tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor * float(tensor.sum()),)

    (result,) = CapturedModule(lambda: reads_back, pool)(torch.ones(2, device=gpu))
    assert result.tolist() == [2, 2]
    assert caplog.text.count("no CUDA graph could be captured") == 1
    assert torch.cuda.current_stream() == around
    weight = torch.full((64, 64), 0.5, device=gpu)
    whole = CapturedModule(lambda: lambda tensor: (tensor @ weight,), pool)
    for rows in (1, 2, 1):
        (result,) = whole(torch.ones(rows, 64, device=gpu))
        assert result.tolist() == [[32.0] * 64] * rows
    assert caplog.text.count("no CUDA graph could be captured") == 1


@pytest.mark.gpu
def test_turns_in_several_streams_do_not_mix_on_a_gpu(backend: Backend) -> None:
    gpu = gpu_of("torch:cuda")
    weight = torch.full((512, 512), 1 / 512, device=gpu)

    def multiply(tensor: Tensor) -> tuple[Tensor, ...]:
        for _ in range(20):  # long enough for the next turn to begin
            tensor = tensor @ weight
        return (tensor,)

    pool = Pool(gpu)
    modules = [CapturedModule(lambda: multiply, pool) for _ in range(2)]
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(gpu), torch.cuda.Stream(gpu)]
    inputs = [torch.full((4, 512), float(value), device=gpu) for value in range(6)]
    torch.cuda.synchronize()
    results = []
    for i, tensor in enumerate(inputs):
        with torch.cuda.stream(streams[i % 3]):
            results += modules[i % 2](tensor)
    torch.cuda.synchronize()
    for tensor, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_a_graph_sees_every_change_of_its_inputs_on_a_gpu(backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    gpu = gpu_of("torch:cuda")
    captured = CapturedModule(Modules(), Pool(gpu))
    with torch.inference_mode():
        captured(torch.ones(3, device=gpu))
    given = torch.ones(3, device=gpu)
    for change in (lambda: None, lambda: None, lambda: given.add_(1), lambda: given[0].fill_(5), lambda: None):
        change()
        for tensor in (given, given.clone(), given):
            assert captured(tensor)[0].tolist() == (2 * given).tolist()
    assert "no CUDA graph" not in caplog.text


@pytest.mark.gpu
def test_a_thread_runs_on_the_second_gpu(backend: Backend) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    with torch.cuda.device(1):
        gpu = gpu_of("torch:cuda")
    captured = CapturedModule(Modules(), Pool(gpu))
    (result,) = captured(torch.ones(2, device=gpu))
    assert (result.device, result.tolist()) == (gpu, [2, 2])
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_threads_that_come_together_first_sample_what_one_samples(shared: Path, backend: Backend) -> None:
    tiny = tiny_of("attention", shared)
    level = next(component.name for component in tiny.gated.components if component.kind == "level")
    reuse = Reuse(tiny, {level: Treatment.HOLD})
    loader = backend.open_weights(tiny.gated.weights.read_bytes())
    full, *programs = (loader.load(graph) for graph in (reuse.full, *reuse.graphs))
    session, together = reuse.session(backend, full, programs, (0, 1)), threading.Barrier(2)

    def request(seed: int) -> Array:
        together.wait()
        return session.sample(2, seed=seed)

    with ThreadPoolExecutor(2) as threads:
        sampled = [call.result() for call in [threads.submit(request, seed) for seed in (1, 2)]]
    for seed, samples in zip((1, 2), sampled, strict=True):
        np.testing.assert_array_equal(samples, session.sample(2, seed=seed))

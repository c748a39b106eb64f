"""Stand-ins for torch's streams and CUDA graphs without a GPU: they check the order of work and the owners of memory.

A replay computes nothing, so its results never change after the capture. The behaviour follows torch 2.13
(torch/cuda/graphs.py, CUDAGraph.cpp, CUDACachingAllocator.cpp, CachingHostAllocator.h, CublasHandlePool.cpp), both
where torch refuses a call and where it leaves work undone.

The stand-ins follow the source code and have not been compared with a GPU yet. Each class names the test, marked `gpu`,
that checks the same on a real GPU.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

DEVICE = torch.device("cuda", 0)
PRIVATE = ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool", "_cuda_releasePool")


class Event:
    """The end of a stream's work up to now; a new event has no work before it.

    On a GPU: `tests/runtime/test_cuda_graph.py::test_turns_in_several_streams_do_not_mix_on_a_gpu`.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.before: set[int] = set()
        self.cuda = cuda

    def record(self, stream: Stream) -> None:
        self.before = set(stream.before)

    def synchronize(self) -> None:
        self.cuda.log.append("the process waits")


class Stream:
    """Knows the work that is done before its next work.

    On a GPU: `tests/runtime/test_cuda_graph.py::test_turns_in_several_streams_do_not_mix_on_a_gpu`.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self.before: set[int] = set()
        self.cuda_stream = id(self)

    def wait_stream(self, other: Stream) -> None:
        self.before |= other.before

    def wait_event(self, event: Event) -> None:
        self.before |= event.before


class Workspace:
    """Memory of cuBLAS.

    On a GPU: `tests/runtime/test_cuda_graph.py::test_a_loader_that_goes_takes_nothing_of_another_along`.
    """

    def __init__(self, pool: int | None) -> None:
        self.pool = pool


class Cuda:
    """The GPUs of a process, with the current device and stream of each thread.

    On a GPU: `tests/runtime/test_cuda_graph.py::test_after_a_capture_that_failed_others_succeed` and
    `test_a_thread_runs_on_the_second_gpu`.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        """Captures, deletions of graphs, and waits of the process, in order."""
        self.defaults = [Stream(device) for device in range(2)]
        self.workspaces: dict[Stream, Workspace] = {}
        self.recording: set[int] = set()
        self.recording_on_host: set[int] = set()
        self.released: list[int] = []
        self.capturing: Graph | None = None
        self.streams_made = 0
        self._thread = threading.local()
        self._pools = itertools.count(1)
        self._work = itertools.count()
        self._last: dict[int, int] = {}

    @property
    def device(self) -> int:
        """Current device of this thread, the first by default."""
        device: int = getattr(self._thread, "device", 0)
        return device

    @property
    def current(self) -> Stream:
        """Current stream of this thread on its device."""
        streams: dict[int, Stream] = self._thread.__dict__.setdefault("streams", {})
        return streams.get(self.device, self.defaults[self.device])

    @contextmanager
    def on(self, device: torch.device | int) -> Iterator[None]:
        """Change the device of this thread."""
        before, self._thread.device = self.device, device if isinstance(device, int) else device.index
        try:
            yield
        finally:
            self._thread.device = before

    def set(self, stream: Stream) -> None:
        """Change the stream of this thread, and its device with it."""
        self._thread.device = stream.device
        self._thread.__dict__.setdefault("streams", {})[stream.device] = stream

    def multiply(self) -> None:
        """Use the stream's workspace, which is allocated in the pool of the running capture if it is missing."""
        pool = self.capturing.pool if self.capturing else None
        workspace = self.workspaces.setdefault(self.current, Workspace(pool))
        if self.capturing:
            self.capturing.workspaces.append(workspace)

    def spoil(self) -> None:
        """Do work that cannot be captured."""
        if self.capturing:
            self.capturing.spoilt = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def launch(self, pool: int) -> None:
        """Launch a graph; the previous graph of its pool must have finished with the shared memory."""
        last = self._last.get(pool)
        assert last is None or last in self.current.before, "two graphs of one pool run at the same time"
        work = self._last[pool] = next(self._work)
        self.current.before.add(work)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Replace torch's functions for the GPU."""
        cuda = self

        def make_stream(device: torch.device | None = None) -> Stream:
            cuda.streams_made += 1
            return Stream(cuda.device if device is None else device.index)

        @contextmanager
        def using(stream: Stream) -> Iterator[None]:
            device, before = cuda.device, cuda.current
            with cuda.on(stream.device):
                there = cuda.current
            cuda.set(stream)
            try:
                yield
            finally:
                cuda.set(there)
                cuda.set(before)
                assert cuda.device == device

        class Capture:
            """A running capture.

            On a GPU: `tests/runtime/test_cuda_graph.py::test_after_a_capture_that_failed_others_succeed`.
            """

            def __init__(self, graph: Graph, pool: int, stream: Stream, capture_error_mode: str) -> None:
                assert capture_error_mode == "thread_local"
                self.graph, self.pool, self.stream = graph, pool, stream

            def __enter__(self) -> None:
                self.before = cuda.current
                cuda.set(self.stream)
                assert cuda.capturing is None, "two captures at a time"
                for recording in (cuda.recording, cuda.recording_on_host):
                    if self.pool in recording:
                        raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
                    recording.add(self.pool)
                self.graph.pool, self.graph.stream = self.pool, self.stream
                cuda.capturing = self.graph

            def __exit__(self, *raised: object) -> None:
                cuda.capturing = None
                if self.graph.spoilt:
                    raise RuntimeError("operation failed due to a previous error during capture")
                cuda.recording.remove(self.pool)
                cuda.recording_on_host.remove(self.pool)
                self.graph.ended = True
                cuda.log.append("a graph is captured")
                cuda.set(self.before)

        def end(device: int, pool: int) -> None:
            if pool not in cuda.recording:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            cuda.recording.remove(pool)

        def release(device: int, pool: int) -> None:
            cuda.released.append(pool)

        def synchronize(device: torch.device) -> None:
            assert cuda.capturing is None, "waiting for the GPU spoils a capture"

        for name, own in {
            "Stream": make_stream,
            "Event": lambda: Event(cuda),
            "CUDAGraph": lambda: Graph(cuda),
            "stream": using,
            "graph": Capture,
            "current_stream": lambda: cuda.current,
            "current_device": lambda: cuda.device,
            "device": cuda.on,
            "is_available": lambda: True,
            "graph_pool_handle": lambda: next(cuda._pools),
            "synchronize": synchronize,
        }.items():
            patch.setattr(torch.cuda, name, own)
        for name, private in zip(PRIVATE, (cuda.workspaces.clear, end, release), strict=True):
            patch.setattr(torch._C, name, private, raising=False)


class Graph:
    """A captured graph; the workspaces of its stream are deleted with it.

    On a GPU: `tests/runtime/test_cuda_graph.py::test_graphs_that_were_let_go_are_captured_again`.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.pool = 0
        self.stream: Stream | None = None
        self.workspaces: list[Workspace] = []
        self.spoilt = self.ended = False

    def replay(self) -> None:
        kept = self.cuda.workspaces.values()
        lost = [one for one in self.workspaces if one.pool != self.pool and one not in kept]
        assert not lost, "an illegal memory access was encountered"
        self.cuda.launch(self.pool)

    def __del__(self) -> None:
        if self.ended:
            self.cuda.log.append("a graph is deleted")
            self.cuda.workspaces.pop(self.stream, None)

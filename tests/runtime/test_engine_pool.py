"""A pool loads and unloads engines by phase, tested with real engines on the CPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from unetc.artifacts.plan import Phase
from unetc.backend import Array, Backend, Loader, Program, SerialisedGraph
from unetc.device import HOST, Device
from unetc.errors import SessionError
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.engine_pool import EnginePool, LoadedLater, StreamingLoader
from unetc.runtime.loaded_bundle import LoadedBundle
from unetc.runtime.session import Session, Step

STEPS = 20
CYCLES = ((0, 1), (1,), (2,), (2, 0))
"""Cycles of four phases, each a quarter of the steps."""
WAIT_S = 60.0
"""Time limit for another thread, whose work takes milliseconds."""


class Counting:
    """A backend that streams the engines of another backend, and counts loads."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.device: Device = backend.device
        self.loads: list[str] = []
        self.full = False

    def open_weights(self, weights: bytes) -> Loader:
        self._loader = self._backend.open_weights(weights)
        return StreamingLoader(self)

    def load(self, graph: SerialisedGraph) -> Program:
        if self.full:
            raise SessionError("the GPU has no room")
        self.loads.append(threading.current_thread().name)
        return self._loader.load(graph)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    """Change the plan of the tiny bundle to four phases."""
    bundle = Bundle.open(tiny_bundle)
    levels = bundle.scheduler.table(STEPS).log_snr.tolist()
    ends = [-30.0, *(levels[i * STEPS // 4] for i in (1, 2, 3)), 30.0]
    phases = tuple(Phase(low=ends[i], high=ends[i + 1], cycle=cycle) for i, cycle in enumerate(CYCLES))
    plan = msgspec.structs.replace(bundle.manifest.plan, phases=phases)
    level = msgspec.structs.replace(bundle.manifest.levels[0], plan=plan)
    return changed(bundle, manifest=msgspec.structs.replace(bundle.manifest, levels=(level,)))


def changed(bundle: Bundle, **fields: object) -> Bundle:
    return Bundle(**{name: getattr(bundle, name) for name in bundle.__slots__} | fields)


class Trajectory:
    """A trajectory; the pool distinguishes objects by identity."""


class Loads:
    """Reports the loaded engines, and waits for a set of them."""

    def __init__(self) -> None:
        self.programs: list[LoadedLater] = []

    def loaded(self) -> set[int]:
        return {i for i, program in enumerate(self.programs) if program._program is not None}

    def wait_for(self, engines: set[int]) -> None:
        wait_until(lambda: self.loaded() == engines)
        assert self.loaded() == engines


def wait_until(done: Callable[[], bool]) -> None:
    """Wait for another thread, up to a time limit."""
    end = time.monotonic() + WAIT_S
    while not done() and time.monotonic() < end:
        time.sleep(0.01)


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def pool(bundle: Bundle, loads: Loads) -> EnginePool:
    """Create a pool of three engines and a full model, number 3, which compute nothing."""
    loads.programs = [LoadedLater(lambda: nothing) for _ in range(4)]
    return EnginePool(bundle.manifest.plan, loads.programs[:3], loads.programs[3], HOST)


def nothing(inputs: object, output: Array) -> dict[str, object]:
    return {}


def test_a_bundle_knows_whether_its_engines_are_streamed(bundle: Bundle) -> None:
    backend = open_backend("onnxruntime:cpu", threads=1)
    for own, streams in ((backend, False), (Counting(backend), True)):
        loaded = LoadedBundle(bundle, own)
        loaded.program(bundle.manifest.full)
        assert loaded._streams == streams


def test_streamed_engines_sample_the_same_bits(bundle: Bundle) -> None:
    backend = open_backend("onnxruntime:cpu", threads=1)
    expected = Session.of(bundle, backend).sample(2, seed=3, steps=STEPS)
    counting = Counting(backend)
    session = Session.of(bundle, counting)
    at_start = len(counting.loads)
    assert at_start == len(bundle.manifest.engines)  # each engine once, so that a broken one is refused at the start
    used: list[int] = []
    for _ in range(2):
        sampled = session.sample(2, seed=3, steps=STEPS, on_step=lambda step: used.append(step.engine))
        np.testing.assert_array_equal(sampled, expected)
    assert {*used} == {0, 1, 2}
    assert len(counting.loads) > at_start + len(bundle.manifest.engines)  # some were unloaded in between
    assert any(name.startswith("unetc-engines") for name in counting.loads)


def test_the_full_model_is_loaded_once_on_first_use(bundle: Bundle) -> None:
    manifest, own = (
        bundle.manifest,
        "engines/own.onnx",
    )  # if engine 0 emits, the full model is another graph
    full = msgspec.structs.replace(manifest.full, graph=own)
    (file,) = (file for file in manifest.files if file.path == manifest.full.graph)
    files = (*manifest.files, msgspec.structs.replace(file, path=own))
    apart = msgspec.structs.replace(manifest, full=full, files=files)
    graphs = bundle.graphs | {own: bundle.graphs[manifest.full.graph]}
    counting = Counting(open_backend("onnxruntime:cpu", threads=1))
    session = Session.of(changed(bundle, manifest=apart, graphs=graphs), counting)
    before = len(counting.loads)
    for _ in range(2):
        session.sample(1, steps=STEPS, full_model=True)
    assert len(counting.loads) == before + 1


def test_an_engine_is_unloaded_after_the_last_phase_that_needs_it(bundle: Bundle) -> None:
    engine, full, spare = (LoadedLater(lambda: nothing) for _ in range(3))
    pool, trajectory = EnginePool(bundle.manifest.plan, [engine] * 3, full, HOST, spare=spare), Trajectory()
    pool.enter(trajectory, 0)
    spare.load()
    pool.enter(trajectory, 0)
    assert spare._program is not None
    pool.enter(trajectory, 1)
    assert spare._program is None


def test_a_phase_and_the_next_are_loaded_and_nothing_else(pool: EnginePool, loads: Loads) -> None:
    trajectory = Trajectory()
    for phase, near in enumerate(({0, 1}, {1, 2}, {2, 0}, {2, 0, 1})):  # the first phase follows the last
        pool.enter(trajectory, phase)
        loads.wait_for(near)


def test_a_trajectory_of_the_full_model_loads_nothing_else(pool: EnginePool, loads: Loads) -> None:
    first, second = Trajectory(), Trajectory()
    pool.enter(first, 0)
    loads.wait_for({0, 1})
    del first
    pool.enter(second, None)
    loads.wait_for({3})


def test_trajectories_in_several_phases_keep_all_their_engines(pool: EnginePool, loads: Loads) -> None:
    early, late, full = (Trajectory() for _ in range(3))
    pool.enter(early, 0)
    loads.wait_for({0, 1})
    pool.enter(late, 2)
    loads.wait_for({0, 1, 2})
    pool.enter(full, None)
    loads.wait_for({0, 1, 2, 3})
    pool.enter(early, 1)
    loads.wait_for({0, 1, 2, 3})
    del late
    pool.enter(early, 2)
    loads.wait_for({0, 2, 3})


def test_an_engine_loaded_outside_the_plan_is_unloaded_after_the_phase(pool: EnginePool, loads: Loads) -> None:
    trajectory = Trajectory()
    pool.enter(trajectory, 1)
    loads.wait_for({1, 2})
    loads.programs[3]({}, np.empty(0, np.float32))  # the full model repeats a step
    pool.enter(trajectory, 1)
    loads.wait_for({1, 2, 3})
    pool.enter(trajectory, 2)
    loads.wait_for({0, 2})


def test_the_next_phase_is_loaded_while_this_one_samples(bundle: Bundle) -> None:
    backend = Counting(open_backend("onnxruntime:cpu", threads=1))
    session = Session.of(bundle, backend)
    later = session._programs[2]
    assert isinstance(later, LoadedLater)
    seen: list[bool] = []

    def watch(step: Step) -> None:
        if session.plan.phases[1].low <= bundle.scheduler.table(STEPS).log_snr[step.index] < session.plan.phases[2].low:
            wait_until(lambda: later._program is not None)
            seen.append(later._program is not None)
        elif not seen:
            assert later._program is None

    session.sample(1, steps=STEPS, on_step=watch)
    assert seen == [True] * len(seen) != []


def test_an_engine_that_cannot_be_loaded_is_refused_before_sampling(bundle: Bundle) -> None:
    broken = changed(bundle, graphs=dict.fromkeys(bundle.graphs, b"no graph"))
    with pytest.raises(SessionError, match="onnxruntime cannot load an engine"):
        Session.of(broken, Counting(open_backend("onnxruntime:cpu", threads=1)))


def test_an_engine_that_cannot_be_reloaded_fails_the_step_that_needs_it(bundle: Bundle) -> None:
    backend = Counting(open_backend("onnxruntime:cpu", threads=1))
    session = Session.of(bundle, backend)
    backend.full = True
    with pytest.raises(SessionError, match="the GPU has no room"):
        session.sample(1, steps=STEPS)


def test_threads_sample_the_same_bits_while_engines_come_and_go(bundle: Bundle) -> None:
    backend = open_backend("onnxruntime:cpu", threads=1)
    expected = [Session.of(bundle, backend).sample(1, seed=seed, steps=STEPS) for seed in range(4)]
    session = Session.of(bundle, Counting(backend))
    with ThreadPoolExecutor(4) as pool:
        sampled = list(pool.map(lambda seed: session.sample(1, seed=seed, steps=STEPS), range(4)))
    np.testing.assert_array_equal(sampled, expected)

"""What a pool loads and lets go, over real engines of the target that needs no GPU."""

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
from unetc.runtime.session import Session, Step

STEPS = 20
CYCLES = ((0, 1), (1,), (2,), (2, 0))
"""Of four phases, each a quarter of the steps."""
WAIT_S = 60.0
"""For another thread; what is waited for takes milliseconds."""


class Counting:
    """A backend that streams over another, and counts loads."""

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
    """Give a bundle with a plan of four phases."""
    bundle = Bundle.open(tiny_bundle)
    levels = bundle.scheduler.table(STEPS).log_snr.tolist()
    ends = [-30.0, *(levels[i * STEPS // 4] for i in (1, 2, 3)), 30.0]
    phases = tuple(Phase(low=ends[i], high=ends[i + 1], cycle=cycle) for i, cycle in enumerate(CYCLES))
    plan = msgspec.structs.replace(bundle.manifest.plan, phases=phases)
    return changed(bundle, manifest=msgspec.structs.replace(bundle.manifest, plan=plan))


def changed(bundle: Bundle, **fields: object) -> Bundle:
    return Bundle(**{name: getattr(bundle, name) for name in bundle.__slots__} | fields)


class Trajectory:
    """What a pool tells apart."""


class Loads:
    """Knows what is loaded, and can be waited for."""

    def __init__(self) -> None:
        self.programs: list[LoadedLater] = []

    def loaded(self) -> set[int]:
        return {i for i, program in enumerate(self.programs) if program._program is not None}

    def wait_for(self, engines: set[int]) -> None:
        wait_until(lambda: self.loaded() == engines)
        assert self.loaded() == engines


def wait_until(done: Callable[[], bool]) -> None:
    """Wait for another thread, until it is too late."""
    end = time.monotonic() + WAIT_S
    while not done() and time.monotonic() < end:
        time.sleep(0.01)


@pytest.fixture
def loads() -> Loads:
    return Loads()


@pytest.fixture
def pool(bundle: Bundle, loads: Loads) -> EnginePool:
    """Make a pool of three engines and a full model, number 3, that compute nothing."""
    loads.programs = [LoadedLater(lambda: nothing) for _ in range(4)]
    return EnginePool(bundle.manifest.plan, loads.programs[:3], loads.programs[3], HOST)


def nothing(inputs: object, output: Array) -> dict[str, object]:
    return {}


def test_streamed_engines_sample_the_same_bits(bundle: Bundle) -> None:
    backend = open_backend("onnxruntime:cpu", threads=1)
    expected = Session.of(bundle, backend).sample(2, seed=3, steps=STEPS)
    counting = Counting(backend)
    session = Session.of(bundle, counting)
    at_start = len(counting.loads)
    assert at_start == len(bundle.manifest.engines)  # each once, so what cannot be loaded is refused there
    used: list[int] = []
    for _ in range(2):
        sampled = session.sample(2, seed=3, steps=STEPS, on_step=lambda step: used.append(step.engine))
        np.testing.assert_array_equal(sampled, expected)
    assert {*used} == {0, 1, 2}
    assert len(counting.loads) > at_start + len(bundle.manifest.engines)  # some were let go between
    assert any(name.startswith("unetc-engines") for name in counting.loads)


def test_the_full_model_is_loaded_once_when_it_is_asked_for(bundle: Bundle) -> None:
    manifest, own = bundle.manifest, "engines/own.onnx"  # where engine 0 emits, it is another graph than the full model
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


def test_what_no_phase_needs_goes_with_the_one_that_needed_it(bundle: Bundle) -> None:
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


def test_a_trajectory_of_the_full_model_has_it_alone(pool: EnginePool, loads: Loads) -> None:
    first, second = Trajectory(), Trajectory()
    pool.enter(first, 0)
    loads.wait_for({0, 1})
    del first
    pool.enter(second, None)
    loads.wait_for({3})


def test_trajectories_in_several_phases_keep_what_each_needs(pool: EnginePool, loads: Loads) -> None:
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


def test_what_the_phase_did_not_foresee_goes_with_it(pool: EnginePool, loads: Loads) -> None:
    trajectory = Trajectory()
    pool.enter(trajectory, 1)
    loads.wait_for({1, 2})
    loads.programs[3]({}, np.empty(0, np.float32))  # the full model makes a step again
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


def test_what_cannot_be_loaded_is_refused_before_anything_is_sampled(bundle: Bundle) -> None:
    broken = changed(bundle, graphs=dict.fromkeys(bundle.graphs, b"no graph"))
    with pytest.raises(SessionError, match="onnxruntime cannot load an engine"):
        Session.of(broken, Counting(open_backend("onnxruntime:cpu", threads=1)))


def test_what_cannot_be_loaded_again_is_an_error_of_the_step_that_needs_it(bundle: Bundle) -> None:
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

"""Which engines are on the device: all engines of a plan, or only those that the current and the next phase need.

Engines that hold their own weights add up. With `memory="low"`, backends of such engines return programs that are
loaded later, and a pool loads them: the engines of the next phase in the background, while the current phase samples.
When a trajectory enters a phase, the pool releases every engine that no trajectory needs soon.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from weakref import WeakKeyDictionary

from unetc.artifacts.plan import Plan
from unetc.backend import Loader, Program, SerialisedGraph
from unetc.device import Device, Tensor


class LoadedLater:
    """A program that is loaded when it is needed, and again after a release."""

    def __init__(self, load: Callable[[], Program]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._program: Program | None = None

    def __call__(self, inputs: Mapping[str, Tensor], output: Tensor) -> Mapping[str, Tensor]:
        """Run the program; load it first if necessary."""
        return self.load()(inputs, output)

    def load(self) -> Program:
        """Load the program, once."""
        with self._lock:
            if self._program is None:
                self._program = self._load()
            return self._program

    def release(self) -> None:
        """Release the program; a running call keeps it until it ends."""
        with self._lock:
            self._program = None


def tried(program: Program) -> Program:
    """Load and release a program that is loaded later, so that a faulty one is refused before sampling begins."""
    if isinstance(program, LoadedLater):
        program.load()
        program.release()
    return program


def let_go(program: Program, device: Device) -> None:
    """Release a program that is loaded later, once the device has finished the launched work that may read it."""
    if isinstance(program, LoadedLater):
        device.synchronize()
        program.release()


class StreamingLoader:
    """Loads graphs for the phases that need them."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def load(self, graph: SerialisedGraph) -> Program:
        """Return a program that loads the graph later, as often as needed."""
        return LoadedLater(partial(self._loader.load, graph))


class EnginePool:
    """Loads the engines that running trajectories need, and releases the others."""

    def __init__(
        self, plan: Plan, programs: Sequence[Program], full: Program, device: Device, *, spare: Program | None = None
    ) -> None:
        """Load nothing yet.

        Args:
            plan: Its phases follow each other.
            programs: The engines; the pool manages those that are loaded later.
            full: The full model, for trajectories without phases.
            device: Where they run.
            spare: A program that no phase foresees; it is released with the phase that loaded it.
        """
        self._plan = plan
        self._programs = programs
        self._full = full
        self._all = _later([*programs, full] if spare is None else [*programs, full, spare])
        self._device = device
        self._lock = threading.Lock()
        self._phases: WeakKeyDictionary[object, int | None] = WeakKeyDictionary()
        """Phase of every trajectory."""
        self._wanted: frozenset[LoadedLater] = frozenset()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="unetc-engines")

    def enter(self, trajectory: object, phase: int | None) -> None:
        """Let a trajectory enter a phase; a phase of None means the full model alone.

        After the last phase comes the first one, of the next trajectory. A call waits until its program is loaded. A
        program that the phase does not foresee is loaded by its call and released with the phase.
        """
        with self._lock:
            if self._phases.get(trajectory, -1) == phase:
                return
            self._phases[trajectory] = phase
            self._wanted = frozenset(program for at in self._phases.values() for program in self._near(at))
            if gone := [program for program in self._all if program not in self._wanted]:
                self._device.synchronize()  # launched work may still read them
                for program in gone:
                    program.release()
        for program in self._near(phase):
            self._background.submit(self._load, program)  # a failure here is raised again by the call

    def _near(self, phase: int | None) -> Sequence[LoadedLater]:
        """List the engines of a phase, then the engines of the next one."""
        if phase is None:
            return _later([self._full])
        phases = self._plan.phases
        cycles = (*phases[phase].cycle, *phases[(phase + 1) % len(phases)].cycle)
        return _later([self._programs[engine] for engine in cycles])

    def _load(self, program: LoadedLater) -> None:
        if program in self._wanted:
            program.load()


def _later(programs: Sequence[Program]) -> tuple[LoadedLater, ...]:
    """List the programs that are loaded later, each once."""
    return tuple(dict.fromkeys(program for program in programs if isinstance(program, LoadedLater)))

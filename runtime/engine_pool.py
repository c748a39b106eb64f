"""Which engines are on the device: all of a plan, or those of the phase that samples and of the next one.

Engines that hold their own weights take the sum of them. With `memory="low"` backends of such engines give out programs
that are loaded later, and a pool loads them: those of the phase after this one in the background, while this one
samples. What no trajectory is near to is let go when one enters a phase.
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
    """A program that is loaded when it is needed, and again after it was let go."""

    def __init__(self, load: Callable[[], Program]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._program: Program | None = None

    def __call__(self, inputs: Mapping[str, Tensor], output: Tensor) -> Mapping[str, Tensor]:
        """Run the program, and load it before if that was not done."""
        return self.load()(inputs, output)

    def load(self) -> Program:
        """Load the program, once."""
        with self._lock:
            if self._program is None:
                self._program = self._load()
            return self._program

    def release(self) -> None:
        """Let the program go; a call that runs keeps it to its end."""
        with self._lock:
            self._program = None


def tried(program: Program) -> Program:
    """Load a program that is loaded later, and let it go: what cannot be is refused before anything is sampled."""
    if isinstance(program, LoadedLater):
        program.load()
        program.release()
    return program


class StreamingLoader:
    """Loads graphs for the phases that need them."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def load(self, graph: SerialisedGraph) -> Program:
        """Load a graph, later and more than once."""
        return LoadedLater(partial(self._loader.load, graph))


class EnginePool:
    """Loads what the trajectories in progress need, and lets go what none of them does."""

    def __init__(
        self, plan: Plan, programs: Sequence[Program], full: Program, device: Device, *, spare: Program | None = None
    ) -> None:
        """Load nothing yet.

        Args:
            plan: Its phases follow each other.
            programs: The engines; those that are loaded later are the pool's.
            full: The full model, which is needed where there are no phases.
            device: Where they run.
            spare: What is needed in no phase, and goes with the one in which it was.
        """
        self._plan = plan
        self._programs = programs
        self._full = full
        self._all = _later([*programs, full] if spare is None else [*programs, full, spare])
        self._device = device
        self._lock = threading.Lock()
        self._phases: WeakKeyDictionary[object, int | None] = WeakKeyDictionary()
        """Where the trajectories are."""
        self._wanted: frozenset[LoadedLater] = frozenset()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="unetc-engines")

    def enter(self, trajectory: object, phase: int | None) -> None:
        """Let a trajectory enter a phase, or sample with the full model alone, where the phase is None.

        The last phase is followed by the first, of the next trajectory. A program that is called before it is loaded
        is waited for; one that the phase does not foresee is loaded by its call and goes with the phase.
        """
        with self._lock:
            if self._phases.get(trajectory, -1) == phase:
                return
            self._phases[trajectory] = phase
            self._wanted = frozenset(program for at in self._phases.values() for program in self._near(at))
            if gone := [program for program in self._all if program not in self._wanted]:
                self._device.synchronize()  # what was launched may read them still
                for program in gone:
                    program.release()
        for program in self._near(phase):
            self._background.submit(self._load, program)  # what fails here fails again where it is called

    def _near(self, phase: int | None) -> Sequence[LoadedLater]:
        """List what is needed in a phase, and then what in the next."""
        if phase is None:
            return _later([self._full])
        phases = self._plan.phases
        cycles = (*phases[phase].cycle, *phases[(phase + 1) % len(phases)].cycle)
        return _later([self._programs[engine] for engine in cycles])

    def _load(self, program: LoadedLater) -> None:
        if program in self._wanted:
            program.load()


def _later(programs: Sequence[Program]) -> tuple[LoadedLater, ...]:
    """Take those that are loaded later, each once."""
    return tuple(dict.fromkeys(program for program in programs if isinstance(program, LoadedLater)))

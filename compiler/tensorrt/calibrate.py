"""Find values of a bundle's engines that float16 cannot hold, on the inputs that the engines see while they sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unetc.backend import Backend, Loader, Program, SerialisedGraph
from unetc.compiler.graph.overflow import overflowing
from unetc.device import Tensor
from unetc.progress import OnProgress, Progress
from unetc.runtime.backends.registry import DEFAULT_TARGET, open_backend
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.bundle import Bundle
from unetc.runtime.rollout import FULL_ENGINE
from unetc.runtime.session import Session
from unetc.treatments import COMPUTED

if TYPE_CHECKING:
    pass

SAMPLES, STEPS = 2, 5
"""Trajectories, and the least number of steps, that are looked at."""
STAGE = "find what overflows"

Probe = Mapping[str, Tensor]
"""Inputs of one denoiser call by name."""


def overflowing_values(
    bundle: Bundle, path_of: Callable[[str], Path], on_progress: OnProgress, *, controls: bool = False
) -> frozenset[str]:
    """List values that float16 may not hold, in any engine at any step of a short trajectory of the full model.

    An engine that holds gets what the engine 0 of its plan has computed at the step before.

    Args:
        bundle: A bundle.
        path_of: Where the graph of a path in the bundle lies, in float32 and beside its weights.
        on_progress: Told how many engines are done.
        controls: Whether to look at the engines of the control plans too.

    Raises:
        EngineBuildError: If onnxruntime cannot run an engine.
    """
    manifest = bundle.manifest
    plans = [manifest.engines, *(control.engines for control in manifest.controls if controls)]
    emitters = dict.fromkeys(engines[FULL_ENGINE].graph for engines in plans)
    others = dict.fromkeys(engine.graph for engine in (manifest.full, *(e for engines in plans for e in engines)))
    order = [*emitters, *(graph for graph in others if graph not in emitters)]
    probes = trajectory(bundle)
    emitted: list[dict[str, Tensor]] = [{} for _ in probes]
    found: frozenset[str] = frozenset()
    for done, graph in enumerate(order):
        on_progress(Progress(stage=STAGE, done=done, total=len(order)))
        if done == len(emitters):
            probes = _with_held(probes, emitted)
        large, outputs = overflowing(path_of(graph), list(probes.values()))
        found |= large
        if graph in emitters:  # the same values in all plans, as all of it is computed
            for known, own in zip(emitted, outputs, strict=True):
                known.update({name: value for name, value in own.items() if name.startswith(COMPUTED)})
    on_progress(Progress(stage=STAGE, done=len(order), total=len(order), note=note(found)))
    return found


def _with_held(probes: Mapping[float, Probe], emitted: Sequence[Probe]) -> dict[float, Probe]:
    """Add what was emitted at the probe before; the first one, which nothing came before, gets its own."""
    cache, first = BranchCache(), next(iter(probes))
    cache.store(emitted[0], first)
    extended: dict[float, Probe] = {}
    for (timestep, probe), own in zip(probes.items(), emitted, strict=True):
        extended[timestep] = {**probe, **cache.inputs(timestep)}
        cache.store(own, timestep)
    return extended


class Watching:
    """A backend that notes what its programs are called with."""

    def __init__(self, backend: Backend) -> None:
        self.device = backend.device
        self.calls: list[Probe] = []
        self._backend = backend

    def open_weights(self, weights: bytes) -> Loader:
        """Take a weights file."""
        self._loader = self._backend.open_weights(weights)
        return self

    def load(self, graph: SerialisedGraph) -> Program:
        """Load a graph."""
        program = self._loader.load(graph)

        def watched(inputs: Probe, output: Tensor) -> Probe:
            self.calls.append(inputs)
            return program(inputs, output)

        return watched


def note(found: frozenset[str]) -> str:
    """Say how many values stay float32; nothing if none do."""
    return f"{len(found)} values stay float32, as float16 may not hold them" if found else ""


def trajectory(bundle: Bundle) -> dict[float, Probe]:
    """Sample with the full model; give the inputs of its call at each timestep.

    The number of steps is the least that the bundle has and that is not below five, as each costs a call.
    """
    manifest, counts = bundle.manifest, bundle.scheduler.counts
    watching = Watching(open_backend(DEFAULT_TARGET, threads=manifest.threads))
    session = Session(
        plan=manifest.plan,
        full=watching.open_weights(bundle.weights).load(bundle.graph_of(manifest.full)),
        programs=(),
        scheduler=bundle.scheduler,
        sample_shape=manifest.sample_shape,
        steps=next((count for count in counts if count >= STEPS), counts[-1]),
        predicted_channels=manifest.predicted_channels,
        conditions=bundle.conditions,
    )
    session.sample(SAMPLES, full_model=True, latents=True)
    return {float(inputs["timestep"][0]): inputs for inputs in watching.calls}

"""Find the values of a bundle's engines that float16 cannot hold, on the inputs of a sampled trajectory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from unetc.backend import Backend, Loader, Program, SerialisedGraph
from unetc.call import TIMESTEP
from unetc.compiler.graph.overflow import overflowing
from unetc.device import Tensor
from unetc.progress import OnProgress, Progress
from unetc.runtime.backends.registry import DEFAULT_TARGET, open_backend
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.bundle import Bundle
from unetc.runtime.rollout import FULL_ENGINE
from unetc.runtime.session import Session
from unetc.treatments import COMPUTED

SAMPLES, STEPS = 2, 5
"""Number of trajectories that are searched, and the least number of their steps."""
STAGE = "find what overflows"

Probe = Mapping[str, Tensor]
"""Inputs of one denoiser call, by name."""


def overflowing_values(
    bundle: Bundle, path_of: Callable[[str], Path], on_progress: OnProgress, *, controls: bool = False
) -> frozenset[str]:
    """List values that float16 may not hold, in any engine at any step of a short trajectory of the full model.

    An engine that reads held branches gets those that engine 0 of its plan computed at the previous step.

    Args:
        bundle: A bundle.
        path_of: Returns the file of a graph by its path in the bundle, in float32 and in the folder of its weights.
        on_progress: Called with the number of engines that are done.
        controls: Whether to search the engines of the control plans too.

    Raises:
        EngineBuildError: If onnxruntime cannot run an engine.
    """
    manifest = bundle.manifest
    levels = (level.engines for level in manifest.levels)
    plans = [*levels, *(control.engines for control in manifest.controls if controls and control.engines)]
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
        if graph in emitters:  # the same values in all plans, because engine 0 computes everything
            for known, own in zip(emitted, outputs, strict=True):
                known.update({name: value for name, value in own.items() if name.startswith(COMPUTED)})
    on_progress(Progress(stage=STAGE, done=len(order), total=len(order), note=note(found)))
    return found


def _with_held(probes: Mapping[float, Probe], emitted: Sequence[Probe]) -> dict[float, Probe]:
    """Add the branches stored at the previous probe; the first probe gets its own branches."""
    cache, first = BranchCache(), next(iter(probes))
    cache.store(emitted[0], first)
    extended: dict[float, Probe] = {}
    for (timestep, probe), own in zip(probes.items(), emitted, strict=True):
        extended[timestep] = {**probe, **cache.inputs(timestep, rows=len(probe[TIMESTEP]))}
        cache.store(own, timestep)
    return extended


class Watching:
    """A backend that records the inputs of its programs."""

    def __init__(self, backend: Backend) -> None:
        self.device = backend.device
        self.calls: list[Probe] = []
        self._backend = backend

    def open_weights(self, weights: bytes) -> Loader:
        """Take the content of a weights file."""
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
    """Describe how many values stay float32; empty if there are none."""
    return f"{len(found)} values stay float32, as float16 may not hold them" if found else ""


def trajectory(bundle: Bundle) -> dict[float, Probe]:
    """Sample with the full model; return the inputs of its call at each timestep.

    Each step costs a call, so the number of steps is the bundle's smallest one from five on.
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

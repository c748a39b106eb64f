"""Find what float16 cannot hold, on what engines see while they sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from unetc.analyzer.denoiser import GatedDenoiser
from unetc.artifacts.record import MAX_JSON_BYTES, read_bounded, write_atomically
from unetc.backend import Backend, Loader, Program, SerialisedGraph
from unetc.compiler.overflow import LIMIT, overflowing
from unetc.conditions import Conditions
from unetc.device import Tensor
from unetc.errors import ArtifactError
from unetc.held import COMPUTED, Held
from unetc.progress import OnProgress, Progress
from unetc.runtime.backend import DEFAULT_TARGET, open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.request import FULL_ENGINE
from unetc.runtime.session import Session
from unetc.solver.extract import extract, make_scheduler
from unetc.solver.noise import initial_noise
from unetc.solver.trajectory import Trajectory

from .compile import private_folder
from .prepare import Prepared

_SAMPLES, _STEPS = 2, 5
"""Trajectories, and the least number of steps, that are looked at."""
_STAGE = "find what overflows"
_GRAPH = "gated.onnx"

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
        on_progress(Progress(stage=_STAGE, done=done, total=len(order)))
        if done == len(emitters):
            probes = _with_held(probes, emitted)
        large, outputs = overflowing(path_of(graph), list(probes.values()))
        found |= large
        if graph in emitters:  # the same values in all plans, as all of it is computed
            for known, own in zip(emitted, outputs, strict=True):
                known.update({name: value for name, value in own.items() if name.startswith(COMPUTED)})
    on_progress(Progress(stage=_STAGE, done=len(order), total=len(order), note=_note(found)))
    return found


def _with_held(probes: Mapping[float, Probe], emitted: Sequence[Probe]) -> dict[float, Probe]:
    """Add what was emitted at the probe before; the first one, which nothing came before, gets its own."""
    held, first = Held(), next(iter(probes))
    held.remember(emitted[0], first)
    extended: dict[float, Probe] = {}
    for (timestep, probe), own in zip(probes.items(), emitted, strict=True):
        extended[timestep] = {**probe, **held.inputs(timestep)}
        held.remember(own, timestep)
    return extended


def overflowing_in_model(
    prepared: Prepared, scheduler: str, conditions: Conditions, on_progress: OnProgress
) -> frozenset[str]:
    """List values that float16 may not hold in a model at any step of a short trajectory, before there is a bundle.

    What was found is kept for the next command. Values are those of the gated graph, and keep their names in whatever
    is made of it.

    Args:
        prepared: The model.
        scheduler: What it is sampled with.
        conditions: Of its samples.
        on_progress: Told after every step.

    Raises:
        EngineBuildError: If onnxruntime cannot run the graph.
        ProfileError: If the model produces NaN or infinity.
    """
    model, gated = prepared.model, prepared.gated
    conditions = conditions.take(range(_SAMPLES))
    question = repr((scheduler, _SAMPLES, _STEPS, LIMIT, conditions.sha256())).encode()
    known = prepared.work / f"overflow-{hashlib.sha256(question).hexdigest()[:16]}.json"
    try:
        return frozenset(msgspec.json.decode(read_bounded(known, MAX_JSON_BYTES), type=list[str]))
    except (ArtifactError, msgspec.MsgspecError, UnicodeDecodeError):
        pass  # not looked at yet
    table = extract(make_scheduler(scheduler, model.scheduler_config), _STEPS)
    watching = Watching(open_backend(DEFAULT_TARGET, threads=0))
    denoiser = GatedDenoiser(gated, watching, conditions)
    indices, means = range(_SAMPLES), np.zeros(gated.channels, np.float32)
    gates = denoiser.gates({}, _SAMPLES)
    state = Trajectory.start(table, initial_noise(0, indices, model.sample_shape))
    for step in range(table.steps):
        on_progress(Progress(stage=_STAGE, done=step, total=table.steps + 1))
        prediction = denoiser.predict(state.seen(table, step), table.timesteps.item(step), gates=gates, means=means)
        state = state.advance(table, step, prediction, seed=0, indices=indices)
    on_progress(Progress(stage=_STAGE, done=table.steps, total=table.steps + 1))
    with private_folder(gated.weights.read_bytes(), {_GRAPH: gated.runnable().graph}) as folder:
        found, _ = overflowing(Path(folder) / _GRAPH, watching.calls)
    on_progress(Progress(stage=_STAGE, done=table.steps + 1, total=table.steps + 1, note=_note(found)))
    write_atomically(known, msgspec.json.encode(sorted(found)))
    return found


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


def _note(found: frozenset[str]) -> str:
    return f"{len(found)} values stay float32, as float16 may not hold them" if found else ""


def trajectory(bundle: Bundle) -> dict[float, Probe]:
    """Sample with the full model; give the inputs of its call at each timestep.

    The number of steps is the least that the bundle has and that is not below five, as each costs a call.
    """
    manifest, counts = bundle.manifest, bundle.solver.counts
    watching = Watching(open_backend(DEFAULT_TARGET, threads=manifest.threads))
    session = Session(
        plan=manifest.plan,
        full=watching.open_weights(bundle.weights).load(bundle.graph_of(manifest.full)),
        programs=(),
        solver=bundle.solver,
        sample_shape=manifest.sample_shape,
        steps=next((count for count in counts if count >= _STEPS), counts[-1]),
        predicted_channels=manifest.predicted_channels,
        conditions=bundle.conditions,
    )
    session.sample(_SAMPLES, lossless=True, latents=True)
    return {float(inputs["timestep"][0]): inputs for inputs in watching.calls}

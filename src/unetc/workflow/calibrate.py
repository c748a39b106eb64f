"""Find what float16 cannot hold, on what a bundle's engines see while they sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from unetc.compiler.overflow import overflowing
from unetc.device import Tensor
from unetc.held import COMPUTED, Held
from unetc.progress import OnProgress, Progress
from unetc.runtime.backend import DEFAULT_TARGET, open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import FULL_ENGINE, Session

_SAMPLES, _STEPS = 2, 5
"""Trajectories, and the least number of steps, that are looked at."""

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
        on_progress(Progress(stage="find what overflows", done=done, total=len(order)))
        if done == len(emitters):
            probes = _with_held(probes, emitted)
        large, outputs = overflowing(path_of(graph), list(probes.values()))
        found |= large
        if graph in emitters:  # the same values in all plans, as all of it is computed
            for known, own in zip(emitted, outputs, strict=True):
                known.update({name: value for name, value in own.items() if name.startswith(COMPUTED)})
    note = f"{len(found)} values stay float32, as float16 may not hold them" if found else ""
    on_progress(Progress(stage="find what overflows", done=len(order), total=len(order), note=note))
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


def trajectory(bundle: Bundle) -> dict[float, Probe]:
    """Sample with the full model; give the inputs of its call at each timestep.

    The number of steps is the least that the bundle has and that is not below five, as each costs a call.
    """
    manifest, counts = bundle.manifest, bundle.solver.counts
    loader = open_backend(DEFAULT_TARGET, threads=manifest.threads).open_weights(bundle.weights)
    full = loader.load(bundle.graph_of(manifest.full))
    seen: dict[float, Probe] = {}

    def watched(inputs: Probe, output: Tensor) -> Mapping[str, Tensor]:
        seen[float(inputs["timestep"][0])] = inputs
        return full(inputs, output)

    session = Session(
        plan=manifest.plan,
        full=watched,
        programs=(),
        solver=bundle.solver,
        sample_shape=manifest.sample_shape,
        steps=next((count for count in counts if count >= _STEPS), counts[-1]),
        predicted_channels=manifest.predicted_channels,
        conditions=bundle.conditions,
    )
    session.sample(_SAMPLES, lossless=True, latents=True)
    return seen

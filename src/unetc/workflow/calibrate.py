"""Find what float16 cannot hold, on what a bundle's engines see while they sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from unetc.compiler.overflow import overflowing
from unetc.device import Tensor
from unetc.held import COMPUTED, Held
from unetc.progress import OnProgress, Progress
from unetc.runtime.backend import DEFAULT_TARGET, open_backend
from unetc.runtime.bundle import Bundle
from unetc.runtime.session import Session, Step
from unetc.solver.noise import initial_noise
from unetc.solver.trajectory import Trajectory

_SAMPLES, _STEPS = 2, 5
"""Trajectories, and the least number of steps, that are looked at."""
_SEED = 0

Probe = Mapping[str, Tensor]
"""Inputs of one denoiser call by name."""


def overflowing_values(bundle: Bundle, path_of: Callable[[str], Path], on_progress: OnProgress) -> frozenset[str]:
    """List values that float16 may not hold, in any engine at any step of a short trajectory of the full model.

    An engine that holds gets what the engine that emits has computed at the step before.

    Args:
        bundle: A bundle.
        path_of: Where the graph of a path in the bundle lies, in float32 and beside its weights.
        on_progress: Told how many engines are done.

    Raises:
        EngineBuildError: If onnxruntime cannot run an engine.
    """
    manifest = bundle.manifest
    engines = list(dict.fromkeys(engine.graph for engine in (manifest.full, *manifest.engines)))
    engines.sort(key=lambda graph: graph != manifest.engines[0].graph)  # the one that emits goes first
    probes = trajectory(bundle)
    found: frozenset[str] = frozenset()
    for done, graph in enumerate(engines):
        on_progress(Progress(stage="find what overflows", done=done, total=len(engines)))
        large, outputs = overflowing(path_of(graph), list(probes.values()))
        found |= large
        if done == 0:
            held, with_held = Held(), dict[float, Probe]()
            for (timestep, probe), output in zip(probes.items(), outputs, strict=True):
                emitted = {name: value for name, value in output.items() if name.startswith(COMPUTED)}
                if not with_held:
                    held.remember(emitted, timestep)  # nothing came before; it holds its own
                with_held[timestep] = {**probe, **held.inputs(timestep)}
                held.remember(emitted, timestep)
            probes = with_held
    note = f"{len(found)} values stay float32, as float16 may not hold them" if found else ""
    on_progress(Progress(stage="find what overflows", done=len(engines), total=len(engines), note=note))
    return found


def trajectory(bundle: Bundle) -> dict[float, Probe]:
    """Sample with the full model; give the inputs of its call at each timestep.

    The number of steps is the least that the bundle has and that is not below five, as each costs a call.
    """
    manifest = bundle.manifest
    counts = bundle.solver.counts
    table = bundle.solver.table(next((count for count in counts if count >= _STEPS), counts[-1]))
    noise = initial_noise(_SEED, range(_SAMPLES), manifest.sample_shape)
    samples = [Trajectory.start(table, noise).sample]

    def keep(step: Step) -> None:
        samples.append(step.sample)

    loader = open_backend(DEFAULT_TARGET, threads=manifest.threads).open_weights(bundle.weights)
    session = Session(
        plan=manifest.plan,
        full=loader.load(bundle.graph_of(manifest.full)),
        programs=(),
        solver=bundle.solver,
        sample_shape=manifest.sample_shape,
        steps=table.steps,
        predicted_channels=manifest.predicted_channels,
        conditions=bundle.conditions,
    )
    session.sample(noise=noise, seed=_SEED, lossless=True, latents=True, on_step=keep)
    conditions = bundle.conditions.take(range(_SAMPLES))
    return {
        float(timestep): conditions.widen(sample * np.float32(scale), float(timestep))
        for timestep, sample, scale in zip(table.timesteps, samples, table.input_scale, strict=False)
    }

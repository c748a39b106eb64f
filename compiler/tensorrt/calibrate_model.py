"""Find the values of a model that float16 cannot hold, before there is a bundle."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from unetc.artifacts.call_input import SAMPLE
from unetc.artifacts.record import MAX_JSON_BYTES, read_cached, write_atomically
from unetc.compiler.engines import compile_full
from unetc.compiler.graph.gate import GATES, MEANS, gate_values
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.graph.lowering import LOGITS
from unetc.compiler.graph.overflow import LIMIT, overflowing
from unetc.compiler.prepare import Prepared
from unetc.compiler.schedulers.extract import extract
from unetc.compiler.schedulers.make import scheduler_for
from unetc.conditions import Conditions
from unetc.progress import OnProgress, Progress
from unetc.runtime.backends.registry import DEFAULT_TARGET, open_backend
from unetc.runtime.rollout import NonFiniteSteps, Rollout
from unetc.runtime.trajectory import Trajectory
from unetc.sampler.noise import initial_noise

from .calibrate import SAMPLES, STAGE, STEPS, Probe, Watching, note
from .private_folder import private_folder

_GRAPH = "gated.onnx"


def overflowing_in_model(
    prepared: Prepared, scheduler: str, conditions: Conditions, on_progress: OnProgress
) -> frozenset[str]:
    """List values that float16 may not hold in a model at any step of a short trajectory, before there is a bundle.

    The result is stored for the next command. The full engine samples. The gated graph is checked on the inputs of the
    full engine's calls, because every other graph is made from the gated one and its values keep their names.

    Args:
        prepared: The model.
        scheduler: Name of the scheduler that it is sampled with.
        conditions: Conditions of its samples.
        on_progress: Called after every step.

    Raises:
        EngineBuildError: If onnxruntime cannot run the graph.
        NonFiniteError: If the model produces NaN or infinity.
    """
    model, gated = prepared.model, prepared.gated
    conditions = conditions.take(range(SAMPLES))
    question = repr((scheduler, SAMPLES, STEPS, LIMIT, LOGITS, conditions.sha256())).encode()
    known = prepared.work / f"overflow-{hashlib.sha256(question).hexdigest()[:16]}.json"
    if (searched := read_cached(known, list[str], MAX_JSON_BYTES)) is not None:
        return frozenset(searched)
    table = extract(scheduler_for(scheduler, model), STEPS)
    watching = Watching(open_backend(DEFAULT_TARGET, threads=0))
    weights = gated.weights.read_bytes()
    rollout = Rollout(
        (),
        watching.open_weights(weights).load(compile_full(gated)),
        predicted_channels=gated.predicted_channels,
        plan=None,
        device=watching.device,
        non_finite_steps=NonFiniteSteps(),
    )
    indices = range(SAMPLES)
    state = Trajectory.start(table, initial_noise(0, indices, model.sample_shape))
    for step in range(table.steps):
        on_progress(Progress(stage=STAGE, done=step, total=table.steps + 1))
        prediction = rollout.predict(
            state.seen(table, step), table.timesteps.item(step), table.log_snr.item(step), conditions
        )
        state = state.advance(table, step, prediction, seed=0, indices=indices)
    on_progress(Progress(stage=STAGE, done=table.steps, total=table.steps + 1))
    with private_folder(weights, {_GRAPH: gated.runnable().graph}) as folder:
        found, _ = overflowing(folder / _GRAPH, [_with_open_gates(gated, call) for call in watching.calls])
    on_progress(Progress(stage=STAGE, done=table.steps + 1, total=table.steps + 1, note=note(found)))
    write_atomically(known, msgspec.json.encode(sorted(found)))
    return found


def _with_open_gates(gated: GatedGraph, call: Probe) -> Probe:
    """Add the gates that keep every component."""
    rows = np.repeat(gate_values(gated.components, {})[None], len(call[SAMPLE]), axis=0)
    return {**call, GATES: rows, MEANS: np.zeros(gated.channels, dtype=np.float32)}

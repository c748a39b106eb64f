"""Would a fifth treatment, `affine`, help: the trunk, scaled and shifted per channel, in place of the branch?

    python benchmarks/bench_affine.py            # about 3 minutes on two cores

The benchmark fits branch ≈ scale · trunk + shift for every residual component and bin. It uses least squares per
channel over all positions, samples and steps of the bin, on one seed. The branch's mean per channel comes from the same
steps.

The local error is measured on another seed, at the bin's middle step of the full model's trajectory, as in the screen.
It is the relative L2 by which the prediction moves when the component is dropped, or replaced by its mean, by the
affine map of the trunk, or by a forecast with period 2 (from 3 and 1 steps ago). Forecasting saves the component's time
at every second step, the other treatments at every step. Writes `results/affine.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from command_line import add_results
from numpy.typing import NDArray
from result_file import write

from unetc.analyzer.denoiser import GatedDenoiser
from unetc.analyzer.sweep import FullTrajectory, Sweep, branches_at, make_bins, run_base
from unetc.artifacts.profile import Component
from unetc.backend import Array, Backend
from unetc.cli.output import progress
from unetc.compiler.graph.gate import gates_of
from unetc.compiler.graph.gated import GatedGraph, emit
from unetc.compiler.graph.nodes import add_name
from unetc.compiler.graph.weights import serialise
from unetc.compiler.prepare import prepare
from unetc.compiler.schedulers.extract import extract
from unetc.compiler.schedulers.make import make_scheduler
from unetc.environment import cores
from unetc.metrics.distances import relative_l2
from unetc.models.find import find_model
from unetc.progress import OnProgress, Progress
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.branch_cache import BranchCache
from unetc.treatments import COMPUTED, Treatment

TRUNK = "trunk."
"""Prefix of a trunk among the outputs of the traced graph; the index of the component follows."""
WAYS = ("drop", "mean", "affine", "forecast")
PERIOD = 2


class TracedDenoiser:
    """The full model with its branches and trunks as outputs."""

    def __init__(self, gated: GatedGraph, components: Sequence[Component], backend: Backend) -> None:
        """Load the graph with all branches and the trunks of the given residual components as outputs."""
        model = gated.model.clone()
        gates = gates_of(model.graph)
        for component in gated.components:
            emit(model.graph, gates[component.index], component)
        for component in components:
            _emit_trunk(model.graph, gates[component.index], component)
        graph = serialise(model)
        self._program = backend.open_weights(gated.weights.read_bytes()).load(graph)
        self._backend = backend
        self._gates = np.tile(np.array([1, 0], dtype=np.float32), (len(gated.components), 1))
        self._means = np.zeros(gated.channels, dtype=np.float32)

    def __call__(self, sample: Array, timestep: float) -> dict[str, Array]:
        """Run; return `computed.INDEX` of all components and `trunk.INDEX` of the traced ones."""
        inputs = {
            "sample": sample,
            "timestep": np.full(len(sample), timestep, dtype=np.float32),
            "gates": np.repeat(self._gates[None], len(sample), axis=0),
            "means": self._means,
        }
        emitted = self._program(inputs, np.empty_like(sample))
        return {name: self._backend.device.to_array(value) for name, value in emitted.items()}


def _emit_trunk(graph: ir.Graph, gate: ir.Node, component: Component) -> None:
    (join,) = {use.node for use in gate.outputs[0].uses()}
    assert join.op_type == "Add", f"{component.name} joins at {join.op_type}"
    (trunk,) = (value for value in join.inputs if value is not gate.outputs[0])
    assert trunk is not None
    graph.outputs.append(add_name(graph, trunk, f"{TRUNK}{component.index}", like=trunk))


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """A scale and a shift per channel."""

    scale: NDArray[np.float64]
    shift: NDArray[np.float64]

    def __call__(self, trunk: Array, axis: int) -> Array:
        """Predict the branch from a trunk."""
        shape = [-1 if i == axis else 1 for i in range(trunk.ndim)]
        return np.ascontiguousarray(trunk * self.scale.reshape(shape) + self.shift.reshape(shape), dtype=np.float32)


class Moments:
    """Sums of trunk and branch per channel, enough to solve the least squares in closed form."""

    def __init__(self, channels: int) -> None:
        """Start with empty sums."""
        self._count = 0
        self._sums = np.zeros((4, channels))

    def add(self, trunk: Array, branch: Array, axis: int) -> None:
        """Add all positions of a batch."""
        rows = [np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(float) for array in (trunk, branch)]
        x, y = rows
        self._count += x.shape[1]
        self._sums += np.stack([x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1)])

    def fit(self) -> Affine:
        """Solve for scale and shift; for a constant trunk the map is the mean of the branch."""
        x, y, xx, xy = self._sums / self._count
        variance = xx - x * x
        varies = variance > 1e-12 * np.maximum(xx, 1e-30)
        scale = np.where(varies, (xy - x * y) / np.where(varies, variance, 1.0), 0.0)
        return Affine(scale=scale, shift=y - scale * x)


def calibrate(
    sweep: Sweep, base: FullTrajectory, traced: TracedDenoiser, components: Sequence[Component], on_progress: OnProgress
) -> list[dict[str, Affine]]:
    """Fit an affine map per bin and component along a trajectory of the full model."""
    fitted = []
    for b in range(len(sweep.bins)):
        moments = {component.name: Moments(component.channels) for component in components}
        for step in sweep.steps_of(b):
            outputs = traced(base.states[step].seen(sweep.table, step), sweep.timestep(step))
            for c in components:
                moments[c.name].add(outputs[f"{TRUNK}{c.index}"], outputs[f"{COMPUTED}{c.index}"], c.axis)
        fitted.append({name: own.fit() for name, own in moments.items()})
        on_progress(Progress(stage="calibration", done=b + 1, total=len(sweep.bins)))
    return fitted


def hand_in(sweep: Sweep, seen: Array, step: int, branches: Mapping[str, Array], name: str, branch: Array) -> Array:
    """Predict with a tensor in place of a component's branch; `branches` are all branches of the full model."""
    cache = BranchCache()
    index = next(component.index for component in sweep.components if component.name == name)
    cache.store({**branches, f"{COMPUTED}{index}": branch}, sweep.timestep(step))
    return sweep.recall(seen, step, cache, [name], Treatment.HOLD)


def local_errors(
    sweep: Sweep,
    base: FullTrajectory,
    b: int,
    means: NDArray[np.float32],
    maps: Mapping[str, Affine],
    traced: TracedDenoiser,
    components: Sequence[Component],
) -> dict[str, dict[str, float]]:
    """Measure how far the prediction moves at the middle step of a bin, for every component and replacement.

    The replacement "itself" passes in the full model's own branch, so its error is rounding alone.
    """
    steps = sweep.steps_of(b)
    step = steps[len(steps) // 2]
    seen, timestep = base.states[step].seen(sweep.table, step), sweep.timestep(step)
    expected = base.states[step + 1].predictions[0]
    outputs = traced(seen, timestep)
    branches = {name: array for name, array in outputs.items() if name.startswith(COMPUTED)}
    sources = [at for at in (step - PERIOD // 2 - PERIOD, step - PERIOD // 2) if at >= 0]
    earlier = branches_at(sweep, base, sources, 1)
    errors: dict[str, dict[str, float]] = {}
    for component in components:
        own = [component.name]
        mapped = maps[component.name](outputs[f"{TRUNK}{component.index}"], component.axis)
        computed = branches[f"{COMPUTED}{component.index}"]
        predictions = {
            "affine": hand_in(sweep, seen, step, branches, component.name, mapped),
            "itself": hand_in(sweep, seen, step, branches, component.name, computed),
        }
        for treatment in (Treatment.DROP, Treatment.MEAN):
            gates = sweep.gates(own, treatment)
            predictions[treatment] = sweep.denoiser.predict(seen, timestep, gates=gates, means=means)
        if sources:
            predictions["forecast"] = sweep.recall(seen, step, earlier, own, Treatment.FORECAST)
        errors[component.name] = {
            str(way): float(relative_l2(expected, prediction).mean()) for way, prediction in predictions.items()
        }
    return errors


def judge(errors: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict[str, object]]:
    """Count the (component, bin) entries where the affine map is best."""
    entries = [entry for own in errors for entry in own.values()]
    removals = [min(entry["drop"], entry["mean"]) for entry in entries]
    best = [min(entry[way] for way in WAYS if way != "affine" and way in entry) for entry in entries]
    affine = [entry["affine"] for entry in entries]

    def wins(others: Sequence[float]) -> int:
        return sum(own < other for own, other in zip(affine, others, strict=True))

    def ratio(others: Sequence[float]) -> float:
        return float(np.median(np.array(affine) / np.maximum(others, 1e-12)))

    means = [entry["mean"] for entry in entries]
    return [
        {"figure": "entries (component, bin)", "value": len(entries)},
        {"figure": "entries where affine beats mean", "value": wins(means)},
        {"figure": "entries where affine beats drop and mean", "value": wins(removals)},
        {"figure": "entries where affine beats drop, mean and forecast", "value": wins(best)},
        {"figure": "affine / mean, median over entries", "value": ratio(means)},
        {"figure": "affine / best of drop and mean, median over entries", "value": ratio(removals)},
        {"figure": "affine / best of drop, mean and forecast, median over entries", "value": ratio(best)},
        {
            "figure": "largest error when the computed branch is handed in (control)",
            "value": max(entry["itself"] for entry in entries),
            "goal": {"at_most": 1e-4},
        },
    ]


def tabulate(errors: Sequence[Mapping[str, Mapping[str, float]]], components: Sequence[Component]) -> dict[str, object]:
    """Average the errors of every component over the bins where every replacement was measured."""
    rows = []
    for component in components:
        own = [errors_of_bin[component.name] for errors_of_bin in errors]
        whole = [entry for entry in own if all(way in entry for way in WAYS)]
        means = [float(np.mean([entry[way] for entry in whole])) if whole else None for way in WAYS]
        others = [min(entry[way] for way in WAYS if way != "affine" and way in entry) for entry in own]
        rows.append(
            [
                component.name,
                *means,
                sum(entry["affine"] < entry["mean"] for entry in own),
                sum(entry["affine"] < other for entry, other in zip(own, others, strict=True)),
            ]
        )
    return {
        "title": f"Local error, mean over bins; bins of {len(errors)} where affine beats mean, and all others",
        "columns": ["component", *WAYS, "beats mean", "beats all"],
        "rows": rows,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/bench", help="cache")
    add_results(parser)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=16, help="trajectories of calibration, and again of evaluation")
    parser.add_argument("--bins", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="seed of the evaluation; calibration uses the next one")
    options = parser.parse_args()
    threads = cores()
    model = find_model("digits")
    backend = open_backend("onnxruntime:cpu", threads=threads)
    table = extract(make_scheduler("ddim", model.scheduler_config), options.steps)
    with progress() as on_progress:
        gated = prepare(model, options.work, on_progress).gated
        components = [component for component in gated.components if component.kind == "residual"]
        traced = TracedDenoiser(gated, components, backend)
        evaluation = Sweep(
            denoiser=GatedDenoiser(gated, backend),
            components=gated.components,
            ablated=gated.components,
            table=table,
            bins=make_bins(table.log_snr, options.bins),
            sample_shape=model.sample_shape,
            samples=options.samples,
            seed=options.seed,
            rows=options.samples,
        )
        calibration = replace(evaluation, seed=options.seed + 1)
        calibrated = run_base(calibration, on_progress)
        maps = calibrate(calibration, calibrated, traced, components, on_progress)
        base = run_base(evaluation, on_progress)
        errors = []
        for b in range(options.bins):
            means = calibrated.means[b]
            errors.append(local_errors(evaluation, base, b, means, maps[b], traced, components))
            on_progress(Progress(stage="local errors", done=b + 1, total=options.bins))
    sizes = {name: getattr(options, name) for name in ("steps", "samples", "bins", "seed")}
    measured = {
        "settings": {"model": "digits", **sizes, "threads": threads},
        "figures": judge(errors),
        "tables": [tabulate(errors, components)],
        "errors": errors,
    }
    write(options.results, "affine", measured)


if __name__ == "__main__":
    main()

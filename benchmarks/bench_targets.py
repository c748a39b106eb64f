"""How do the available targets compare?

    python benchmarks/bench_targets.py           # about 3 minutes on two cores, with torch:cpu:compiled

The benchmark times engines of the reference model on every target, alternately, and writes `results/targets.json`:

- milliseconds per call of the full model, of the model without its lowest level, and of one that holds it
- the share of a call that these two save, as an analysis on this target would find it
- overhead: wall time of `Session.sample` / time inside the engine calls, where each call waits for its result
- difference: largest difference from onnxruntime's samples, which lie in -1 to 1
- seconds to load the full model and call it once
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
from bench_runtime import plan_of
from clock import HostClock, Timed
from command_line import add_results
from result_file import write

from unetc.cli.output import progress
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.prepare import Prepared, prepare
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.compiler.tensorrt.on_demand import OnDemand
from unetc.conditions import UNCONDITIONAL
from unetc.device import Array
from unetc.environment import cores
from unetc.errors import UnetcError
from unetc.models.find import find_model
from unetc.progress import Progress, ignore
from unetc.runtime.backends.registry import OFFERED, open_backend
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.session import Session
from unetc.timing import interleaved_ms
from unetc.treatments import Treatment

ENGINES = ("full", "dropped", "held")


class Target:
    """The three engines on one target, and a session whose plan alternates between the full and the holding one."""

    def __init__(self, name: str, prepared: Prepared, steps: int, batch: int, threads: int) -> None:
        """Load the engines; loading includes the first call."""
        model, gated = prepared.model, prepared.gated
        level = next(component.name for component in gated.components if component.kind == "level")
        chosen = with_emissions([{}, {level: Treatment.DROP}, {level: Treatment.HOLD}], gated.components)
        calls = MeasuredCalls.of(model.sample_shape, batch, batch, UNCONDITIONAL)
        backend = open_backend(name, threads=threads).prepared_by(OnDemand(calls, frozenset, ignore))
        device = backend.device
        loader = backend.open_weights(gated.weights.read_bytes())
        self._batch, self._steps = batch, steps
        sample = np.random.default_rng(0).standard_normal((batch, *model.sample_shape)).astype(np.float32)
        self._inputs = {"sample": device.put(sample), "timestep": device.full((batch,), 500.0)}
        self._output = device.empty(sample.shape)
        self._clock = HostClock(device)
        self._programs: list[Timed] = []
        branches = BranchCache(device=device)
        start = time.perf_counter()
        for engine in chosen:
            graph = specialise(gated, engine.treatments, np.zeros(gated.channels, dtype=np.float32), engine.emits)
            self._programs.append(Timed(loader.load(graph), self._clock))
            branches.store(self._programs[-1](self._inputs, self._output), 550.0)
            self._inputs |= branches.inputs(500.0, rows=batch)
            if len(self._programs) == 1:
                self.load_s = time.perf_counter() - start
        self._session = Session(
            plan=plan_of(model.reference, chosen, (0, 2)),
            full=self._programs[0],
            programs=self._programs,
            scheduler=extract_all(make_scheduler("ddim", model.scheduler_config), "ddim", [steps]),
            sample_shape=model.sample_shape,
            steps=steps,
            device=device,
        )

    def call(self, engine: int) -> None:
        """Call an engine by its position in `ENGINES`."""
        self._programs[engine](self._inputs, self._output)

    def sample(self, seed: int) -> tuple[Array, float]:
        """Sample; also return the time of the whole / the time inside the engine calls."""
        for program in self._programs:
            program.take_ms()  # of earlier calls
        start = self._clock.mark()
        sample = self._session.sample(self._batch, seed=seed)
        whole = self._clock.between_ms(start, self._clock.mark())
        return sample, whole / sum(program.take_ms() for program in self._programs)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/bench", help="cache")
    add_results(parser)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20, help="timed repetitions; sampling takes a quarter of them")
    options = parser.parse_args()
    targets: dict[str, Target] = {}
    absent: dict[str, str] = {}
    with progress() as on_progress:
        prepared = prepare(find_model("digits"), options.work, on_progress)
        for i, name in enumerate(OFFERED):
            on_progress(Progress(stage="loading", done=i, total=len(OFFERED)))
            try:
                targets[name] = Target(name, prepared, options.steps, options.batch, cores())
            except UnetcError as error:
                absent[name] = str(error)
        calls = [partial(target.call, i) for target in targets.values() for i in range(len(ENGINES))]
        times = interleaved_ms(calls, rounds=options.rounds).reshape(options.rounds, len(targets), len(ENGINES))
        rows = []
        expected, _ = targets["onnxruntime:cpu"].sample(0)
        for i, (name, target) in enumerate(targets.items()):
            on_progress(Progress(stage="sampling", done=i, total=len(targets)))
            sampled = [target.sample(seed) for seed in range(max(1, options.rounds // 4))]
            saved = np.median(1 - times[:, i, 1:] / times[:, i, :1], axis=0)
            rows.append(
                [
                    name,
                    *(float(value) for value in np.median(times[:, i], axis=0)),
                    *(float(value) for value in saved),
                    float(np.median([ratio for _, ratio in sampled])),
                    float(np.abs(sampled[0][0] - expected).max()),
                    target.load_s,
                ]
            )
    columns = ["target", *(f"{name}, ms" for name in ENGINES), "dropped saves", "held saves"]
    columns += ["sampling / engine calls", "difference", "load, s"]
    measured = {
        "settings": {
            "model": "digits",
            "threads": cores(),
            **{name: getattr(options, name) for name in ("steps", "batch", "rounds")},
        },
        "tables": [{"title": "Targets", "columns": columns, "rows": rows}],
        "absent": absent,
    }
    write(options.results, "targets", measured)


if __name__ == "__main__":
    main()

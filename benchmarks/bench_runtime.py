"""What does the runtime cost in time and memory?

    python benchmarks/bench_runtime.py           # about 4 minutes on two cores

The benchmark times engines of the reference model on random inputs and writes `results/runtime.json`:

- additivity: engine time / (full time − the sum of its parts' savings). Parts are the components that the engine
  removes and that are not nested in another removed one; each saving is measured with a separate engine. Engines are
  random assignments of removals, and one per level as a control: there a second engine without the same level gives the
  saving. All engines are timed alternately
- overhead: wall time of `Session.sample` / time spent inside the engine calls, for the full model and for plans that
  change the engine at every step
- switching: time of a call after a call of another engine − time after a call of the same engine, in full steps, with
  an interval over resampled rounds. The calls go A A B B, so a disturbance of the machine affects both kinds alike
- memory: a fresh process with five engines / with the full model alone, after one call of each. `digits` has small
  weights compared with onnxruntime itself; a random UNet has larger ones
- emission: time of the full model emitting the branches of all components / time of the full model

Ratios are medians over rounds of the ratio within a round. `memory` counts whole processes, libraries included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import HostClock, Timed
from command_line import add_results
from diffusers import UNet2DModel
from result_file import write
from rounds import spread, switch_cost

import unetc
from unetc.analyzer.denoiser import GatedDenoiser
from unetc.artifacts.plan import Assignment, Phase, Plan, Prediction
from unetc.artifacts.profile import STEP, ModelReference
from unetc.backend import Array, Backend, Program
from unetc.cli.output import progress
from unetc.compiler.graph.capture import capture
from unetc.compiler.graph.gated import GatedGraph, open_or_build
from unetc.compiler.graph.specialise import specialise
from unetc.compiler.planner.emissions import with_emissions
from unetc.compiler.prepare import prepare
from unetc.compiler.schedulers.extract import extract_all
from unetc.compiler.schedulers.make import make_scheduler
from unetc.device import HOST
from unetc.environment import cores
from unetc.models.find import find_model
from unetc.models.model import Model
from unetc.progress import OnProgress, Progress
from unetc.runtime.backends.registry import Memory, open_backend
from unetc.runtime.session import Session
from unetc.sampler.table import SchedulerTables
from unetc.timing import interleaved_ms
from unetc.treatments import Treatment

TIMESTEP = 500.0
RANDOM_ASSIGNMENTS = 5
RANDOM = "random "
"""Beginning of their names."""
REMOVED_SHARE = 0.25
"""Probability that a random assignment removes a component."""
OTHERS_PER_FULL = 4
"""Number of other engines timed between two calls of the full one, whose time enters every difference."""
SWITCHES_PER_ROUND = 40
"""A switch costs less than the noise of one call, so a round times many of them."""

RESIDENT = """
import sys
from pathlib import Path
import numpy as np
from unetc.backend import SerialisedGraph
from unetc.runtime.backends.registry import Memory, open_backend

memory, threads, weights, shape, *graphs = sys.argv[1:]
backend = open_backend("onnxruntime:cpu", threads=int(threads), memory=Memory(memory))
loader = backend.open_weights(Path(weights).read_bytes())
sample = np.zeros([int(size) for size in shape.split(",")], dtype=np.float32)
inputs = {"sample": sample, "timestep": np.full(len(sample), 500.0, dtype=np.float32)}
programs = []
for graph in graphs:
    needed = frozenset(Path(graph).with_suffix(".txt").read_text().split("\\n"))
    programs.append(loader.load(SerialisedGraph(graph=Path(graph).read_bytes(), weights=needed)))
for program in programs:
    program(inputs, np.empty_like(sample))
lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
print(kilobytes["Rss"], kilobytes["Pss"])
"""
"""Script of a fresh process: load engines from files, call each once, print Rss and Pss in kB.

Rss counts a page once per mapping, so a page shared by the sessions of a process counts once per session. Pss divides
a page by the number of its mappings, which gives the memory that the process really takes.
"""

LARGE = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (96, 192, 384),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
"""Configuration of a UNet2DModel with 95 MiB of weights."""

COLUMNS = ["engine", "outermost removals", "ms", "expected ms", "ratio", "10th percentile", "90th percentile"]
"""Columns of the table of additivity."""
RATIO = COLUMNS.index("ratio")

Treatments = Mapping[str, Treatment]


class Engines:
    """Specialises and loads engines of one model, and keeps inputs for them."""

    def __init__(self, gated: GatedGraph, backend: Backend, sample_shape: tuple[int, int, int], batch: int) -> None:
        """Open the weights and compute the branch means on noise."""
        self.gated = gated
        self._loader = backend.open_weights(gated.weights.read_bytes())
        self.sample: Array = np.random.default_rng(0).standard_normal((batch, *sample_shape)).astype(np.float32)
        self._inputs = {"sample": self.sample, "timestep": np.full(batch, TIMESTEP, dtype=np.float32)}
        self._output = np.empty_like(self.sample)
        self.means = GatedDenoiser(gated, backend).branch_means(self.sample, TIMESTEP)

    def load(self, treatments: Treatments, emits: Sequence[str] = ()) -> Program:
        """Specialise and load the engine of an assignment."""
        return self._loader.load(specialise(self.gated, treatments, self.means, emits))

    def call(self, program: Program) -> object:
        """Run a program that needs no held branches."""
        return program(self._inputs, self._output)


def outermost(gated: GatedGraph, treatments: Treatments) -> list[str]:
    """List the removed components that are not nested in another removed one."""
    nested = {inner for c in gated.components if c.name in treatments for inner in c.nested}
    return [name for name in treatments if name not in nested]


def assignments_of(gated: GatedGraph, seed: int) -> dict[str, dict[str, Treatment]]:
    """List the assignments whose time is compared with the savings of their parts."""
    chosen = {c.name: {c.name: Treatment.DROP} for c in gated.components if c.kind == "level"}
    generator = np.random.default_rng(seed)
    names = [component.name for component in gated.components if component.name != STEP]
    for number in range(RANDOM_ASSIGNMENTS):
        removed = generator.random(len(names)) < REMOVED_SHARE
        kinds = generator.choice([Treatment.DROP, Treatment.MEAN], size=len(names))
        chosen[f"{RANDOM}{number + 1}"] = {
            name: Treatment(kind) for name, kind, gone in zip(names, kinds, removed, strict=True) if gone
        }
    return chosen


def additivity(rows: Sequence[Sequence[Any]]) -> list[dict[str, object]]:
    """Judge the random engines; engines without a level, each timed against a second one like it, are the control."""
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        ratios[row[0].startswith(RANDOM)].append(row[RATIO])
    goal = {"at_most": 1.03}
    return [
        {
            "figure": "additivity: engine time / expected, median over the random engines",
            "value": float(np.median(ratios[True])),
            "goal": goal,
        },
        {"figure": "additivity: worst of the random engines", "value": max(ratios[True]), "goal": goal},
        {
            "figure": "additivity: the same of engines without a level (control: 1), farthest",
            "value": max(ratios[False], key=lambda ratio: abs(ratio - 1)),
        },
    ]


def additivity_and_emission(
    engines: Engines, assignments: Mapping[str, Treatments], rounds: int, on_progress: OnProgress
) -> tuple[list[dict[str, object]], dict[str, object]]:
    """Time the engines of additivity and emission alternately."""
    gated = engines.gated
    singles = sorted({(name, own[name]) for own in assignments.values() for name in outermost(gated, own)})
    programs = [engines.load({}, [component.name for component in gated.components])]
    programs += [engines.load({name: treatment}) for name, treatment in singles]
    programs += [engines.load(own) for own in assignments.values()]
    whole = engines.load({})
    alternating: list[Program] = []
    for i, program in enumerate(programs):
        alternating += [program] if i % OTHERS_PER_FULL else [whole, program]
    on_progress(Progress(stage="alternating engines", done=0, total=1))
    times = interleaved_ms([partial(engines.call, program) for program in alternating], rounds=rounds)
    on_progress(Progress(stage="alternating engines", done=1, total=1))
    is_whole = np.array([program is whole for program in alternating])
    full, others = np.median(times[:, is_whole], axis=1), times[:, ~is_whole]
    without = {single: others[:, 1 + i] for i, single in enumerate(singles)}
    rows: list[list[object]] = []
    for i, (label, own) in enumerate(assignments.items()):
        taken = others[:, 1 + len(singles) + i]
        outer = outermost(gated, own)
        expected = full - sum((full - without[name, own[name]] for name in outer), start=np.zeros(rounds))
        rows.append([label, len(outer), float(np.median(taken)), float(np.median(expected)), *spread(taken / expected)])
    table = {"title": "Additivity: engine time, measured and expected from savings of parts", "columns": COLUMNS}
    figures: list[dict[str, object]] = [
        {"figure": "full model, ms per call", "value": float(np.median(full))},
        *additivity(rows),
        {"figure": "emission: full model that emits all / none", "value": spread(others[:, 0] / full)[0]},
    ]
    return figures, {**table, "rows": rows}


def plan_of(model: ModelReference, engines: tuple[Assignment, ...], cycle: tuple[int, ...]) -> Plan:
    """Plan one cycle of engines over all noise levels."""
    return Plan(
        unetc=unetc.__version__,
        model=model,
        profile_sha256="",
        budget=0.0,
        max_engines=len(engines),
        engines=engines,
        phases=(Phase(low=-1e6, high=1e6, cycle=cycle),),
        prediction=Prediction(time_ratio=1.0, relative_l2=0.0, memory=2.0),
    )


def overhead(
    engines: Engines, model: Model, scheduler: SchedulerTables, steps: int, rounds: int, on_progress: OnProgress
) -> list[dict[str, object]]:
    """Compare the wall time of sampling with the time inside the engine calls."""
    components = engines.gated.components
    level = next(component.name for component in components if component.kind == "level")
    plans = {
        "full model": plan_of(model.reference, with_emissions([{}], components), (0,)),
        "full and without a level, alternating": plan_of(
            model.reference, with_emissions([{}, {level: Treatment.DROP}], components), (0, 1)
        ),
        "full and holding a level, alternating": plan_of(
            model.reference, with_emissions([{}, {level: Treatment.HOLD}], components), (0, 1)
        ),
    }
    figures: list[dict[str, object]] = []
    clock = HostClock(HOST)
    for label, plan in plans.items():
        programs = [Timed(engines.load(engine.treatments, engine.emits), clock) for engine in plan.engines]
        session = Session(
            plan=plan,
            full=programs[0],
            programs=programs,
            scheduler=scheduler,
            sample_shape=model.sample_shape,
            steps=steps,
        )
        ratios = np.empty(rounds)
        session.sample(len(engines.sample), steps=steps)
        for program in programs:
            program.take_ms()  # of the warm-up
        for i in range(rounds):
            start = clock.mark()
            session.sample(len(engines.sample), steps=steps, seed=i)
            ratios[i] = clock.between_ms(start, clock.mark()) / sum(program.take_ms() for program in programs)
        goal = {"at_most": 1.01}
        figures.append(
            {"figure": f"overhead: sampling / engine calls, {label}", "value": spread(ratios)[0], "goal": goal}
        )
        on_progress(Progress(stage="sampling", done=len(figures), total=len(plans)))
    return [*figures, {"figure": "overhead: cost of the timer, µs per call", "value": _timer_us()}]


def _timer_us() -> float:
    def nothing(inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
        return inputs

    timed, calls, output = Timed(nothing, HostClock(HOST)), 100_000, np.empty(0, dtype=np.float32)
    times = interleaved_ms(
        [lambda p=program: [p({}, output) for _ in range(calls)] for program in (timed, nothing)],  # type: ignore[misc]
        rounds=5,
    )
    return float(1e3 * np.median(times[:, 0] - times[:, 1]) / calls)


def switching(engines: Engines, rounds: int, on_progress: OnProgress) -> list[dict[str, object]]:
    """Compare calls of an engine after another engine with calls after itself."""
    level = next(component.name for component in engines.gated.components if component.kind == "level")
    pair = engines.load({}), engines.load({level: Treatment.DROP})
    on_progress(Progress(stage="switching", done=0, total=1))
    calls = [partial(engines.call, pair[engine]) for engine in (0, 0, 1, 1)]  # first of a pair: after a switch
    times = interleaved_ms(calls, rounds=rounds)
    on_progress(Progress(stage="switching", done=1, total=1))
    cost, low, high = switch_cost(times)
    return [
        {"figure": "switching: more per step, in full steps", "value": cost, "goal": {"at_most": 0.005}},
        {"figure": "switching, lower end of the 95 % interval", "value": low},
        {"figure": "switching, upper end of the 95 % interval", "value": high},
    ]


def large_model(work: Path) -> GatedGraph:
    """Capture a UNet with 95 MiB of random weights; memory does not depend on their values."""
    torch.manual_seed(0)
    return open_or_build(work / "large", lambda: capture(UNet2DModel(**LARGE).eval()))


def memory(
    label: str,
    engines: Engines,
    assignments: Mapping[str, Treatments],
    threads: int,
    work: Path,
    on_progress: OnProgress,
) -> list[dict[str, object]]:
    """Measure fresh processes with no engine, with the full model and with five engines."""
    folder = work / "resident" / label
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [{}, *(own for name, own in assignments.items() if name.startswith(RANDOM))][:5]
    paths = []
    for i, own in enumerate(chosen):
        graph = specialise(engines.gated, own, engines.means)
        paths.append(folder / f"{i}.onnx")
        paths[-1].write_bytes(graph.graph)
        paths[-1].with_suffix(".txt").write_text("\n".join(sorted(graph.weights)))
    shape = ",".join(str(size) for size in engines.sample.shape)
    figures: list[dict[str, object]] = []
    for done, mode in enumerate(Memory):
        on_progress(Progress(stage=f"memory of {label}", done=done, total=len(Memory)))
        counts = (0, 1, len(paths))
        resident = []
        for count in counts:
            arguments = [mode.value, str(threads), engines.gated.weights, shape, *paths[:count]]
            process = subprocess.run(
                [sys.executable, "-c", RESIDENT, *arguments], capture_output=True, text=True, check=True
            )
            resident.append([int(kilobytes) / 1024 for kilobytes in process.stdout.split()])
        for measure, (nothing, one, everything) in zip(("Rss", "Pss"), zip(*resident, strict=True), strict=True):
            what = f'memory="{mode}", {label}, {measure}'
            goal = {"goal": {"at_most": 1.2}} if (mode, measure) == (Memory.LOW, "Pss") else {}
            figures += [
                {"figure": f"{what}: no engine, but the weights, MiB", "value": nothing},
                {"figure": f"{what}: the full model, MiB", "value": one},
                {"figure": f"{what}: {len(paths)} engines, MiB", "value": everything},
                {"figure": f"{what}: {len(paths)} engines / the full model", "value": everything / one, **goal},
                {"figure": f"{what}: each further engine, MiB", "value": (everything - one) / (len(paths) - 1)},
            ]
    on_progress(Progress(stage=f"memory of {label}", done=len(Memory), total=len(Memory)))
    return figures


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/unetc/bench", help="cache")
    add_results(parser)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--rounds",
        type=int,
        default=40,
        help="timed repetitions; sampling takes a quarter of them, switching 40 times as many",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random assignments")
    options = parser.parse_args()
    threads = cores()
    model = find_model("digits")
    scheduler = extract_all(make_scheduler("ddim", model.scheduler_config), "ddim", [options.steps])
    with progress() as on_progress:
        gated = prepare(model, options.work, on_progress).gated
        backend = open_backend("onnxruntime:cpu", threads=threads)
        engines = Engines(gated, backend, model.sample_shape, options.batch)
        assignments = assignments_of(gated, options.seed)
        figures, table = additivity_and_emission(engines, assignments, options.rounds, on_progress)
        figures += overhead(engines, model, scheduler, options.steps, max(1, options.rounds // 4), on_progress)
        figures += switching(engines, SWITCHES_PER_ROUND * options.rounds, on_progress)
        figures += memory("digits", engines, assignments, threads, options.work, on_progress)
        large = Engines(large_model(options.work), backend, (3, 32, 32), 1)
        drawn = assignments_of(large.gated, options.seed)
        figures += memory("95 MiB", large, drawn, threads, options.work, on_progress)
    sizes = {name: getattr(options, name) for name in ("steps", "batch", "rounds", "seed")}
    measured = {
        "settings": {"model": "digits", **sizes, "threads": threads},
        "figures": figures,
        "tables": [table],
        "assignments": assignments,
    }
    write(options.results, "runtime", measured)


if __name__ == "__main__":
    main()

"""Sweeps over the tiny model, and a backend that records calls, for tests of the analyzer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.models import Tiny, shared_folder, tiny_of
from unetc.analyzer.ablation import TRIED, Ablation, PeriodicTreatment, ablations_of
from unetc.analyzer.bench import Bench
from unetc.analyzer.cost import Costs
from unetc.analyzer.denoiser import GatedDenoiser
from unetc.analyzer.sweep import Course, FullTrajectory, Sweep, make_bins
from unetc.artifacts.profile import Cost, Effect, Estimate, ModelReference
from unetc.backend import Array, Backend, Loader, Program, SerialisedGraph
from unetc.compiler.graph.gated import GatedGraph
from unetc.compiler.schedulers.extract import extract
from unetc.compiler.schedulers.make import make_scheduler
from unetc.device import Device
from unetc.jobs import InProcess
from unetc.runtime.backends.registry import open_backend
from unetc.sampler.table import SchedulerTable

ARCHITECTURE = "attention"
SHAPE = (2, 16, 16)
SAMPLES, SEED = 2, 5
STEPS, BINS = 5, 2  # bins of 3 and 2 steps
CONFIG: Mapping[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@functools.cache
def tiny() -> Tiny:
    """Share one architecture between the tests of all files."""
    return tiny_of(ARCHITECTURE, shared_folder())


def table_of(scheduler: str, steps: int = STEPS) -> SchedulerTable:
    return extract(make_scheduler(scheduler, CONFIG), steps)


def backend() -> Backend:
    return open_backend("onnxruntime:cpu", threads=1)


def sweep_of(scheduler: str, *, on: Backend | None = None, **changes: Any) -> Sweep:
    gated, table = tiny().gated, table_of(scheduler)
    settings: dict[str, Any] = {
        "denoiser": GatedDenoiser(gated, on or backend(), prediction_type=table.prediction_type),
        "components": gated.components,
        "ablated": gated.components,
        "table": table,
        "bins": make_bins(table.log_snr, BINS),
        "sample_shape": SHAPE,
        "samples": SAMPLES,
        "seed": SEED,
        "rows": 5 * SAMPLES,  # not a divisor of the number of ablations: the last batch is smaller
    }
    return Sweep(**(settings | changes))


def along(sweep: Sweep, base: FullTrajectory) -> InProcess[Course]:
    """Run jobs along the full model's trajectory in this process."""
    return InProcess(bench=Course(sweep=sweep, base=base))


def here(gated: GatedGraph, on: Backend, table: SchedulerTable, samples: int) -> InProcess[Bench]:
    """Run the jobs of an analysis in this process."""
    return InProcess(bench=Bench.of(gated, on, samples=samples, prediction_type=table.prediction_type))


def everything(sweep: Sweep) -> list[tuple[Ablation, int]]:
    """List every ablation in every bin where it treats a step, in no particular order."""
    return [
        (ablation, b)
        for ablation in ablations_of(sweep.components, denoises=sweep.denoises)
        for b in reversed(range(BINS))
        if any(step % ablation.periodic.period or not ablation.periodic.treatment.reuses for step in steps_of(b))
    ]


def steps_of(b: int) -> range:
    return (range(3), range(3, STEPS))[b]


def kind_of(effect: Effect) -> PeriodicTreatment:
    return PeriodicTreatment(treatment=effect.treatment, period=effect.period)


def relative_l2(reference: Array, candidate: Array) -> float:
    """Compute the relative L2, averaged over samples, without the library."""
    norms = [np.linalg.norm(c - r) / np.linalg.norm(r) for r, c in zip(reference, candidate, strict=True)]
    return float(np.mean(norms))


class Watched:
    """A backend whose programs report every call before they run."""

    def __init__(self, inner: Backend, on_call: Callable[[Mapping[str, object], Array], None]) -> None:
        self._inner = inner
        self._on_call = on_call

    def open_weights(self, weights: bytes) -> Loader:
        self._loader = self._inner.open_weights(weights)
        return self

    def load(self, graph: SerialisedGraph) -> Program:
        program = self._loader.load(graph)

        def run(inputs: Mapping[str, object], output: Array) -> Mapping[str, object]:
            self._on_call(inputs, output)
            return program(inputs, output)

        return run

    @property
    def device(self) -> Device:
        return self._inner.device


class Recorder(Watched):
    """A backend that records the inputs of its programs."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner, self._record)
        self.calls: list[dict[str, Any]] = []
        """Inputs of every call; arrays are copied, other tensors are kept."""

    def _record(self, inputs: Mapping[str, object], output: Array) -> None:
        self.calls.append(
            {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in inputs.items()}
        )


REMOVALS = tuple(kind for kind in TRIED if not kind.treatment.reuses)
REUSES = tuple(kind for kind in TRIED if kind.treatment.reuses)


def estimate_of(value: float) -> Estimate:
    return Estimate(mean=value, low=value, high=value)


def made_up_costs(gated: GatedGraph, *_: object, **__: object) -> Costs:
    """Replace `measure_costs`; later components save more, so decisive ablations are not simply the first ones."""
    saved = [1 + component.index for component in gated.components]
    costs = (
        Cost(component=c.name, saved_ms=estimate_of(s), freed_bytes=0)
        for c, s in zip(gated.components, saved, strict=True)
    )
    return Costs(full_ms=estimate_of(100.0), full_bytes=1, costs=tuple(costs))


REFERENCE = ModelReference(name="m", sha256="0" * 64, pipeline="DDPMPipeline", denoiser="UNet2DModel")

"""The bench of an analysis: a target that is open, with the gated graph and its weights loaded."""

from __future__ import annotations

from dataclasses import dataclass

from unetc.backend import Backend
from unetc.compiler.graph.gated import GatedGraph, PackedGraph
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.tensorrt.on_demand import OnDemand
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.jobs import Advance
from unetc.progress import ignore
from unetc.runtime.backends.registry import open_backend
from unetc.sampler.noise import initial_noise
from unetc.sampler.prediction_type import PredictionType

from .denoiser import FirstCall, GatedDenoiser


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What the jobs of an analysis run on."""

    gated: GatedGraph
    backend: Backend
    conditions: Conditions
    denoiser: GatedDenoiser

    @classmethod
    def of(
        cls,
        gated: GatedGraph,
        backend: Backend,
        conditions: Conditions = UNCONDITIONAL,
        *,
        samples: int,
        prediction_type: PredictionType | None,
    ) -> Bench:
        """Load a graph.

        Args:
            gated: The graph.
            backend: The target, opened.
            conditions: Conditions of the samples: sample k gets row k, modulo the number of rows.
            samples: Trajectories per ablation.
            prediction_type: How the denoised sample follows from a prediction; None if it is never reused.
        """
        denoiser = GatedDenoiser(gated, backend, conditions.take(range(samples)), prediction_type)
        return cls(gated=gated, backend=backend, conditions=conditions, denoiser=denoiser)


@dataclass(frozen=True, slots=True, kw_only=True)
class TryCall:
    """The job of a first call, which emits all branches."""

    batch: int
    sample_shape: tuple[int, int, int]
    timestep: float
    name: str = "the first call"

    def run(self, bench: Bench, advance: Advance) -> FirstCall:
        """Measure its time and memory."""
        return bench.denoiser.try_call(initial_noise(0, range(self.batch), self.sample_shape), self.timestep)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRecipe:
    """All that a machine needs to set up a bench: no model folder, no shared disk, no torch."""

    graph: PackedGraph
    conditions: Conditions
    samples: int
    prediction_type: PredictionType | None
    target: str
    threads: int
    calls: MeasuredCalls
    """The calls that programs will get."""
    wide: frozenset[str]
    """Values that stay float32 on a target of lower precision."""

    def open(self) -> Bench:
        """Open the target and load the graph.

        Raises:
            SessionError: If there is no such target on this machine.
            MissingDependency: If its library is not installed.
        """
        target = open_backend(self.target, threads=self.threads)
        backend = target.prepared_by(OnDemand(self.calls, lambda: self.wide, ignore))
        return Bench.of(
            self.graph.unpack(),
            backend,
            self.conditions,
            samples=self.samples,
            prediction_type=self.prediction_type,
        )

"""The bench of an analysis: a target that is open, with the gated graph and its weights loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from unetc.backend import Backend
from unetc.compiler.graph.gated import GatedGraph, PackedGraph
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.jobs import Advance
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
class AnalysisEquipment:
    """All that the bench of an analysis needs besides an open target."""

    graph: GatedGraph | PackedGraph
    conditions: Conditions
    samples: int
    prediction_type: PredictionType | None

    def packed(self) -> AnalysisEquipment:
        """Pack the graph, with its weights."""
        return replace(self, graph=self.graph.pack()) if isinstance(self.graph, GatedGraph) else self

    def on(self, backend: Backend) -> Bench:
        """Load the graph."""
        return Bench.of(
            self.graph if isinstance(self.graph, GatedGraph) else self.graph.unpack(),
            backend,
            self.conditions,
            samples=self.samples,
            prediction_type=self.prediction_type,
        )

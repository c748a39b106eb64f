"""Where a model is measured: in this process, or on the machines of a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, Protocol

from unetc.backend import Backend, TargetBackend
from unetc.conditions import Conditions
from unetc.environment import machine_for, on_cpu
from unetc.errors import ProfileError
from unetc.jobs import Bench, BenchOut, Cluster, InProcess, Workers
from unetc.precision import Precision
from unetc.progress import OnProgress, Progress, ignore
from unetc.ray_token import guard
from unetc.runtime.backends.registry import check_target, open_backend

from .measured_calls import MeasuredCalls
from .tensorrt.on_demand import OnDemand

if TYPE_CHECKING:
    from unetc.ray_workers import RayWorkers


class Equipment(Protocol[BenchOut]):
    """All that a bench needs besides an open target."""

    def packed(self) -> Equipment[BenchOut]:
        """Return it in a form that travels: without folders."""

    def on(self, backend: Backend) -> BenchOut:
        """Set up the bench."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRecipe(Generic[Bench]):
    """All that a machine needs to set up a bench: no model folder, no shared disk, no torch."""

    equipment: Equipment[Bench]
    target: str
    threads: int
    calls: MeasuredCalls
    """The calls that programs will get."""
    wide: frozenset[str] = frozenset()
    """Values that stay float32 on a target of lower precision."""

    def open(self) -> Bench:
        """Open the target and set up the bench.

        Raises:
            SessionError: If there is no such target on this machine.
            MissingDependency: If its library is not installed.
        """
        target = open_backend(self.target, threads=self.threads)
        return self.equipment.on(target.prepared_by(OnDemand(self.calls, lambda: self.wide, ignore)))


class Place(Protocol):
    """A place that runs a target."""

    @property
    def reads(self) -> Precision:
        """Precision of the graphs that the target loads."""

    def check(self, conditions: Conditions) -> None:
        """Refuse conditions that cannot be measured here.

        Raises:
            ProfileError: If they cannot.
        """

    def workers(self, equipment: Equipment[Bench], on_demand: OnDemand) -> Workers[Bench]:
        """Set up the benches.

        Args:
            equipment: The model and its samples.
            on_demand: Prepares graphs for the target.
        """


@contextmanager
def place_for(target: str, threads: int, cluster: Cluster | None, on_progress: OnProgress) -> Iterator[Place]:
    """Open a target here, or join a cluster whose machines run it.

    Args:
        target: The target.
        threads: CPU threads of each worker.
        cluster: The cluster; None for this process.
        on_progress: Told of the workers of a cluster.

    Raises:
        SessionError: If there is no such target.
        ProfileError: If results of the target on several machines do not compare.
        MissingDependency: If its library or Ray is not installed.
        WorkerError: If the cluster cannot be joined, or no machine can work.
    """
    if cluster is None:
        yield _Here(target, open_backend(target, threads=threads))
        return
    check_target(target)
    if "tensorrt" in target:
        raise ProfileError(
            f"target {target} builds engines, which differ from machine to machine, so their damages do not compare. "
            "Measure it without --ray."
        )
    guard(cluster.address)
    from unetc.ray_workers import Needs, joined, machines_of, workers_of  # needs ray

    needs = Needs(
        cpus=threads,
        gpu=not on_cpu(target),
        describe=partial(machine_for, target),
        most_workers=cluster.most_workers,
    )
    with joined(cluster.address):
        machines = machines_of(needs)  # a cluster without room is refused before a capture
        yield _There(target, threads, lambda recipe: workers_of(recipe, machines), on_progress)


@dataclass(frozen=True, slots=True)
class _Here:
    target: str
    backend: TargetBackend

    @property
    def reads(self) -> Precision:
        return self.backend.reads

    def check(self, conditions: Conditions) -> None:
        """Accept all."""

    def workers(self, equipment: Equipment[Bench], on_demand: OnDemand) -> Workers[Bench]:
        bench = equipment.on(self.backend.prepared_by(on_demand))
        return InProcess(bench=bench, machine=machine_for(self.target))


@dataclass(frozen=True, slots=True)
class _There:
    target: str
    threads: int
    workers_of: Callable[[BenchRecipe[Bench]], RayWorkers[Bench]]
    on_progress: OnProgress

    @property
    def reads(self) -> Precision:
        return Precision.of_target(self.target)

    def check(self, conditions: Conditions) -> None:
        if conditions.control is not None:
            raise ProfileError("a ControlNet does not travel to a cluster. Measure with control images without --ray.")

    def workers(self, equipment: Equipment[Bench], on_demand: OnDemand) -> Workers[Bench]:
        recipe = BenchRecipe(
            equipment=equipment.packed(),
            target=self.target,
            threads=self.threads,
            calls=on_demand.calls,
            wide=on_demand.wide(self.reads),
        )
        workers = self.workers_of(recipe)
        for note in (f"{workers}: {workers.machine}", *workers.notes):
            self.on_progress(Progress(stage="workers", done=workers.count, total=workers.count, note=note))
        return workers

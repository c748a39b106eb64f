"""The engines of a prepared model on one target, loaded on their first call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial

import numpy as np
from clock import Clock, Timed, clock_of
from gpu_folder import PLANNED, REFRESH, Folder

import unetc
from unetc.artifacts.plan import Plan, Prediction
from unetc.backend import Loader, Program
from unetc.compiler.measured_calls import MeasuredCalls
from unetc.compiler.planner.schedule import phases_of
from unetc.compiler.tensorrt.on_demand import OnDemand
from unetc.device import Device, Tensor
from unetc.errors import PlanError
from unetc.progress import ignore
from unetc.runtime.backends.registry import open_backend
from unetc.runtime.branch_cache import BranchCache
from unetc.runtime.session import Session

TIMESTEPS = (550.0, 525.0, 500.0)
"""Two timesteps at which held branches are computed, and the timestep of the timed calls."""


class Loaded:
    """A model loaded on a target."""

    def __init__(self, folder: Folder, target: str, *, most: int, threads: int = 0) -> None:
        """Open the target.

        Args:
            folder: The prepared model.
            target: Name of a backend. Engines that must be built are built when they are first needed.
            most: Maximum number of samples per call.
            threads: Number of CPU threads; 0 lets the backend choose.

        Raises:
            UnetcError: If the target is unknown, or its library or device is missing.
        """
        self.folder = folder
        self.target = target
        self.most = most
        calls = MeasuredCalls.of(folder.model.sample_shape, 1, most, folder.conditions())
        self._backend = open_backend(target, threads=threads).prepared_by(OnDemand(calls, frozenset, ignore))
        self.device: Device = self._backend.device
        self.clock: Clock = clock_of(target, self.device)
        self._programs: dict[str, Program] = {}

    @property
    def title(self) -> str:
        """Name in tables."""
        return f"{self.folder.name} ({self.folder.model.precision})"

    @cached_property
    def _loader(self) -> Loader:
        return self._backend.open_weights(self.folder.weights)

    def program(self, engine: str) -> Program:
        """Load an engine on first use."""
        if engine not in self._programs:
            self._programs[engine] = self._loader.load(self.folder.graph(engine))
        return self._programs[engine]

    def batch(self, size: int) -> Batch:
        """Create inputs for a number of samples."""
        return Batch(self, size)

    def plan(self, schedule: Sequence[int]) -> Plan:
        """Write a schedule over the `PLANNED` engines as a plan.

        Raises:
            PlanError: If no plan can have this schedule.
        """
        levels = self.folder.table.log_snr.tolist()
        plan = Plan(
            unetc=unetc.__version__,
            model=self.folder.model.reference,
            profile_sha256="0" * 64,
            budget=0.0,
            max_engines=len(PLANNED),
            engines=tuple(self.folder.assignment(engine) for engine in PLANNED),
            phases=phases_of(schedule, levels, levels[0], levels[-1] + 1),
            prediction=Prediction(time_ratio=1.0, relative_l2=0.0, memory=float(len(PLANNED))),
        )
        if plan.schedule(levels) != tuple(schedule):
            raise PlanError(f"no plan has the schedule {tuple(schedule)}. Please report it.")
        return plan

    def session(self, plan: Plan, device: Device, programs: Sequence[Timed], full: Timed) -> Session:
        """Create a session that uses the given device."""
        model = self.folder.model
        return Session(
            plan=plan,
            full=full,
            programs=programs,
            scheduler=self.folder.scheduler(),
            sample_shape=model.sample_shape,
            steps=model.steps,
            predicted_channels=model.predicted_channels,
            conditions=self.folder.conditions(),
            device=device,
        )


class Batch:
    """Inputs of one size for all engines of a model; held branches are computed on first use."""

    def __init__(self, loaded: Loaded, size: int) -> None:
        """Draw inputs.

        Args:
            loaded: The engines.
            size: Number of samples; with guidance a call has twice as many rows.
        """
        self._loaded = loaded
        device, model = loaded.device, loaded.folder.model
        drawn = np.random.default_rng(0).standard_normal((size, *model.sample_shape), np.float32)
        self._sample = device.put(drawn)
        self._conditions = loaded.folder.conditions().take(range(size)).on(device)
        self._inputs = self._conditions.widen(self._sample, TIMESTEPS[-1])
        self.rows = len(self._inputs["sample"])
        self.output = device.empty((self.rows, model.predicted_channels, *model.sample_shape[1:]))
        """Prediction of the last call."""

    def call(self, engine: str, program: Program | None = None) -> Callable[[], object]:
        """Prepare a call of an engine, or of another program with its inputs."""
        inputs = self._with_held if self._loaded.folder.assignment(engine).reused else self._inputs
        return partial(program or self._loaded.program(engine), inputs, self.output)

    @cached_property
    def _with_held(self) -> Mapping[str, Tensor]:
        branches, refresh = BranchCache(device=self._loaded.device), self._loaded.program(REFRESH)
        for timestep in TIMESTEPS[:-1]:
            branches.store(refresh(self._conditions.widen(self._sample, timestep), self.output), timestep)
        return self._inputs | branches.inputs(TIMESTEPS[-1], rows=self.rows)

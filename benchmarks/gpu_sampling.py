"""Whole trajectories: plans against the full model, the loop around engines, the question whether all is finite."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_clock import Effort, Timed, timed_ms
from gpu_engines import Loaded
from gpu_folder import FULL, PLANNED
from gpu_result import Measured
from numpy.typing import NDArray
from rounds import spread

from unetc.device import Device, Tensor
from unetc.errors import NonFiniteError
from unetc.runtime.session import Session

BUDGETS = (0.27, 0.5)
PERIODS = (2, 3, 5)
"""Of DeepCache's plan: one step of so many is computed in full."""
MOST_OVER = 1.05
"""A plan may save so much more than its budget, in budgets."""
AIM = (1.0 + MOST_OVER) / 2
TWICE = 2.0
"""How much faster a plan shall be, at the budget of a half."""
LARGEST = "sdxl"
"""The model that this is asked of."""
DAMAGE_SAMPLES = 8


class Trusting:
    """A device that finds everything finite without looking."""

    def __init__(self, device: Device) -> None:
        """Wrap a device."""
        self._device = device

    def __getattr__(self, name: str) -> Any:
        """Leave everything else to the device."""
        return getattr(self._device, name)

    def is_finite(self, tensor: Tensor) -> bool:
        """Take it that it is."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Milliseconds of a call of the full model and of the engines that plans are made of."""

    full: float
    planned: NDArray[np.float64]
    """One for each of `PLANNED`."""

    def ratio(self, schedule: Sequence[int]) -> float:
        """Predict the time of a schedule / that of the full model."""
        return float(self.planned[list(schedule)].mean() / self.full)


def fit(times: Times, budget: float, steps: int) -> tuple[int, ...] | None:
    """Find a schedule that saves a budget and little more.

    Args:
        times: What the engines take.
        budget: Share of the full model's time to be saved.
        steps: Number of steps.

    Returns:
        Position in `PLANNED` of every step's engine; None if nothing saves the budget.
    """
    outer, inner = np.meshgrid(np.arange(steps), np.arange(steps), indexing="ij")
    refresh = steps - outer - inner
    taken = np.tensordot(times.planned, np.stack([refresh, outer, inner]), axes=1) / steps / times.full
    removed = (1 - taken) / budget
    distance = np.where((refresh > 0) & (removed >= 1), np.abs(removed - AIM), np.inf)
    best = np.unravel_index(np.argmin(distance), distance.shape)
    if not np.isfinite(distance[best]):
        return None
    return evenly(int(refresh[best]), int(inner[best]), steps)


def evenly(refreshes: int, inners: int, steps: int) -> tuple[int, ...]:
    """Spread steps that compute everything, first of all the first one, and those that hold the inner level."""
    refresh, outer, inner = range(len(PLANNED))
    schedule = [outer] * steps
    for i in range(refreshes):
        schedule[i * steps // refreshes] = refresh
    others = [step for step, engine in enumerate(schedule) if engine == outer]
    for i in range(inners):
        schedule[others[i * len(others) // inners]] = inner
    return tuple(schedule)


def periodic(period: int, steps: int) -> tuple[int, ...]:
    """Compute everything in one step of a period and hold the outer level in the others: DeepCache's plan."""
    return tuple(int(step % period > 0) for step in range(steps))


class Trajectory:
    """A way of sampling, timed as a whole and inside of the engines."""

    def __init__(self, session: Session, programs: Sequence[Timed], *, lossless: bool) -> None:
        """Sample with a session; the programs are its own."""
        self._session = session
        self._programs = programs
        self._lossless = lossless

    def sample(self, seed: int, batch: int = 1) -> NDArray[np.float32]:
        """Sample.

        Raises:
            NonFiniteError: If the full model had to take the turn of an engine, so that the plan was not followed.
        """
        sampled = self._session.sample(batch, seed=seed, lossless=self._lossless, latents=True)
        if self._session.replays:
            raise NonFiniteError("an engine gave NaN or infinity, so what was timed is not the plan.")
        return sampled

    def run(self, seed: int) -> tuple[float, float]:
        """Give the milliseconds of the whole and those inside of the engines."""
        start = time.perf_counter()
        self.sample(seed)
        whole = 1e3 * (time.perf_counter() - start)
        return whole, sum(program.take_ms() for program in self._programs)


def sampling(loaded: Loaded, effort: Effort) -> Measured:
    """Predict and measure the time of plans."""
    steps, measured = loaded.folder.model.steps, Measured()
    batch = loaded.batch(1)
    calls = timed_ms([batch.call(engine) for engine in (FULL, *PLANNED)], loaded.clock, effort)
    full, *planned = np.median(calls, axis=0)
    times = Times(full=float(full), planned=np.array(planned))
    chosen: dict[str, tuple[float | None, tuple[int, ...]]] = {}
    for budget in BUDGETS:
        if schedule := fit(times, budget, steps):
            chosen[f"budget {budget}"] = budget, schedule
    chosen |= {f"DeepCache, 1 of {period} steps in full": (None, periodic(period, steps)) for period in PERIODS}
    whole, inside, damage = run_all(loaded, times, [schedule for _, schedule in chosen.values()], effort)
    rows = []
    for i, (name, (budget, schedule)) in enumerate(chosen.items(), start=2):
        predicted, ratio = times.ratio(schedule), spread(whole[:, i] / whole[:, 0])
        removed = None if budget is None else (1 - ratio[0]) / budget
        loop = spread(whole[:, i] / inside[:, i])[0]
        counts = "/".join(str(schedule.count(engine)) for engine in range(len(PLANNED)))
        lost = damage[i - 2] if damage else None
        rows.append([f"{loaded.title}: {name}", counts, predicted, *ratio, ratio[0] / predicted, removed, loop, lost])
        if removed is not None:
            label = f"{loaded.title}, {loaded.target}, {name}"
            measured.figure(f"{label}: time removed / asked", removed, {"at_least": 1.0, "at_most": MOST_OVER})
            measured.figure(f"{label}: sampling / engine calls", loop, {"at_most": 1.01})
            if loaded.folder.name == LARGEST and budget == max(BUDGETS):
                measured.figure(f"{label}: times faster than the full model", 1 / ratio[0], {"at_least": TWICE})
    columns = ["plan", "steps in full/outer/inner held", "predicted time ratio", "measured", "p10", "p90"]
    columns += ["measured / predicted", "removed / asked", "sampling / engine calls", "relative L2"]
    measured.table(f"{steps} steps on {loaded.target}, one sample: plans against the full model", columns, rows)
    label = f"{loaded.title}, {loaded.target}, full model"
    measured.figure(f"{label}: sampling / engine calls", spread(whole[:, 0] / inside[:, 0])[0], {"at_most": 1.01})
    guard = spread(whole[:, 0] / whole[:, 1] - 1)[0]
    measured.figure(f"{label}: cost of asking whether all is finite", guard, {"at_most": 0.01})
    for budget in BUDGETS:
        if f"budget {budget}" not in chosen:
            measured.figure(f"{loaded.title}, {loaded.target}: plans that save {budget}", 0.0, {"at_least": 1.0})
    return measured


def run_all(
    loaded: Loaded, times: Times, schedules: Sequence[tuple[int, ...]], effort: Effort
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[float]]:
    """Sample in turns: the full model, the same on a device that trusts it, and each schedule.

    Returns:
        [round, way of sampling] milliseconds of the whole, and of the engine calls in it. Relative L2 of what the
        schedules sample, against the full model at the same noise; nothing where weights are random.
    """
    programs = [Timed(loaded.program(engine), loaded.clock) for engine in PLANNED]
    full = Timed(loaded.program(FULL), loaded.clock)

    def trajectory(schedule: tuple[int, ...], device: Device, *, lossless: bool = False) -> Trajectory:
        plan = loaded.plan(schedule, 0.0, times.ratio(schedule))
        return Trajectory(loaded.session(plan, device, programs, full), (full, *programs), lossless=lossless)

    refreshing = (0,) * loaded.folder.model.steps
    ways = [trajectory(refreshing, device, lossless=True) for device in (loaded.device, Trusting(loaded.device))]
    ways += [trajectory(schedule, loaded.device) for schedule in schedules]
    start = time.perf_counter()
    for way in ways:
        way.run(0)
    rounds = effort.rounds(1e3 * (time.perf_counter() - start))
    taken = np.array([[way.run(seed) for way in ways] for seed in range(rounds)])
    if not loaded.folder.model.trained:
        return taken[..., 0], taken[..., 1], []
    expected, _, *samples = (way.sample(rounds, DAMAGE_SAMPLES) for way in ways)
    axes = (1, 2, 3)
    damage = [
        float(np.mean(np.sqrt(((own - expected) ** 2).sum(axis=axes) / (expected**2).sum(axis=axes))))
        for own in samples
    ]
    return taken[..., 0], taken[..., 1], damage

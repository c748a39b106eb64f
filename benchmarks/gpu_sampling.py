"""Time whole trajectories: plans against the full model, the loop around engines, and the non-finite check."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from clock import Effort, Timed, timed_ms
from gpu_engines import Loaded
from gpu_folder import FULL, PLANNED
from gpu_result import Goal, Measured
from numpy.typing import NDArray
from rounds import spread

from unetc.device import Device, Tensor
from unetc.errors import NonFiniteError
from unetc.runtime.loop import FusedLoopDevice, Loop, Start
from unetc.runtime.session import Session

BUDGETS = (0.27, 0.5)
PERIODS = (2, 3, 5)
"""Periods of DeepCache's plans; the first step of each period is computed in full."""
MOST_OVER = 1.05
"""Goal: a plan saves at most this multiple of its budget."""
AIM = (1.0 + MOST_OVER) / 2
TWICE = 2.0
"""Goal: speedup of a plan with a budget of one half."""
LARGEST = "sdxl"
"""The model that this goal applies to."""
MOST_LOOP: Goal = {"at_most": 1.01}
DAMAGE_SAMPLES, DAMAGE_SEED = 8, 1000


class Unfused:
    """A device that computes a step operation by operation."""

    def __init__(self, device: Device) -> None:
        """Wrap a device."""
        self._device = device

    def __getattr__(self, name: str) -> Any:
        """Forward everything else to the device."""
        return getattr(self._device, name)

    def fused_loop(self, start: Start) -> Loop | None:
        """Return None: this device has no fused loop."""
        return None


class Trusting(Unfused):
    """A device that skips the non-finite check."""

    def is_finite(self, tensor: Tensor) -> bool:
        """Return True without checking."""
        return True

    def fused_loop(self, start: Start) -> Loop | None:
        """Start a fused loop of the device, also without the check."""
        loop: Any = self._device.fused_loop(start) if isinstance(self._device, FusedLoopDevice) else None
        if loop is not None:
            loop.is_finite = lambda step: True
        return cast(Loop | None, loop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Milliseconds of a step, by engine."""

    full: float
    planned: NDArray[np.float64]
    """Milliseconds of each engine of `PLANNED`."""
    around: float = 0.0
    """Milliseconds of the loop around the engine call."""

    def ratio(self, schedule: Sequence[int]) -> float:
        """Predict the time of a schedule / the time of the full model."""
        return float((self.planned[list(schedule)].mean() + self.around) / (self.full + self.around))


def fit(times: Times, budget: float, steps: int) -> tuple[int, ...] | None:
    """Find a schedule that saves the budget and little more.

    Args:
        times: Times of the engines.
        budget: Share of the full model's time to save.
        steps: Number of steps.

    Returns:
        Index into `PLANNED` of every step's engine; None if no schedule saves the budget.
    """
    outer, inner = np.meshgrid(np.arange(steps), np.arange(steps), indexing="ij")
    refresh = steps - outer - inner
    taken = np.tensordot(times.planned, np.stack([refresh, outer, inner]), axes=1) / steps
    removed = (times.full - taken) / (times.full + times.around) / budget
    distance = np.where((refresh > 0) & (removed >= 1), np.abs(removed - AIM), np.inf)
    best = np.unravel_index(np.argmin(distance), distance.shape)
    if not np.isfinite(distance[best]):
        return None
    return evenly(int(refresh[best]), int(inner[best]), steps)


def evenly(refreshes: int, inners: int, steps: int) -> tuple[int, ...]:
    """Spread the steps that refresh, starting with the first one, and the steps that hold the inner level."""
    refresh, outer, inner = range(len(PLANNED))
    schedule = [outer] * steps
    for i in range(refreshes):
        schedule[i * steps // refreshes] = refresh
    others = [step for step, engine in enumerate(schedule) if engine == outer]
    for i in range(inners):
        schedule[others[i * len(others) // inners]] = inner
    return tuple(schedule)


def periodic(period: int, steps: int) -> tuple[int, ...]:
    """Return DeepCache's schedule: the first step of a period is computed in full, the others hold the outer level."""
    return tuple(int(step % period > 0) for step in range(steps))


class Ways:
    """Ways of sampling from a loaded model, timed as a whole and inside the engines."""

    def __init__(self, loaded: Loaded) -> None:
        """Wrap the full model and the engines of plans with timers."""
        self._loaded = loaded
        self._full = Timed(loaded.program(FULL), loaded.clock)
        self._programs = [Timed(loaded.program(engine), loaded.clock) for engine in PLANNED]

    def full(self, device: Device) -> Way:
        """Sample with the full model and a loop on the given device."""
        return self._way((0,) * self._loaded.folder.model.steps, device, full_model=True)

    def plan(self, schedule: Sequence[int]) -> Way:
        """Sample with the plan of a schedule."""
        return self._way(schedule, self._loaded.device, full_model=False)

    def _way(self, schedule: Sequence[int], device: Device, *, full_model: bool) -> Way:
        session = self._loaded.session(self._loaded.plan(schedule), device, self._programs, self._full)
        return Way(session, (self._full, *self._programs), full_model=full_model)


class Way:
    """One way of sampling."""

    def __init__(self, session: Session, programs: Sequence[Timed], *, full_model: bool) -> None:
        """Sample with a session; `programs` are all programs that it may call."""
        self._session = session
        self._programs = programs
        self._full_model = full_model

    def sample(self, seed: int, batch: int = 1) -> NDArray[np.float32]:
        """Sample latents.

        Raises:
            NonFiniteError: If the full model had to replace an engine, so that the plan was not followed.
        """
        sampled = self._session.sample(batch, seed=seed, full_model=self._full_model, latents=True)
        if self._session.non_finite_steps:
            raise NonFiniteError("an engine gave NaN or infinity, so the timed steps are not the plan's.")
        return sampled

    def run(self, seed: int) -> tuple[float, float]:
        """Sample; return the milliseconds of the whole and inside the engines."""
        start = time.perf_counter()
        self.sample(seed)
        whole = 1e3 * (time.perf_counter() - start)
        return whole, sum(program.take_ms() for program in self._programs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A plan to measure."""

    name: str
    schedule: tuple[int, ...]
    budget: float | None = None
    """Budget that it was made for, if any."""


def sampling(loaded: Loaded, effort: Effort) -> Measured:
    """Predict and measure the time of plans, of the loop, and of the non-finite check."""
    steps, ways, label = loaded.folder.model.steps, Ways(loaded), f"{loaded.title}, {loaded.target}"
    full, unguarded = (ways.full(cast(Device, device)) for device in (loaded.device, Trusting(loaded.device)))
    unfused = [] if "cpu" in loaded.target.split(":") else [ways.full(cast(Device, Unfused(loaded.device)))]
    times = step_times(loaded, full, effort)
    choices = choose(times, steps)
    plans = [ways.plan(choice.schedule) for choice in choices]
    taken = alternately([full, unguarded, *plans, *unfused], effort)
    lost = damages(full, plans) if loaded.folder.model.trained else [None] * len(plans)
    measured = Measured()
    loop = spread(taken[:, 0, 0] / taken[:, 0, 1])[0]
    measured.figure(f"{label}, full model: sampling / engine calls", loop, MOST_LOOP)
    guard = spread(taken[:, 0, 0] / taken[:, 1, 0] - 1)[0]
    measured.figure(f"{label}, full model: cost of the non-finite check", guard, {"at_most": 0.01})
    if unfused:  # on a CPU there is only the unfused loop
        fused = spread(taken[:, 0, 0] / taken[:, -1, 0])[0]
        measured.figure(f"{label}, full model: sampling with one kernel a step / with one for each operation", fused)
    saved = sum(choice.budget is not None for choice in choices)
    name = f"{label}: budgets that a plan saves, of {len(BUDGETS)}"
    measured.figure(name, saved, {"at_least": len(BUDGETS)})
    rows = []
    for i, choice in enumerate(choices):
        whole, inside = taken[:, 2 + i].T
        ratio, loop = spread(whole / taken[:, 0, 0]), spread(whole / inside)[0]
        if choice.budget is not None:
            compare(measured, choice, 1 - ratio[0], loop, f"{label}, {choice.name}", loaded.folder.name)
        predicted = times.ratio(choice.schedule)
        counts = "/".join(str(choice.schedule.count(engine)) for engine in range(len(PLANNED)))
        rows.append([f"{loaded.title}: {choice.name}", counts, predicted, *ratio, ratio[0] / predicted, loop, lost[i]])
    columns = ["plan", "steps in full/outer/inner held", "predicted time ratio", "measured", "p10", "p90"]
    columns += ["measured / predicted", "sampling / engine calls", "relative L2"]
    measured.table(f"{steps} steps on {loaded.target}, one sample: plans against the full model", columns, rows)
    return measured


def choose(times: Times, steps: int) -> list[Choice]:
    """List the plans: one for each budget that can be saved, and DeepCache's plans."""
    fitted = {budget: fit(times, budget, steps) for budget in BUDGETS}
    choices = [Choice(name=f"budget {own}", schedule=s, budget=own) for own, s in fitted.items() if s is not None]
    cached = {f"DeepCache, 1 of {period} steps in full": periodic(period, steps) for period in PERIODS}
    return choices + [Choice(name=name, schedule=schedule) for name, schedule in cached.items()]


def compare(measured: Measured, choice: Choice, removed: float, loop: float, name: str, model: str) -> None:
    """Compare a plan with its goals; `removed` is the saved share of the full model's time."""
    assert choice.budget is not None
    ratio = removed / choice.budget
    measured.figure(f"{name}: time saved / budget", ratio, {"at_least": 1.0, "at_most": MOST_OVER})
    measured.figure(f"{name}: sampling / engine calls", loop, MOST_LOOP)
    if model == LARGEST and choice.budget == max(BUDGETS):
        measured.figure(f"{name}: times faster than the full model", 1 / (1 - removed), {"at_least": TWICE})


def step_times(loaded: Loaded, full: Way, effort: Effort) -> Times:
    """Time the engines alternately, and the loop around them.

    The host runs ahead of the device here, as in the loop, which checks a step after the next engine has been called.
    """
    batch = loaded.batch(1)
    calls = timed_ms([batch.call(engine) for engine in (FULL, *PLANNED)], loaded.clock, effort)
    whole, inside = alternately([full], effort)[:, 0].T
    alone, *planned = np.median(calls, axis=0)
    around = float(np.median(whole - inside)) / loaded.folder.model.steps
    return Times(full=float(alone), planned=np.array(planned), around=max(around, 0.0))


def alternately(ways: Sequence[Way], effort: Effort) -> NDArray[np.float64]:
    """Sample alternately; return milliseconds `[round, way, 2]` of the whole and inside the engine calls."""
    start = time.perf_counter()
    for way in ways:
        way.run(0)
    rounds = effort.rounds(1e3 * (time.perf_counter() - start))
    return np.array([[way.run(seed) for way in ways] for seed in range(rounds)])


def damages(full: Way, plans: Sequence[Way]) -> list[float]:
    """Compute the relative L2 of plans' samples against the full model's, from the same noise.

    The analyzer's implementation needs scipy, which the runtime does not install.
    """
    expected = full.sample(DAMAGE_SEED, DAMAGE_SAMPLES)
    norm = np.sqrt((expected**2).sum(axis=(1, 2, 3)))
    lost = [np.sqrt(((plan.sample(DAMAGE_SEED, DAMAGE_SAMPLES) - expected) ** 2).sum(axis=(1, 2, 3))) for plan in plans]
    return [float(np.mean(one / norm)) for one in lost]

"""Scheduler tables: what a linear multistep sampler does in each step, as numbers.

One step of such a sampler is

    x_next = sum_j u_j x_(i-j)  +  sum_j v_j e_(i-j)  +  c clip(p x_i + q e_i)  +  s exp(w / 2) noise

with x the samples, e the model outputs and j the lag in steps. Where the model predicts a variance too, w is
interpolated between two bounds by what it says; otherwise it is zero. A `SchedulerTable` holds the coefficients of all
steps for one step count; `SchedulerTables` holds one scheduler's tables for many step counts, packed into one array.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from unetc.device import HOST, Device, Tensor
from unetc.errors import SessionError

MAX_WINDOW = 8
"""The longest history, in steps, that a table can refer to."""

_VECTORS = (
    "timesteps",
    "log_snr",
    "input_scale",
    "denoised_sample",
    "denoised_prediction",
    "denoised_coefficient",
    "noise_coefficient",
    "variance_low",
    "variance_high",
)
_MATRICES = ("sample_coefficients", "prediction_coefficients")
_COLUMNS = (*_VECTORS, *(f"{name}_{lag}" for name in _MATRICES for lag in range(MAX_WINDOW)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SchedulerTable:
    """The coefficients of a sampler for one number of steps n; lag 0 is the current step.

    Raises:
        SessionError: If shapes, ranges or the order of the steps make no sense.
    """

    timesteps: NDArray[np.float32]
    """[n], what the model is told in each step."""
    log_snr: NDArray[np.float64]
    """[n], natural log of alpha^2 / sigma^2 of the sample that enters each step; strictly increasing."""
    input_scale: NDArray[np.float64]
    """[n], the model sees input_scale * x."""
    initial_scale: float
    """Standard deviation of the noise that sampling starts from."""
    denoised_sample: NDArray[np.float64]
    """[n], p in x0 = p x + q e. Zero when nothing is clipped: x0 then has no weight of its own."""
    denoised_prediction: NDArray[np.float64]
    """[n], q in x0 = p x + q e. Zero when nothing is clipped."""
    denoised_coefficient: NDArray[np.float64]
    """[n], weight of the clipped x0. Zero when nothing is clipped."""
    clip: float
    """x0 is limited to -clip..clip; infinite when nothing is clipped."""
    sample_coefficients: NDArray[np.float64]
    """[n, window], weights of the raw samples x."""
    prediction_coefficients: NDArray[np.float64]
    """[n, window], weights of the raw model outputs e."""
    noise_coefficient: NDArray[np.float64]
    """[n], weight of fresh unit normal noise; 1 where the model predicts its variance."""
    variance_low: NDArray[np.float64]
    """[n], natural log of the variance of the noise where the model says -1; zero where it is not asked."""
    variance_high: NDArray[np.float64]
    """[n], natural log of the variance of the noise where the model says 1; zero where it is not asked."""

    def __post_init__(self) -> None:
        """Check what a damaged file could get wrong."""
        for name in _VECTORS:
            _require_shape(name, getattr(self, name), (self.steps,))
        for name in _MATRICES:
            _require_shape(name, getattr(self, name), (self.steps, self.window))
        _require(1 <= self.window <= MAX_WINDOW, f"the window is {self.window}, not 1 to {MAX_WINDOW}")
        _require(0 < self.initial_scale < math.inf, f"initial_scale is {self.initial_scale}, not positive and finite")
        _require(self.clip > 0, f"clip is {self.clip}, not positive")
        _require(bool(np.all(np.diff(self.log_snr) > 0)), "log_snr does not increase from step to step")

    @property
    def steps(self) -> int:
        """The number of steps n."""
        return len(self.timesteps)

    @property
    def window(self) -> int:
        """How many samples and model outputs, the current ones included, a step may refer to."""
        return int(self.sample_coefficients.shape[-1])

    def asks_variance(self, step: int) -> bool:
        """Tell whether the noise of a step has the variance that the model predicts."""
        return bool(self.variance_low[step] or self.variance_high[step])


def update(
    table: SchedulerTable,
    step: int,
    samples: Sequence[Tensor],
    predictions: Sequence[Tensor],
    noise: Tensor | None = None,
    variance: Tensor | None = None,
    device: Device = HOST,
) -> Tensor:
    """Advance the samples by one step.

    Coefficients enter as Python floats, so float32 stays float32.

    Args:
        table: Coefficients of the sampler.
        step: Step index, 0 <= step < table.steps.
        samples: x_i, x_(i-1), ..., each [batch, channel, height, width]; `table.window` of them, fewer at the start.
        predictions: e_i, e_(i-1), ..., raw model outputs of the same shape, as many.
        noise: Fresh unit normal noise of the same shape. May be None where noise_coefficient is zero.
        variance: What the model says of the variance of the noise, mostly -1 to 1, of the same shape. May be None where
            it is not asked.
        device: Where all these are.

    Returns:
        The samples that enter the next step, [batch, channel, height, width].

    Raises:
        SessionError: If the step does not exist, or needs noise, a variance or history that is not given.

    Source:
        Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672, equation 15,
        for the variance.
    """
    if not 0 <= step < table.steps:
        raise SessionError(f"there is no step {step} among the {table.steps} steps of this sampler.")
    result = _combine(table.sample_coefficients[step].tolist(), samples)
    result += _combine(table.prediction_coefficients[step].tolist(), predictions)
    if weight := table.denoised_coefficient.item(step):
        denoised = table.denoised_sample.item(step) * samples[0]
        denoised += table.denoised_prediction.item(step) * predictions[0]
        denoised = denoised.clip(-table.clip, table.clip)
        denoised *= weight
        result += denoised
    if weight := table.noise_coefficient.item(step):
        if noise is None:
            raise SessionError(f"step {step} of this sampler adds noise and none was given. Pass step_noise(...).")
        if table.asks_variance(step):
            if variance is None:
                raise SessionError(
                    f"step {step} of this sampler takes the variance of its noise from the model, which predicts none. "
                    "Use a scheduler with a fixed variance, or ddim."
                )
            share = 0.5 * variance + 0.5
            low, high = table.variance_low.item(step), table.variance_high.item(step)
            noise = noise * device.exp(0.5 * (high * share + low * (1 - share)))
        result += weight * noise
    return result


def _combine(weights: Sequence[float], arrays: Sequence[Tensor]) -> Tensor:
    """Add weighted arrays up in a new one."""
    total = weights[0] * arrays[0]
    for lag, weight in enumerate(weights[1:], start=1):
        if weight:
            if lag >= len(arrays):
                raise SessionError(f"a step needs {lag + 1} arrays, newest first, and {len(arrays)} were given.")
            total += weight * arrays[lag]
    return total


class SchedulerCount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the table for one step count lies in the packed array."""

    steps: int
    start: int
    """First row; the table has `steps` rows."""
    initial_scale: float


class SchedulerHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is needed to read the packed array of a `SchedulerTables`."""

    name: str
    """Name of the scheduler."""
    columns: tuple[str, ...]
    """Names of the columns that are stored; all others are zero everywhere."""
    clip: float | None
    """None when nothing is clipped: JSON has no infinity."""
    counts: tuple[SchedulerCount, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SchedulerTables:
    """The tables of one scheduler, by strictly increasing step count.

    Raises:
        SessionError: If there is no table, or their order or their clipping differs from this.
    """

    name: str
    """Name of the scheduler, a key of `unetc.compiler.scheduler.SCHEDULERS`."""
    tables: tuple[SchedulerTable, ...]
    """All with the same `clip`."""

    def __post_init__(self) -> None:
        """Check order and clipping."""
        _require(len(self.tables) > 0, "there is no step count")
        _require(list(self.counts) == sorted(set(self.counts)), f"the step counts {self.counts} do not increase")
        _require(len({table.clip for table in self.tables}) == 1, "the step counts differ in clip")

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts there are tables for, increasing."""
        return tuple(table.steps for table in self.tables)

    def table(self, steps: int) -> SchedulerTable:
        """Look up the table for a number of steps.

        Raises:
            SessionError: If there is none; the message names the nearest step counts.
        """
        position = bisect.bisect_left(self.counts, steps)
        if steps in self.counts[position : position + 1]:
            return self.tables[position]
        nearest = " or ".join(str(count) for count in self.counts[max(position - 1, 0) : position + 1])
        raise SessionError(f"there is no {self.name} table for {steps} steps. Nearest: {nearest} steps.")

    def noise_levels(self) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """List every timestep of any table, increasing, and the log-SNR of samples there."""
        timesteps, first = np.unique(np.concatenate([table.timesteps for table in self.tables]), return_index=True)
        return timesteps, np.concatenate([table.log_snr for table in self.tables])[first]

    def to_array(self) -> tuple[SchedulerHeader, NDArray[np.float64]]:
        """Pack all tables into one array.

        Returns:
            The header and the array [rows, columns], one row per step of every table.
        """
        rows = np.concatenate([_to_rows(table) for table in self.tables])
        used = np.flatnonzero(rows.any(axis=0))
        starts = np.cumsum([0, *self.counts]).tolist()
        header = SchedulerHeader(
            name=self.name,
            columns=tuple(_COLUMNS[column] for column in used),
            clip=self.tables[0].clip if math.isfinite(self.tables[0].clip) else None,
            counts=tuple(
                SchedulerCount(steps=table.steps, start=start, initial_scale=table.initial_scale)
                for table, start in zip(self.tables, starts, strict=False)
            ),
        )
        return header, np.ascontiguousarray(rows[:, used])

    @classmethod
    def from_array(cls, header: SchedulerHeader, array: NDArray[np.float64]) -> Self:
        """Unpack and validate.

        Args:
            header: As given by `to_array`.
            array: As given by `to_array`, [rows, columns], float64.

        Returns:
            The tables that were packed, to the bit.

        Raises:
            SessionError: If header and array are not what `to_array` gives.
        """
        unknown = set(header.columns) - set(_COLUMNS)
        _require(not unknown, f"unknown columns {sorted(unknown)}")
        _require(len(set(header.columns)) == len(header.columns), "a column is named twice")
        _require(array.dtype == np.float64, f"the array is {array.dtype}, not float64")
        _require_shape("the array", array, (sum(count.steps for count in header.counts), len(header.columns)))
        rows = np.zeros((len(array), len(_COLUMNS)))
        rows[:, [_COLUMNS.index(column) for column in header.columns]] = array
        clip = math.inf if header.clip is None else header.clip
        return cls(name=header.name, tables=tuple(_from_rows(rows, count, clip) for count in header.counts))


def needed_window(sample_coefficients: NDArray[np.float64], prediction_coefficients: NDArray[np.float64]) -> int:
    """Count the lags up to the last one with a nonzero coefficient, at least 1.

    Args:
        sample_coefficients: [n, lags].
        prediction_coefficients: [n, lags].
    """
    lags = np.flatnonzero(sample_coefficients.any(axis=0) | prediction_coefficients.any(axis=0))
    return int(lags.max(initial=0)) + 1


def _to_rows(table: SchedulerTable) -> NDArray[np.float64]:
    padding = ((0, 0), (0, MAX_WINDOW - table.window))
    vectors = [getattr(table, name) for name in _VECTORS]
    matrices = [np.pad(getattr(table, name), padding) for name in _MATRICES]
    return np.column_stack([*vectors, *matrices])


def _from_rows(rows: NDArray[np.float64], count: SchedulerCount, clip: float) -> SchedulerTable:
    _require(
        count.steps >= 1 and 0 <= count.start <= len(rows) - count.steps,
        f"{count.steps} steps from row {count.start} do not lie within {len(rows)} rows",
    )
    own = rows[count.start : count.start + count.steps]
    vectors = dict(zip(_VECTORS, own.T, strict=False))
    sample, prediction = np.split(own[:, len(_VECTORS) :], len(_MATRICES), axis=1)
    window = needed_window(sample, prediction)
    return SchedulerTable(
        timesteps=vectors.pop("timesteps").astype(np.float32),
        initial_scale=count.initial_scale,
        clip=clip,
        sample_coefficients=sample[:, :window],
        prediction_coefficients=prediction[:, :window],
        **vectors,
    )


def _require_shape(name: str, array: NDArray[np.floating], shape: tuple[int, ...]) -> None:
    _require(array.shape == shape, f"{name} has shape {array.shape}, not {shape}")
    _require(bool(np.isfinite(array).all()), f"{name} is not finite")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise SessionError(f"the scheduler table cannot be used: {problem}. Build the bundle again.")

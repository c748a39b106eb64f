"""Scheduler tables: the coefficients of every step of a linear multistep scheduler.

One step of such a scheduler is

    x_next = sum_j u_j x_(i-j)  +  sum_j v_j e_(i-j)  +  c clip(p x_i + q e_i)  +  s exp(w / 2) noise

where x are the samples, e the model outputs and j the lag in steps. If the model also predicts a variance, that output
interpolates w between two bounds; otherwise w is zero. A `SchedulerTable` holds the coefficients of all steps for one
step count. `SchedulerTables` holds one scheduler's tables for many step counts and packs them into one array.

A row is one call of the denoiser. Some schedulers make several calls in one step of a pipeline: Heun's
method calls twice. Their tables have more rows than the number of steps that was asked for.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count as count_from
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from unetc.arguments import real_number, whole_number
from unetc.device import HOST, Device, Tensor
from unetc.errors import SessionError

from .prediction_type import PredictionType

_ROUNDING = 1e-5
"""Share of the trained range by which rounding may move a timestep out of it."""

_SAME_START = 1e-4
"""Largest difference of log-SNR between two starts that count as one; rounding to float32 alone makes 1e-6."""

MAX_WINDOW = 13
"""Longest history, in steps, that a table can refer to: PNDM combines the results of three Runge-Kutta steps."""

_VECTORS = (
    "timesteps",
    "log_snr",
    "signal",
    "input_scale",
    "denoised_sample",
    "denoised_prediction",
    "denoised_coefficient",
    "noise_coefficient",
    "variance_low",
    "variance_high",
    "start_sample",
    "start_prediction",
)
_LEVELS = _VECTORS[:2]
"""Columns of the levels that the model was trained on."""
_MATRICES = ("sample_coefficients", "prediction_coefficients")
_COLUMNS = (*_VECTORS, *(f"{name}_{lag}" for name in _MATRICES for lag in range(MAX_WINDOW)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SchedulerTable:
    """The coefficients of a scheduler for one number of steps n; lag 0 is the current step.

    Raises:
        SessionError: If shapes, ranges or the order of the steps are invalid.
    """

    timesteps: NDArray[np.float32]
    """[n], timestep passed to the model in each step."""
    log_snr: NDArray[np.float64]
    """[n], natural log of alpha^2 / sigma^2 of the sample that enters each step; strictly increasing.

    A second call at the same noise level is a millionth higher, so that a plan can tell the calls apart.
    """
    signal: NDArray[np.float64]
    """[n], factor of the image in the sample that enters each step: signal * image + noise_of(step) * noise."""
    input_scale: NDArray[np.float64]
    """[n], factor of the samples; the model receives input_scale * x."""
    initial_scale: float
    """Standard deviation of the noise from which sampling starts."""
    denoised_sample: NDArray[np.float64]
    """[n], p in x0 = p x + q e. Zero without clipping, because x0 then needs no separate weight."""
    denoised_prediction: NDArray[np.float64]
    """[n], q in x0 = p x + q e. Zero without clipping."""
    denoised_coefficient: NDArray[np.float64]
    """[n], weight of the clipped x0. Zero without clipping."""
    clip: float
    """Limit of x0, which is clipped to -clip..clip; infinite without clipping."""
    sample_coefficients: NDArray[np.float64]
    """[n, window], weights of the raw samples x."""
    prediction_coefficients: NDArray[np.float64]
    """[n, window], weights of the raw model outputs e."""
    noise_coefficient: NDArray[np.float64]
    """[n], weight of fresh unit normal noise; 1 in steps with a predicted variance."""
    variance_low: NDArray[np.float64]
    """[n], natural log of the noise variance for a model output of -1; zero in steps without a predicted variance."""
    variance_high: NDArray[np.float64]
    """[n], natural log of the noise variance for a model output of 1; zero in steps without a predicted variance."""
    start_sample: NDArray[np.float64]
    """[n], weight of the sample in a first step that needs history otherwise; zero if that step cannot be the first."""
    start_prediction: NDArray[np.float64]
    """[n], weight of the model output in such a step."""
    asked: int | None = None
    """Steps as a pipeline counts them, for a scheduler that makes several calls per step; None for n."""
    prediction_type: PredictionType | None = None
    """How x0 follows from a model output; None if that is not known, or if the output is x0 itself."""

    def __post_init__(self) -> None:
        """Check everything that a damaged file could break."""
        for name in _VECTORS:
            _require_shape(name, getattr(self, name), (self.steps,))
        for name in _MATRICES:
            _require_shape(name, getattr(self, name), (self.steps, self.window))
        _require(1 <= self.window <= MAX_WINDOW, f"the window is {self.window}, not 1 to {MAX_WINDOW}")
        _require(0 < self.initial_scale < math.inf, f"initial_scale is {self.initial_scale}, not positive and finite")
        _require(self.clip > 0, f"clip is {self.clip}, not positive")
        _require(bool(np.all(np.diff(self.log_snr) > 0)), "log_snr does not increase from step to step")
        _require(bool(np.all(self.signal >= 0)), "signal is negative")
        _require(self.count >= 1, f"{self.asked} steps were asked for, not at least 1")

    @property
    def steps(self) -> int:
        """Number of steps n, each with one call of the denoiser."""
        return len(self.timesteps)

    @property
    def count(self) -> int:
        """Number of steps that was asked for, `num_inference_steps` of a pipeline."""
        return self.steps if self.asked is None else self.asked

    @property
    def window(self) -> int:
        """Number of samples and model outputs, including the current ones, that a step may refer to."""
        return int(self.sample_coefficients.shape[-1])

    @property
    def adds_noise(self) -> bool:
        """Whether steps add noise; then every number of steps has a trajectory by itself."""
        return bool(self.noise_coefficient.any())

    def starts_like(self, other: SchedulerTable) -> bool:
        """Check whether two schedules start at the same noise level."""
        return abs(self.log_snr.item(0) - other.log_snr.item(0)) <= _SAME_START

    def noise_of(self, step: int) -> float:
        """Compute the factor of unit normal noise in the sample that enters a step."""
        return self.signal.item(step) * math.exp(-self.log_snr.item(step) / 2)

    def first_step(self, strength: float) -> int:
        """Find the row at which sampling from an image begins.

        Args:
            strength: Share of the steps that are made, in (0, 1].

        Raises:
            SessionError: If no step is made, or the first ones need results of the steps that are left out.

        Source:
            `get_timesteps` in diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion_img2img.py.
        """
        strength = real_number("strength", strength)
        if not 0 < strength <= 1:
            raise SessionError(f"strength is {strength:g}. Expected a number above 0 and up to 1.")
        made = min(int(self.count * strength), self.count)
        if made < 1:
            raise SessionError(
                f"strength {strength:g} makes none of {self.count} steps. Expected at least {self._least_strength:g}."
            )
        first = (self.count - made) * (2 if self.steps == 2 * self.count - 1 else 1)
        if self.starting_at(first)._reads_before(first):
            raise SessionError(
                "a step of this scheduler needs the results of earlier steps, so it cannot start from an image. Build "
                "with a scheduler whose steps need none, such as ddim, euler, dpmsolver++ or heun, or use strength 1."
            )
        return first

    @property
    def _least_strength(self) -> float:
        """Round the least strength that makes a step up to as few digits as possible."""
        rounded = (math.ceil(10.0**digits / self.count) / 10.0**digits for digits in count_from(2))
        return next(strength for strength in rounded if int(self.count * strength) == 1)

    def starting_at(self, first: int) -> SchedulerTable:
        """Return the table of a trajectory that begins at a row, where the scheduler has no history yet.

        Args:
            first: The row, as `first_step` finds it.
        """
        if not self._reads_before(first) or not (self.start_sample[first] or self.start_prediction[first]):
            return self
        changes = {}
        for name, weight in zip(_MATRICES, (self.start_sample[first], self.start_prediction[first]), strict=True):
            changes[name] = getattr(self, name).copy()
            changes[name][first] = weight * (np.arange(self.window) == 0)
        return replace(self, **changes)

    def _reads_before(self, first: int) -> bool:
        """Check whether a row from the first one on refers to a row before it."""
        lags = np.arange(self.window) > np.arange(self.steps - first)[:, None]
        return any(bool(getattr(self, name)[first:][lags].any()) for name in _MATRICES)

    def asks_variance(self, step: int) -> bool:
        """Check whether the model predicts the variance of a step's noise."""
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

    Coefficients are Python floats, so float32 stays float32.

    Args:
        table: Coefficients of the scheduler.
        step: Step index, 0 <= step < table.steps.
        samples: x_i, x_(i-1), ..., each [batch, channel, height, width]; `table.window` arrays, fewer at the start.
        predictions: e_i, e_(i-1), ..., raw model outputs; same shape and number as the samples.
        noise: Fresh unit normal noise of the same shape. May be None if the step's noise_coefficient is zero.
        variance: Model output for the variance of the noise, mostly between -1 and 1; same shape. May be None in steps
            without a predicted variance.
        device: Device of all these tensors.

    Returns:
        The samples that enter the next step, [batch, channel, height, width].

    Raises:
        SessionError: If the step does not exist, or its noise, variance or history is missing.

    Source:
        Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672, equation 15,
        for the variance.
    """
    if not 0 <= step < table.steps:
        raise SessionError(f"there is no step {step}: this table has the steps 0 to {table.steps - 1}.")
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
            raise SessionError(f"step {step} of this scheduler adds noise, but none was given. Pass step_noise(...).")
        if table.asks_variance(step):
            if variance is None:
                raise SessionError(
                    f"step {step} of this scheduler needs a predicted variance of its noise, but the model predicts "
                    "none. Use a scheduler with a fixed variance, or ddim."
                )
            share = 0.5 * variance + 0.5
            low, high = table.variance_low.item(step), table.variance_high.item(step)
            noise = noise * device.exp(0.5 * (high * share + low * (1 - share)))
        result += weight * noise
    return result


def _combine(weights: Sequence[float], arrays: Sequence[Tensor]) -> Tensor:
    """Add weighted arrays into a new one."""
    total = weights[0] * arrays[0]
    for lag, weight in enumerate(weights[1:], start=1):
        if weight:
            if lag >= len(arrays):
                raise SessionError(f"a step needs {lag + 1} arrays, newest first, but {len(arrays)} were given.")
            total += weight * arrays[lag]
    return total


class SchedulerCount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Position of the table for one step count in the packed array."""

    steps: int
    start: int
    """First row."""
    initial_scale: float
    calls: int | None = None
    """Number of rows; None for `steps`."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.steps if self.calls is None else self.calls


class SchedulerHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Description of the packed array of a `SchedulerTables`."""

    name: str
    """Name of the scheduler."""
    columns: tuple[str, ...]
    """Names of the stored columns; all others are zero everywhere."""
    clip: float | None
    """Limit of x0. None means no clipping, because JSON has no infinity."""
    counts: tuple[SchedulerCount, ...]
    trained: int = 0
    """Number of rows after the rows of all counts; they hold the noise levels that the model was trained on."""
    one_size: bool = False
    """Whether the tables hold for the model's own sample size alone."""
    prediction_type: PredictionType | None = None
    """How x0 follows from a model output; None if that is not known, or if the output is x0 itself."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SchedulerTables:
    """The tables of one scheduler, by strictly increasing step count.

    Raises:
        SessionError: If there is no table, the step counts do not increase, or the tables differ in `clip` or
            `prediction_type`.
    """

    name: str
    """Name of the scheduler, a key of `unetc.compiler.schedulers.names.SCHEDULERS`."""
    tables: tuple[SchedulerTable, ...]
    """One table per step count, all with the same `clip` and `prediction_type`."""
    trained_timesteps: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """Timesteps that cover the range on which the model was trained, strictly increasing; empty if not known."""
    trained_log_snr: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """log-SNR at each of them."""
    one_size: bool = False
    """Whether the tables hold for the model's own sample size alone: a flow's dynamic shift depends on it."""

    def __post_init__(self) -> None:
        """Check order and clipping."""
        _require_shape("trained_timesteps", self.trained_timesteps, (len(self.trained_log_snr),))
        _require_shape("trained_log_snr", self.trained_log_snr, (len(self.trained_timesteps),))
        _require(bool(np.all(np.diff(self.trained_timesteps) > 0)), "trained_timesteps do not increase")
        _require(len(self.tables) > 0, "it has no step count")
        _require(list(self.counts) == sorted(set(self.counts)), f"the step counts {self.counts} do not increase")
        _require(len({table.clip for table in self.tables}) == 1, "the step counts differ in clip")
        types = {table.prediction_type for table in self.tables}
        _require(len(types) == 1, "the step counts differ in prediction_type")

    @property
    def counts(self) -> tuple[int, ...]:
        """Step counts of the tables, increasing."""
        return tuple(table.count for table in self.tables)

    @property
    def prediction_type(self) -> PredictionType | None:
        """How x0 follows from a model output; None if that is not known, or if the output is x0 itself."""
        return self.tables[0].prediction_type

    def table(self, steps: int) -> SchedulerTable:
        """Look up the table for a number of steps.

        Raises:
            SessionError: If there is no such table; the message names the nearest step counts.
        """
        steps = whole_number("steps", steps)
        position = bisect.bisect_left(self.counts, steps)
        if steps in self.counts[position : position + 1]:
            return self.tables[position]
        nearest = " or ".join(str(count) for count in self.counts[max(position - 1, 0) : position + 1])
        raise SessionError(f"there is no {self.name} table for {steps} steps. Nearest: {nearest} steps.")

    def only(self, table: SchedulerTable) -> SchedulerTables:
        """Make tables of the same scheduler with one table alone."""
        return SchedulerTables(name=self.name, tables=(table,), one_size=self.one_size)

    def noise_levels(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """List timesteps, increasing, and the log-SNR at each of them.

        They cover the range on which the model was trained. If that is not known, they are the timesteps of the tables.
        """
        if len(self.trained_timesteps):
            return self.trained_timesteps, self.trained_log_snr
        timesteps, first = np.unique(np.concatenate([table.timesteps for table in self.tables]), return_index=True)
        return timesteps.astype(np.float64), np.concatenate([table.log_snr for table in self.tables])[first]

    def log_snr_at(self, timestep: float) -> float:
        """Look up the noise level at a timestep of any scheduler of the same model.

        Timesteps between two known ones are interpolated.

        Raises:
            SessionError: If the model was not trained at this timestep; another kind of scheduler made it.
        """
        timesteps, levels = self.noise_levels()
        low, high = float(timesteps[0]), float(timesteps[-1])
        slack = _ROUNDING * (high - low)
        if not low - slack <= timestep <= high + slack:  # NaN too
            spacing = ", ".join(f"{value:g}" for value in self.tables[-1].timesteps[:3])
            raise SessionError(
                f"timestep {timestep:g} lies outside {low:g} to {high:g}, the range on which this model was trained. "
                f"In {self.tables[-1].count} steps, {self.name} takes the timesteps {spacing} and so on. Use a "
                "scheduler with the configuration of the model's own pipeline."
            )
        return float(np.interp(timestep, timesteps, levels))

    def to_array(self) -> tuple[SchedulerHeader, NDArray[np.float64]]:
        """Pack all tables into one array.

        Returns:
            The header and the array [rows, columns], one row per step of every table.
        """
        trained = np.zeros((len(self.trained_timesteps), len(_COLUMNS)))
        trained[:, : len(_LEVELS)] = np.column_stack([self.trained_timesteps, self.trained_log_snr])
        rows = np.concatenate([*(_to_rows(table) for table in self.tables), trained])
        used = np.flatnonzero(rows.any(axis=0))
        starts = np.cumsum([0, *(table.steps for table in self.tables)]).tolist()
        header = SchedulerHeader(
            name=self.name,
            columns=tuple(_COLUMNS[column] for column in used),
            clip=self.tables[0].clip if math.isfinite(self.tables[0].clip) else None,
            counts=tuple(
                SchedulerCount(
                    steps=table.count,
                    start=start,
                    initial_scale=table.initial_scale,
                    calls=None if table.asked is None else table.steps,
                )
                for table, start in zip(self.tables, starts, strict=False)
            ),
            trained=len(trained),
            one_size=self.one_size,
            prediction_type=self.prediction_type,
        )
        return header, np.ascontiguousarray(rows[:, used])

    @classmethod
    def from_array(cls, header: SchedulerHeader, array: NDArray[np.float64]) -> Self:
        """Unpack and validate.

        Args:
            header: Header from `to_array`.
            array: Array from `to_array`, [rows, columns], float64.

        Returns:
            The packed tables, bit for bit.

        Raises:
            SessionError: If `to_array` cannot have produced the header and the array.
        """
        unknown = set(header.columns) - set(_COLUMNS)
        _require(not unknown, f"unknown columns {sorted(unknown)}")
        _require(len(set(header.columns)) == len(header.columns), "a column is named twice")
        _require(array.dtype == np.float64, f"the array is {array.dtype}, not float64")
        _require(header.trained >= 0, f"{header.trained} trained levels")
        count_rows = sum(count.rows for count in header.counts)
        _require_shape("the array", array, (count_rows + header.trained, len(header.columns)))
        rows = np.zeros((len(array), len(_COLUMNS)))
        rows[:, [_COLUMNS.index(column) for column in header.columns]] = array
        clip = math.inf if header.clip is None else header.clip
        return cls(
            name=header.name,
            tables=tuple(_from_rows(rows[:count_rows], count, clip, header.prediction_type) for count in header.counts),
            trained_timesteps=rows[count_rows:, 0].copy(),
            trained_log_snr=rows[count_rows:, 1].copy(),
            one_size=header.one_size,
        )


def needed_window(sample_coefficients: NDArray[np.float64], prediction_coefficients: NDArray[np.float64]) -> int:
    """Count the lags up to the last one with a nonzero coefficient, at least 1.

    Args:
        sample_coefficients: Weights of the samples, [n, lags].
        prediction_coefficients: Weights of the model outputs, [n, lags].
    """
    lags = np.flatnonzero(sample_coefficients.any(axis=0) | prediction_coefficients.any(axis=0))
    return int(lags.max(initial=0)) + 1


def _to_rows(table: SchedulerTable) -> NDArray[np.float64]:
    padding = ((0, 0), (0, MAX_WINDOW - table.window))
    vectors = [getattr(table, name) for name in _VECTORS]
    matrices = [np.pad(getattr(table, name), padding) for name in _MATRICES]
    return np.column_stack([*vectors, *matrices])


def _from_rows(
    rows: NDArray[np.float64], count: SchedulerCount, clip: float, prediction_type: PredictionType | None
) -> SchedulerTable:
    _require(
        count.rows >= 1 and 0 <= count.start <= len(rows) - count.rows,
        f"{count.rows} steps from row {count.start} do not lie within {len(rows)} rows",
    )
    own = rows[count.start : count.start + count.rows]
    vectors = dict(zip(_VECTORS, own.T, strict=False))
    sample, prediction = np.split(own[:, len(_VECTORS) :], len(_MATRICES), axis=1)
    window = needed_window(sample, prediction)
    return SchedulerTable(
        timesteps=vectors.pop("timesteps").astype(np.float32),
        initial_scale=count.initial_scale,
        clip=clip,
        sample_coefficients=sample[:, :window],
        prediction_coefficients=prediction[:, :window],
        asked=None if count.calls is None else count.steps,
        prediction_type=prediction_type,
        **vectors,
    )


def _require_shape(name: str, array: NDArray[np.floating], shape: tuple[int, ...]) -> None:
    _require(array.shape == shape, f"{name} has shape {array.shape}, not {shape}")
    _require(bool(np.isfinite(array).all()), f"{name} is not finite")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise SessionError(f"the scheduler table cannot be used: {problem}. Build the bundle again.")

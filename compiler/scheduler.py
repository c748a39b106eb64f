"""Reading scheduler tables from diffusers schedulers; for compile time.

`scheduler.step` is a black box that is linear in the recent samples and model outputs, except that it may clip x0 and
add noise. One pass over the timesteps reads everything, because one tensor holds many experiments. Its element k is
zero in every sample and model output except x_k, so its later value is the coefficient of x_k. Element n + k does the
same for the model output e_k. Two more elements follow: one is large in every step, to run into the clip, and one is
zero in every step, to see the noise alone.

If the scheduler takes the variance of its noise from the model, the pass uses the lowest variance, and a second pass
with the highest variance reads the other bound.

The table is then checked: diffusers and the table sample a nonlinear model in parallel. A scheduler that the form
cannot express fails this check and is refused.
"""

from __future__ import annotations

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from unetc.errors import ModelError
from unetc.sampler.table import MAX_WINDOW, SchedulerTable, SchedulerTables, needed_window, update

logger = logging.getLogger(__name__)

STEP_COUNTS = (*range(1, 101), 150, 200, 250, 500, 1000)
"""The step counts that a bundle offers, as far as the scheduler can do them."""

TOLERANCE = 1e-5
"""Largest accepted difference from diffusers anywhere on a trajectory, relative to the largest element of that step."""

LOG_SNR_LIMIT = 30.0
"""log-SNR is clamped to -30..30, so that a schedule that ends in pure noise (zero terminal SNR) stays finite."""

_SMALL = 2.0**-18
"""Size of a coordinate: 1 / alpha = 2e4 times as much is not clipped; a power of two, so that it is exact."""
_LARGE = 2.0**20
"""Size of the element that runs into the clip."""
_NEGLIGIBLE = 1e-9
"""Relative size of rounding errors where the exact coefficient is zero; 60 times below float32 rounding."""


class Scheduler(Protocol):
    """The used part of a diffusers scheduler."""

    config: Mapping[str, Any]
    timesteps: torch.Tensor

    @property
    def init_noise_sigma(self) -> float | torch.Tensor:
        """Standard deviation of the noise that sampling starts from."""

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Begin a trajectory."""

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return the input of the model."""

    def step(
        self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, *, generator: torch.Generator
    ) -> Any:
        """Return the next sample as `prev_sample` and, if there is one, x0 as `pred_original_sample`."""


_FLOW = "FlowMatchEulerDiscreteScheduler"

SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "ddim": ("DDIMScheduler", {}),
        "ddpm": ("DDPMScheduler", {}),
        "euler": ("EulerDiscreteScheduler", {}),
        "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        "flow-euler": (_FLOW, {"stochastic_sampling": False}),
    }
)
"""The schedulers by name: class in diffusers, and overrides of the pipeline's configuration."""


def make_scheduler(name: str, config: Mapping[str, Any]) -> Scheduler:
    """Make a scheduler for a pipeline.

    Args:
        name: A key of `SCHEDULERS`.
        config: `config` of the pipeline's own scheduler, of any class.

    Returns:
        A diffusers scheduler of the same noise schedule and prediction type; ddim has eta 0.

    Raises:
        ModelError: If there is no such name, or diffusers refuses the configuration.
    """
    if name not in SCHEDULERS:
        raise ModelError(f"unknown scheduler {name!r}. Choose one of {', '.join(SCHEDULERS)}.")
    class_name, overrides = SCHEDULERS[name]
    _refuse_other_kind(class_name, config)
    # diffusers drops values that a scheduler in memory had by default, and keeps the same values from a file:
    # findings/scheduler-config-changes-on-disk.sh
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    try:
        scheduler: Scheduler = getattr(diffusers, class_name).from_config(config, **overrides)
    except (ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(f"{class_name} does not accept this configuration: {error}. Choose another one.") from error
    return scheduler


def _refuse_other_kind(class_name: str, config: Mapping[str, Any]) -> None:
    """Refuse a scheduler of diffusion for a model of flow, and the other way round: its numbers would be wrong."""
    if ("shift" in config) != (class_name == _FLOW):  # only the configuration of a flow has this key
        kind, name = ("flow matching", "flow-euler") if "shift" in config else ("diffusion", "another one")
        raise ModelError(f"{class_name} cannot sample a model that was trained for {kind}. Choose {name}.")
    if class_name == _FLOW and config.get("use_dynamic_shifting"):
        raise ModelError(
            f"{_FLOW} has use_dynamic_shifting, which makes the noise levels depend on the size of the image. Set it "
            "to False and choose a shift."
        )


def extract_all(
    scheduler: Scheduler,
    name: str,
    counts: Iterable[int] = STEP_COUNTS,
    on_progress: Callable[[int, int], None] | None = None,
) -> SchedulerTables:
    """Read the tables for many step counts.

    Args:
        scheduler: As made by `make_scheduler`; it is not changed.
        name: Its key in `SCHEDULERS`.
        counts: The step counts wanted; those that `supports` denies are left out.
        on_progress: Called with (done, total) after each step count.

    Returns:
        The tables of all step counts that the scheduler can do.

    Raises:
        ModelError: If the scheduler cannot do any of the step counts, or cannot be expressed as a table.
    """
    wanted = sorted(set(counts))
    possible = [steps for steps in wanted if supports(scheduler, steps)]
    if not possible:
        raise ModelError(f"{type(scheduler).__name__} can do none of the step counts {wanted}. Choose others.")
    if left_out := sorted(set(wanted) - set(possible)):
        logger.info("%s cannot do %s steps; left out", type(scheduler).__name__, left_out)
    tables = []
    for steps in possible:
        tables.append(extract(scheduler, steps))
        if on_progress is not None:
            on_progress(len(tables), len(possible))
    return SchedulerTables(name=name, tables=tuple(tables))


def supports(scheduler: Scheduler, steps: int) -> bool:
    """Check whether diffusers makes a proper schedule with a number of steps.

    Rounding sometimes makes it one of another length (61 steps with spacing "trailing"), one beyond the training
    timesteps, or one with steps that do not change the noise level.

    Args:
        scheduler: Is not changed.
        steps: Number of steps wanted.
    """
    trained = scheduler.config["num_train_timesteps"]
    if not 1 <= steps <= trained:
        return False
    fresh = _begin(scheduler, steps)
    last = trained if _is_flow(scheduler) else trained - 1  # a flow begins at noise without any signal
    if len(fresh.timesteps) != steps or fresh.timesteps.max() > last:
        return False
    return bool(np.all(np.diff(_log_snr(fresh)) > 0))


def extract(scheduler: Scheduler, steps: int) -> SchedulerTable:
    """Read the table for one step count and check it against diffusers.

    Args:
        scheduler: As made by `make_scheduler`, or another one whose step takes a generator; it is not changed.
        steps: Number of steps.

    Returns:
        The table; diffusers and `update` agree to `TOLERANCE` on a whole random trajectory.

    Raises:
        ModelError: If the scheduler cannot do that many steps or cannot be expressed as a table.
    """
    name = type(scheduler).__name__
    _refuse_by_configuration(scheduler)
    if not supports(scheduler, steps):
        raise ModelError(f"{name} makes no proper schedule of {steps} steps. Choose another number.")
    probe = _probe(scheduler, steps)
    if not np.isfinite(probe.next_samples).all():
        raise ModelError(
            f"{name} gives NaN or infinity in {steps} steps. If its schedule ends in pure noise "
            "(rescale_betas_zero_snr), it needs prediction_type v_prediction or sample, or another scheduler."
        )
    widest = _probe(scheduler, steps, _MOST) if _asks_variance(scheduler) else None
    table = _solve(_begin(scheduler, steps), probe, widest)
    difference = _replay(scheduler, table)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"{name} in {steps} steps is not a linear multistep update with fixed clipping: its table is off by "
            f"{difference:.1e} of the sample, more than {TOLERANCE:.0e}. Choose one of {', '.join(SCHEDULERS)}."
        )
    return table


def _refuse_by_configuration(scheduler: Scheduler) -> None:
    """Refuse the known limits with a reason that helps.

    `from_config` keeps keys that only other classes know, so a key counts only together with the class.
    """
    if _is_flow(scheduler):
        return
    config, name = scheduler.config, type(scheduler).__name__
    if config.get("thresholding") and hasattr(scheduler, "_threshold_sample"):
        raise ModelError(f"{name} has thresholding, which depends on the whole image. Set it to False or choose euler.")
    if isinstance(scheduler, diffusers.DDPMScheduler) and config.get("variance_type") == "learned":
        raise ModelError(f"{name} has variance_type learned. Supported are learned_range and those that are fixed.")
    if config.get("use_flow_sigmas") or config.get("prediction_type") not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(
            f"{name} has prediction_type {config.get('prediction_type')!r} and use_flow_sigmas "
            f"{config.get('use_flow_sigmas', False)}. Supported are epsilon, v_prediction and sample, without flow."
        )


def _asks_variance(scheduler: Scheduler) -> bool:
    """Check whether the model must predict the variance of the noise in further channels."""
    return isinstance(scheduler, diffusers.DDPMScheduler) and scheduler.config.get("variance_type") == "learned_range"


def _is_flow(scheduler: Scheduler) -> bool:
    return type(scheduler).__name__ == _FLOW


def _begin(scheduler: Scheduler, steps: int) -> Any:
    """Copy a scheduler and set it to the beginning of a trajectory."""
    fresh = copy.deepcopy(scheduler)
    fresh.set_timesteps(steps)
    # Otherwise it searches for the first timestep and starts one step late where rounding made two of them equal.
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(0)
    return fresh


def _model_input(fresh: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return the input of the model."""
    scaled: torch.Tensor = sample if _is_flow(fresh) else fresh.scale_model_input(sample, timestep)
    return scaled


def _log_snr(fresh: Any) -> NDArray[np.float64]:
    """Read the log-SNR [n] of the samples that enter the steps of a scheduler that `_begin` made."""
    if _is_flow(fresh):
        sigmas = fresh.sigmas[: len(fresh.timesteps)].double()
        log_snr = 2 * ((1 - sigmas) / sigmas).log()
    elif hasattr(fresh, "sigmas"):
        log_snr = -2 * fresh.sigmas[: len(fresh.timesteps)].double().log()
    else:
        signal = fresh.alphas_cumprod[fresh.timesteps].double()
        log_snr = signal.log() - (1 - signal).log()
    clamped: NDArray[np.float64] = log_snr.clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT).numpy()
    return clamped


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    """Answers of a scheduler, row per step, column per experiment: n for x, n for e, then large, then zero."""

    input_scale: NDArray[np.float64]
    """[n]"""
    next_samples: NDArray[np.float64]
    """[n, 2n + 2]"""
    denoised: NDArray[np.float64]
    """[n, 2n + 2], x0 after clipping; zero if the scheduler does not return it."""
    noise: NDArray[np.float64]
    """[2n + 2], the first numbers from the generator of every step."""

    @property
    def noise_coefficient(self) -> NDArray[np.float64]:
        """Weight of the noise, [n]."""
        coefficient: NDArray[np.float64] = self.next_samples[:, -1] / self.noise[-1]
        return coefficient


_LEAST, _MOST = -1.0, 1.0
"""Prediction of a model for the lowest and the highest variance."""


def _probe(scheduler: Scheduler, steps: int, variance: float = _LEAST) -> _Probe:
    """Make a pass over the timesteps, in which a model that is asked for a variance always says the same."""
    fresh, generator = _begin(scheduler, steps), torch.Generator()
    samples, predictions = torch.zeros(2, steps, 2 * steps + 2, dtype=torch.float64)
    samples[:, :steps].fill_diagonal_(_SMALL)
    predictions[:, steps:-2].fill_diagonal_(_SMALL)
    samples[:, -2], predictions[:, -2] = _LARGE, -_LARGE
    input_scale, next_samples, denoised = np.zeros(steps), np.zeros(samples.shape), np.zeros(samples.shape)
    for step, timestep in enumerate(fresh.timesteps):
        sample, prediction = samples[step].view(1, 1, 1, -1), predictions[step].view(1, 1, 1, -1)
        input_scale[step] = _model_input(fresh, sample, timestep)[..., step].item() / _SMALL
        if _asks_variance(scheduler):
            prediction = torch.cat([prediction, torch.full_like(prediction, variance)], dim=1)
        answer = fresh.step(prediction, timestep, sample, generator=generator.manual_seed(0))
        next_samples[step] = answer.prev_sample.flatten()
        if hasattr(answer, "pred_original_sample"):
            denoised[step] = answer.pred_original_sample.flatten()
    noise = torch.randn(sample.shape, generator=generator.manual_seed(0), dtype=torch.float64)
    return _Probe(input_scale=input_scale, next_samples=next_samples, denoised=denoised, noise=noise.flatten().numpy())


def _solve(fresh: Any, probe: _Probe, widest: _Probe | None) -> SchedulerTable:
    """Turn the answers of a scheduler that `_begin` made into coefficients.

    Args:
        fresh: The scheduler.
        probe: Its answers, to the lowest variance where it asks for one.
        widest: Its answers to the highest variance, where it asks for one.
    """
    steps = len(probe.input_scale)
    noise_coefficient = probe.noise_coefficient
    responses = probe.next_samples - np.outer(noise_coefficient, probe.noise)
    sample_weights = _clean(responses[:, :steps] / _SMALL, noise_coefficient[:, None])
    prediction_weights = _clean(responses[:, steps:-2] / _SMALL, noise_coefficient[:, None])
    missing = _LARGE * (sample_weights - prediction_weights).sum(axis=1) - responses[:, -2]
    path = _clipped_path(probe.denoised, missing)

    samples, predictions = _by_lag(sample_weights), _by_lag(prediction_weights)
    window = needed_window(samples, predictions)
    if window > MAX_WINDOW:
        raise ModelError(f"{type(fresh).__name__} looks {window} steps back, more than {MAX_WINDOW}. Choose another.")
    samples[:, 0] = _clean(samples[:, 0] - path.weight * path.sample, samples[:, 0])
    predictions[:, 0] = _clean(predictions[:, 0] - path.weight * path.prediction, predictions[:, 0])
    weight, low, high = _variance(noise_coefficient, None if widest is None else widest.noise_coefficient)
    return SchedulerTable(
        timesteps=fresh.timesteps.numpy().astype(np.float32),
        log_snr=_log_snr(fresh),
        input_scale=probe.input_scale,
        initial_scale=1.0 if _is_flow(fresh) else float(fresh.init_noise_sigma),
        denoised_sample=path.sample,
        denoised_prediction=path.prediction,
        denoised_coefficient=path.weight,
        clip=path.clip,
        sample_coefficients=samples[:, :window],
        prediction_coefficients=predictions[:, :window],
        noise_coefficient=_clean(weight, np.ones(steps)),
        variance_low=low,
        variance_high=high,
    )


def _variance(
    least: NDArray[np.float64], most: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Separate noise coefficients [n] at the lowest and the highest variance into a weight and the logs of both."""
    if most is None:
        return least, np.zeros(len(least)), np.zeros(len(least))
    noisy = most != 0
    low, high = (2 * np.log(np.where(noisy, bound, 1.0)) for bound in (least, most))
    return noisy.astype(np.float64), low, high


def _clean(values: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Set values to zero that are only rounding errors of numbers of that size."""
    return np.where(np.abs(values) > _NEGLIGIBLE * np.abs(size), values, 0.0)


def _by_lag(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn weights [step, step of origin] into [step, lag]."""
    step, lag = np.ogrid[: len(weights), : len(weights)]
    return np.where(lag <= step, weights[step, step - lag], 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ClippedPath:
    """The part of the update that goes through the clipped x0; zero weights if there is none. Each [n]."""

    sample: NDArray[np.float64]
    prediction: NDArray[np.float64]
    weight: NDArray[np.float64]
    clip: float


def _clipped_path(denoised: NDArray[np.float64], missing: NDArray[np.float64]) -> _ClippedPath:
    """Separate the path through x0 from the direct one.

    Args:
        denoised: [n, 2n + 2], from the probe.
        missing: [n], shortfall of the large answers from a linear update: weight of x0 * the clipped part.
    """
    steps = len(denoised)
    sample = denoised[:, :steps].diagonal() / _SMALL
    prediction = denoised[:, steps:-2].diagonal() / _SMALL
    unclipped, clipped = _LARGE * (sample - prediction), denoised[:, -2]
    if np.any(np.abs(clipped) >= np.abs(unclipped) / 2):
        none = np.zeros(steps)
        return _ClippedPath(sample=none, prediction=none, weight=none, clip=math.inf)
    return _ClippedPath(
        sample=sample,
        prediction=prediction,
        weight=missing / (unclipped - clipped),
        clip=float(np.abs(clipped[0])),
    )


def _replay(scheduler: Scheduler, table: SchedulerTable) -> float:
    """Sample a fake model with the scheduler and with the table; return the largest relative difference of a step.

    In float64, to compare coefficients and not rounding: some schedulers subtract large numbers.
    """
    fresh, generator = _begin(scheduler, table.steps), torch.Generator()
    normal = partial(torch.randn, (2, 1, 8, 8), dtype=torch.float64)
    expected = table.initial_scale * normal(generator=generator.manual_seed(table.steps))
    actual, differences = expected.numpy(), []
    samples, predictions = (deque[NDArray[np.float64]](maxlen=table.window) for _ in range(2))
    for step, timestep in enumerate(fresh.timesteps):
        prediction = _fake_model(_model_input(fresh, expected, timestep).numpy(), float(timestep))
        variance = 1.2 * np.cos(2.0 * np.arange(prediction.size) + step).reshape(prediction.shape)
        output = np.concatenate([prediction, variance], axis=1) if _asks_variance(scheduler) else prediction
        answer = fresh.step(torch.from_numpy(output), timestep, expected, generator=generator.manual_seed(step))
        expected = answer.prev_sample
        samples.appendleft(actual)
        predictions.appendleft(_fake_model(table.input_scale[step] * actual, float(table.timesteps[step])))
        noise = normal(generator=generator.manual_seed(step)).numpy()
        actual = update(table, step, samples, predictions, noise, variance)
        differences.append(np.abs(actual - expected.numpy()).max() / expected.abs().max().item())
    return float(np.max(differences))


def _fake_model(model_input: NDArray[np.float64], timestep: float) -> NDArray[np.float64]:
    """Be nonlinear, larger than usual clips, and smooth: a steep model would magnify rounding from step to step."""
    return 1.5 * np.cos(0.3 * model_input + 0.01 * timestep)

"""One trajectory of a diffusers scheduler, called as the pipelines call it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from unetc.sampler.prediction_type import PredictionType

from .classes import CLASSES, Family, once

LOG_SNR_LIMIT = 30.0
"""log-SNR is clamped to -30..30, so that a schedule that ends in pure noise (zero terminal SNR) stays finite."""

NUDGE = 1e-6
"""Least difference of log-SNR between two calls. A second call at the same noise level gets this much more."""


class Scheduler(Protocol):
    """The used part of a diffusers scheduler."""

    config: Mapping[str, Any]
    timesteps: torch.Tensor

    @property
    def init_noise_sigma(self) -> float | torch.Tensor:
        """Standard deviation of the noise that sampling starts from."""

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Begin a trajectory."""

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> Any:
        """Return the next sample as `prev_sample` and, if there is one, x0 as `pred_original_sample`."""


def begin(scheduler: Scheduler, steps: int) -> Any:
    """Copy a scheduler and set it to the beginning of a trajectory."""
    fresh: Any = copy.deepcopy(scheduler)
    options = {} if (shift := fresh.config.get("mu")) is None else {"mu": shift}
    with np.errstate(invalid="ignore"):  # a schedule of NaN is refused by its levels: see `supports` in extract
        fresh.set_timesteps(steps, **options)
    # otherwise it searches for the first timestep: see `starts_late`
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(0)
    return fresh


def starts_late(begun: Any) -> bool:
    """Check whether a pipeline of diffusers would not start with the first step.

    Without a given start, a scheduler searches for the first timestep, and takes the second place where it finds two.
    Then it starts one step late, and some classes fail at the end. Pipelines of flows give the start.

    Args:
        begun: A scheduler that `begin` made.
    """
    if is_flow(begun) or not hasattr(begun, "index_for_timestep"):
        return False
    return bool(begun.index_for_timestep(begun.timesteps[0]) != 0)


def at_first_order(begun: Any, steps: int) -> Any:
    """Begin the same trajectory with a multistep method of order 1; None for a scheduler without such an order.

    A multistep method makes its first step at order 1, wherever it begins.

    Args:
        begun: A scheduler that `begin` made; it is not changed.
        steps: Number of steps that it was set to.
    """
    if (
        begun.config.get("solver_order") != 2
        or "solver_order" not in inspect.signature(type(begun).__init__).parameters
    ):
        return None
    return begin(type(begun).from_config(begun.config, solver_order=1), steps)


def model_input(fresh: Any, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return the input of the model."""
    scaled: torch.Tensor = sample if is_flow(fresh) else fresh.scale_model_input(sample, timestep)
    return scaled


def make_step(
    fresh: Any, prediction: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, noise: torch.Tensor, seed: int
) -> Any:
    """Make a step.

    Args:
        fresh: As `begin` made it.
        prediction: Output of the model.
        timestep: The scheduler's value.
        sample: The current sample.
        noise: The noise of this step, for a scheduler that takes it.
        seed: Seed of the generator, for a scheduler that draws noise.

    Returns:
        The output of diffusers.
    """
    options: dict[str, Any] = {}
    if "eta" in _parameters(type(fresh).__name__):
        options["eta"] = 0.0  # what pipelines pass unless they are asked for more; the default of TCD is 0.3
    if takes_noise(fresh):
        options["variance_noise"] = noise
    elif "generator" in _parameters(type(fresh).__name__):
        options["generator"] = torch.Generator().manual_seed(seed)
    return fresh.step(prediction, timestep, sample, **options)


def takes_noise(fresh: Any) -> bool:
    """Check whether the noise of a step is given to it; the other schedulers draw it from a generator."""
    stochastic = str(fresh.config.get("algorithm_type")).startswith("sde-")
    return stochastic and "variance_noise" in _parameters(type(fresh).__name__)


@cache
def _parameters(class_name: str) -> frozenset[str]:
    """List the parameters of a step."""
    return frozenset(inspect.signature(getattr(diffusers, class_name).step).parameters)


def asks_variance(scheduler: Scheduler) -> bool:
    """Check whether the model must predict the variance of the noise in further channels."""
    is_ddpm = type(scheduler).__name__ in ("DDPMScheduler", "DDPMParallelScheduler")
    return is_ddpm and scheduler.config.get("variance_type") == "learned_range"


def is_flow(scheduler: Scheduler) -> bool:
    """Check whether a scheduler samples a flow."""
    row = CLASSES.get(type(scheduler).__name__)
    return row is not None and row.family == Family.FLOW


def prediction_type(scheduler: Scheduler) -> PredictionType | None:
    """Find how the denoised sample follows from a prediction and its noise level.

    Args:
        scheduler: A scheduler of any class.

    Returns:
        The type; None where the model predicts the denoised sample itself, where its input has other weights (EDM), and
        where calls go back to more noise, because `rising` then changes their noise level.
    """
    name = type(scheduler).__name__
    if is_flow(scheduler):
        return PredictionType.FLOW
    if name not in CLASSES or CLASSES[name].family is not Family.BETAS:
        return None
    if name == "KDPM2AncestralDiscreteScheduler" or not scheduler.config.get("skip_prk_steps", True):
        return None
    kind = scheduler.config.get("prediction_type")
    return PredictionType(kind) if kind in (PredictionType.EPSILON, PredictionType.V) else None


def calls_of(scheduler: Scheduler, steps: int) -> int:
    """Count the denoiser calls of a proper schedule with a number of steps."""
    row = CLASSES.get(type(scheduler).__name__)
    return (once if row is None else row.calls)(steps, scheduler.config)


def log_snr(fresh: Any) -> NDArray[np.float64]:
    """Read the log-SNR [n] of the samples that enter the calls of a scheduler that `begin` made."""
    calls = len(fresh.timesteps)
    if hasattr(fresh, "sigmas_interpol"):  # every second call is between two levels
        between = fresh.sigmas_interpol[(0 if hasattr(fresh, "sigmas_down") else 1) :]
        sigmas = fresh.sigmas[:calls].clone()
        # an ancestral one returns to the next level, but float32 may put the call between them below it
        sigmas[1::2] = sigmas[1::2].maximum(between[0:calls:2][: calls // 2])
        levels = -2 * sigmas.double().log()
    elif hasattr(fresh, "sigmas"):
        levels = level_of_sigma(fresh.sigmas[:calls].double(), flow=is_flow(fresh))
    else:
        levels = level_of_signal(fresh.alphas_cumprod[fresh.timesteps.long()].double())
    clamped: NDArray[np.float64] = levels.clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT).numpy()
    return clamped


def signal(fresh: Any, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the factor [n] of the image in the samples at noise levels.

    Args:
        fresh: A scheduler that `begin` made; it is not changed.
        levels: log-SNR of the samples, [n].
    """
    if is_flow(fresh):
        return 1 / (1 + np.exp(-levels / 2))  # the factors of image and noise add up to 1
    image, noise = noisy_image(fresh, 0)
    if abs(image - 1) <= abs(np.hypot(image, noise) - 1):
        return np.ones_like(levels)  # noise is added to the image itself
    return np.sqrt(1 / (1 + np.exp(-levels)))  # the squares of both factors add up to 1


def noisy_image(begun: Any, call: int) -> tuple[float, float]:
    """Ask a scheduler for the factors of image and noise in the sample that enters a call.

    Args:
        begun: A scheduler that `begin` made; it is not changed.
        call: Index of the call.
    """
    fresh = copy.deepcopy(begun)
    if hasattr(fresh, "set_begin_index"):
        fresh.set_begin_index(call)
    pair = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1, 1)
    times = fresh.timesteps[call].repeat(2)
    if hasattr(fresh, "scale_noise"):
        mixed = fresh.scale_noise(pair, times, pair.flip(0))
    else:
        mixed = fresh.add_noise(pair, pair.flip(0), times)
    image, noise = mixed.flatten().tolist()
    return image, noise


def level_of_sigma(sigmas: torch.Tensor, *, flow: bool) -> torch.Tensor:
    """Turn noise levels into log-SNR."""
    return 2 * ((1 - sigmas) / sigmas).log() if flow else -2 * sigmas.log()


def level_of_signal(signal: torch.Tensor) -> torch.Tensor:
    """Turn the cumulative product of 1 - beta into log-SNR."""
    return signal.log() - (1 - signal).log()


def rising(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make noise levels of several calls per step increase, so that a plan can tell the calls apart.

    Calls at the same level move apart by `NUDGE`. A call that goes back to more noise gets the last level.
    """
    result = levels.copy()
    for call in range(1, len(result)):
        result[call] = max(result[call], result[call - 1] + NUDGE)
    return result


def trained_levels(scheduler: Scheduler) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """List timesteps that cover the range on which a model was trained, increasing, and the log-SNR at each of them.

    Between two of them, log-SNR is linear in the timestep as nearly as matters for a plan.
    """
    config: Any = scheduler.config
    fresh: Any = scheduler
    if is_flow(scheduler):
        trained = config["num_train_timesteps"]
        timesteps = torch.linspace(0, trained, trained + 1, dtype=torch.float64)
        levels = level_of_sigma(timesteps / trained, flow=True)
    elif "sigma_data" in config and not hasattr(fresh, "alphas_cumprod"):
        timesteps, levels = _continuous(config["sigma_min"], config["sigma_max"])
    elif config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        own = ((1 - fresh.alphas_cumprod) / fresh.alphas_cumprod).double().sqrt()
        low, high = config.get("sigma_min"), config.get("sigma_max")
        timesteps, levels = _continuous(
            own.min().item() if low is None else low, own.max().item() if high is None else high
        )
    else:
        levels = level_of_signal(fresh.alphas_cumprod.double())
        timesteps = torch.arange(len(levels), dtype=torch.float64)
    return timesteps.numpy(), levels.clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT).numpy()


def _continuous(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cover a range of noise levels whose timesteps are a quarter of their logarithm."""
    sigmas = torch.tensor([low, high], dtype=torch.float64)
    return 0.25 * sigmas.log(), -2 * sigmas.log()

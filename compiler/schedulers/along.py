"""Walk a scheduler along chosen timesteps, for schedules that the spacings of diffusers cannot begin at a given one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from unetc.errors import ModelError

from .walk import Scheduler, begin

_SIGMAS = (
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
"""Classes whose steps read a list of noise levels, one per timestep and a last one."""
_DDIM = ("DDIMScheduler", "DDIMParallelScheduler")
_DDPM = ("DDPMScheduler", "DDPMParallelScheduler")
_CONVERTERS = {
    "use_karras_sigmas": "_convert_to_karras",
    "use_exponential_sigmas": "_convert_to_exponential",
    "use_beta_sigmas": "_convert_to_beta",
}
"""Settings that choose noise levels, and not timesteps, with the method of diffusers that spaces them."""
_OWN_LEVELS = (*_CONVERTERS, "use_lu_lambdas", "use_flow_sigmas")


def walks_along(scheduler: Scheduler) -> bool:
    """Check whether a scheduler can follow any falling timesteps."""
    known = type(scheduler).__name__ in (*_SIGMAS, *_DDIM, *_DDPM)
    continuous = scheduler.config.get("timestep_type") == "continuous"
    return known and not continuous and not any(scheduler.config.get(key) for key in _OWN_LEVELS)


def begin_along(scheduler: Scheduler, timesteps: Sequence[int]) -> Any:
    """Copy a scheduler and set it to the beginning of a trajectory along chosen timesteps.

    Args:
        scheduler: A scheduler for which `walks_along` holds; it is not changed.
        timesteps: Timesteps of the training, falling.

    Raises:
        ModelError: If the timesteps do not fall, or the model was not trained at one of them.
    """
    trained = scheduler.config["num_train_timesteps"]
    if not timesteps or any(left <= right for left, right in pairwise((trained, *timesteps, -1))):
        got = ", ".join(map(str, timesteps))
        raise ModelError(f"the timesteps {got} do not fall from {trained - 1} or less to 0 or more. Choose others.")
    fresh, name = begin(scheduler, len(timesteps)), type(scheduler).__name__
    if name in _DDPM:
        fresh.set_timesteps(timesteps=list(timesteps))
        return fresh
    chosen = torch.tensor(timesteps)
    if name in _SIGMAS:
        alphas = fresh.alphas_cumprod[chosen].double()
        levels = ((1 - alphas) / alphas).sqrt()
        fresh.sigmas = torch.cat([levels.to(fresh.sigmas), fresh.sigmas[-1:]])
    else:
        _step_to_next(fresh, timesteps)
    fresh.timesteps = chosen.to(fresh.timesteps)
    return fresh


def spaces_levels(scheduler: Scheduler) -> bool:
    """Check whether a scheduler spaces noise levels, and not timesteps, between any two of them."""
    return type(scheduler).__name__ in _SIGMAS and any(scheduler.config.get(key) for key in _CONVERTERS)


def begin_between(scheduler: Scheduler, highest: float, lowest: float, steps: int) -> Any:
    """Copy a scheduler and set it to the beginning of a trajectory whose noise levels it spaces between two of them.

    Args:
        scheduler: A scheduler for which `spaces_levels` holds; it is not changed.
        highest: First noise level, noise over signal.
        lowest: Noise level of the last step.
        steps: Number of steps.
    """
    fresh = begin(scheduler, steps)
    convert = next(method for key, method in _CONVERTERS.items() if scheduler.config.get(key))
    levels = getattr(fresh, convert)(in_sigmas=np.array([highest, lowest]), num_inference_steps=steps)
    levels = np.array(levels, dtype=np.float64)
    alphas = fresh.alphas_cumprod.double().numpy()
    trained = np.log(np.sqrt((1 - alphas) / alphas))
    timesteps = torch.tensor(np.interp(np.log(levels), trained, np.arange(len(trained))))
    fresh.sigmas = torch.cat([torch.from_numpy(levels).to(fresh.sigmas), fresh.sigmas[-1:]])
    fresh.timesteps = (timesteps if fresh.timesteps.is_floating_point() else timesteps.round()).to(fresh.timesteps)
    return fresh


class _Gap:
    """Stands for a number of steps: the trained timesteps, divided by it, are the distance to the next timestep."""

    def __init__(self, distance: int) -> None:
        self._distance = distance

    def __rfloordiv__(self, trained: int) -> int:
        return self._distance


def _step_to_next(fresh: Any, timesteps: Sequence[int]) -> None:
    """Let every step of ddim end at the next timestep; diffusers computes it from the number of steps."""
    gaps = {left: _Gap(left - right) for left, right in pairwise((*timesteps, -1))}
    own = type(fresh)

    def step(self: Any, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        self.num_inference_steps = gaps[int(timestep)]
        return own.step(self, model_output, timestep, sample, **options)

    fresh.__class__ = type(own.__name__, (own,), {"step": step})

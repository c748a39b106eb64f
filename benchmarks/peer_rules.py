"""Rules of peers that skip whole calls of the denoiser, around an unmodified diffusers `StableDiffusionPipeline`.

Two are published packages: the TaylorSeer hook of diffusers, and hicache-pp. The other rules are written here from
their papers, because their code is not packaged or hard-codes a device. A rule sees the prediction of a guided call,
[2 × batch, channel, height, width]. All rules but DMD are linear in it, so guidance may come before or after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.hooks import HookRegistry, TaylorSeerCacheConfig, apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context  # a UNet has no public way to set a context
from hicache_pp import (
    dmd_forecast_state,
    dmd_update_snapshots,
    hicache_decide,
    hicache_forecast,
    hicache_init,
    hicache_update_derivatives,
)
from tgate import end_guidance
from torch import Tensor


class Rule(Protocol):
    """Decides which steps call the denoiser, and predicts in the others."""

    def computes(self, step: int, sample: Tensor) -> bool:
        """Decide whether a step calls the denoiser; called once for every step, in order."""

    def add(self, step: int, prediction: Tensor) -> None:
        """Take a computed prediction."""

    def predict(self, step: int) -> Tensor:
        """Predict in place of the denoiser."""


@contextmanager
def skipping(pipeline: StableDiffusionPipeline, rule: Rule) -> Iterator[list[int]]:
    """Put a rule around the denoiser of a pipeline, for one trajectory.

    Yields:
        The steps that call the denoiser; it fills while the pipeline runs.
    """
    unet, own, steps, computed = pipeline.unet, pipeline.unet.forward, count(), list[int]()

    def forward(sample: Tensor, *inputs: Any, **options: Any) -> Any:
        step = next(steps)
        if rule.computes(step, sample):
            computed.append(step)
            output = own(sample, *inputs, **options)
            rule.add(step, output[0])
            return output
        return (rule.predict(step),)

    unet.forward = forward
    try:
        yield computed
    finally:
        del unet.forward  # the method of the class again


class Zeus:
    """Extrapolate or reuse in turns, with full steps at the beginning and at the end.

    Source:
        ZEUS 2026, arXiv:2604.01552: 10 full steps first and 5 last, without its final phase in the denoised sample.
    """

    FIRST, LAST = 10, 5

    def __init__(self, steps: int, calls: int) -> None:
        """Choose the smallest period that needs no more calls, or the one with the fewest."""
        periods = [(len(self._steps(steps, period)), period) for period in range(1, steps)]
        few = [one for one in periods if one[0] <= calls] or [min(periods)]
        self._computed = self._steps(steps, min(period for _, period in few))
        self._used: list[Tensor] = []
        self._skipped = 0

    def _steps(self, steps: int, period: int) -> set[int]:
        middle = range(self.FIRST, steps - self.LAST, period)
        return {*range(self.FIRST), *middle, *range(steps - self.LAST, steps)}

    def computes(self, step: int, sample: Tensor) -> bool:
        """Look the step up."""
        return step in self._computed

    def add(self, step: int, prediction: Tensor) -> None:
        """Keep the last two predictions."""
        self._used, self._skipped = [*self._used[-1:], prediction], 0

    def predict(self, step: int) -> Tensor:
        """Extrapolate from the last two predictions, or reuse the last one."""
        self._skipped += 1
        before, last = self._used
        predicted = 2 * last - before if self._skipped % 2 else last
        self._used = [last, predicted]
        return predicted


class AdaptiveDiffusion:
    """Reuse the prediction while the samples change evenly; each batch chooses its own steps.

    Source:
        AdaptiveDiffusion 2024, arXiv:2410.09873: the third-order estimator, with at most 4 skipped steps in a row.
    """

    LONGEST = 4

    def __init__(self, threshold: float) -> None:
        """Begin a trajectory."""
        self._threshold = threshold
        self._last: Tensor | None = None
        self._changes: list[float] = []
        self._skipped = 0
        self._prediction: Tensor | None = None

    def computes(self, step: int, sample: Tensor) -> bool:
        """Compare the last three changes of the samples."""
        if self._last is not None:
            self._changes = [*self._changes[-2:], float((sample - self._last).abs().mean())]
        self._last = sample
        if len(self._changes) < 3 or self._skipped >= self.LONGEST:
            return True
        before, middle, last = self._changes
        return abs((before + last) / 2 - middle) > self._threshold * middle

    def add(self, step: int, prediction: Tensor) -> None:
        """Keep the prediction."""
        self._prediction, self._skipped = prediction, 0

    def predict(self, step: int) -> Tensor:
        """Reuse the last prediction."""
        assert self._prediction is not None
        self._skipped += 1
        return self._prediction


class Spectrum:
    """Forecast with Chebyshev polynomials fitted by ridge regression, mixed with a line.

    Source:
        Spectrum 2026, arXiv:2603.01623: degree 4, ridge 0.1, the last 10 predictions, 5 full steps first, then windows
        that begin at 2 steps and grow. The paper forecasts the input of the last convolution, which is linear.
    """

    DEGREE, RIDGE, HISTORY, FIRST, MIXED = 4, 0.1, 10, 5, 0.5

    def __init__(self, steps: int, calls: int) -> None:
        """Choose how fast windows grow: the slowest growth that needs no more calls."""
        growths = (growth / 100 for growth in range(1000))
        schedules = (self._schedule(steps, growth) for growth in growths)
        self._computed = next(one for one in schedules if len(one) <= calls)
        self._steps = steps
        self._known: list[tuple[int, Tensor]] = []

    def _schedule(self, steps: int, growth: float) -> set[int]:
        computed, window, skipped = set(range(self.FIRST)), 2.0, 0
        for step in range(self.FIRST, steps):
            skipped += 1
            if skipped % math.floor(window) == 0:
                computed.add(step)
                window, skipped = window + growth, 0
        return computed

    def computes(self, step: int, sample: Tensor) -> bool:
        """Look the step up."""
        return step in self._computed

    def add(self, step: int, prediction: Tensor) -> None:
        """Keep the last predictions."""
        self._known = [*self._known[1 - self.HISTORY :], (step, prediction)]

    def predict(self, step: int) -> Tensor:
        """Mix both forecasts."""
        places, values = zip(*self._known, strict=True)
        fitted, wanted = self._polynomials(np.array(places)), self._polynomials(np.array([step]))
        penalty = self.RIDGE * np.eye(self.DEGREE + 1)
        weights = wanted @ np.linalg.solve(fitted.T @ fitted + penalty, fitted.T)
        reach = (step - places[-1]) / (places[-1] - places[-2])
        line = np.zeros(len(places))
        line[-2:] = -reach, 1 + reach
        mixed = self.MIXED * weights[0] + (1 - self.MIXED) * line
        forecast: Tensor = torch.tensordot(torch.from_numpy(mixed).float(), torch.stack(values), dims=1)
        return forecast

    def _polynomials(self, steps: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.polynomial.chebyshev.chebvander(2 * steps / (self._steps - 1) - 1, self.DEGREE)


class HiCache:
    """The forecasts of the package hicache-pp, with its default settings.

    Source:
        hicache-pp 1.3.0: Hermite polynomials (arXiv:2508.16984), or dynamic mode decomposition.
    """

    def __init__(self, steps: int, interval: int, backend: str) -> None:
        """Begin a trajectory; the backend is `hermite` or `dmd`."""
        self._state = hicache_init(num_steps=steps, interval=interval, backend=backend)
        self._forecast: Callable[[Any], Tensor] = {"hermite": hicache_forecast, "dmd": dmd_forecast_state}[backend]

    def computes(self, step: int, sample: Tensor) -> bool:
        """Ask the package."""
        self._state["step"] = step
        return bool(hicache_decide(self._state) == "full")

    def add(self, step: int, prediction: Tensor) -> None:
        """Hand the prediction to the package."""
        hicache_update_derivatives(self._state, prediction)
        dmd_update_snapshots(self._state, prediction, self._state["history"])

    def predict(self, step: int) -> Tensor:
        """Ask the package."""
        return self._forecast(self._state)


@contextmanager
def taylorseer(pipeline: StableDiffusionPipeline, interval: int, order: int) -> Iterator[None]:
    """Put the TaylorSeer hook of diffusers around the last convolution, for one trajectory.

    Source:
        `TaylorSeerCacheConfig` of diffusers 0.42 (arXiv:2503.06923). The blocks before the convolution return zeros in
        skipped steps. Its factors are kept in float32; the default, bfloat16, would lose precision.
    """
    unet = pipeline.unet
    blocks = [r".*resnets\.\d+", r".*transformer_blocks\.\d+", r".*(down|up)samplers\.\d+", "conv_in"]
    apply_taylorseer_cache(
        unet,
        TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=["conv_out"],
            skip_predict_identifiers=blocks,
        ),
    )
    _set_cache_context(unet, CacheContext("guided"))
    try:
        yield
    finally:
        HookRegistry.check_if_exists_or_initialize(unet).remove_hook("taylorseer_cache", recurse=True)


@contextmanager
def guided_until(pipeline: StableDiffusionPipeline, step: int) -> Iterator[dict[str, Any]]:
    """End guidance after some steps, as Adaptive Guidance does with a fixed threshold.

    Source:
        Castillo et al. 2023, arXiv:2312.12487, section 4. The step is chosen before sampling, so every batch takes the
        same time.

    Args:
        pipeline: The pipeline.
        step: Number of guided steps, at least 1.

    Yields:
        Additional arguments for the call of the pipeline.
    """

    def end(running: Any, place: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return end_guidance(running, tensors) if place == step - 1 else {}

    yield {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}

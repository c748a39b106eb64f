"""T-GATE around an unmodified diffusers `StableDiffusionPipeline`.

Source:
    Zhang et al. 2024, "Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models", arXiv:2404.02747,
    algorithm 1: from a gate step on, cross-attention returns the mean of its outputs at that step with and without
    the prompt, and guidance ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class Crossing:
    """An attention processor that remembers its last output, and returns it once closed."""

    def __init__(self, own: Any) -> None:
        """Wrap the processor that computes the attention."""
        self._own = own
        self._last: Tensor | None = None
        self._kept: Tensor | None = None

    def __call__(self, attention: Any, *inputs: Any, **options: Any) -> Tensor:
        """Compute the attention `[batch, token, channel]`, or return the kept output."""
        if self._kept is not None:
            return self._kept
        last: Tensor = self._own(attention, *inputs, **options)
        self._last = last
        return last

    def close(self, guided: bool) -> None:
        """Keep the last output; after a guided call, the mean of its two halves."""
        assert self._last is not None
        self._kept = torch.add(*self._last.chunk(2)) / 2 if guided else self._last


def end_guidance(running: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """End guidance within a callback of a running pipeline; return the tensors that change."""
    if not running.do_classifier_free_guidance:
        return {}
    running._guidance_scale = 1.0  # the way that diffusers' guide to callbacks ends guidance
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}


@contextmanager
def gated(pipeline: StableDiffusionPipeline, gate: int) -> Iterator[dict[str, Any]]:
    """Put T-GATE around a pipeline.

    Args:
        pipeline: The pipeline; it is restored afterwards.
        gate: Number of steps computed in full, at least 1.

    Yields:
        Additional arguments for the call of the pipeline, for one trajectory.
    """
    own = dict(pipeline.unet.attn_processors)
    crossings = {name: Crossing(processor) for name, processor in own.items() if ".attn2." in name}

    def close(running: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != gate - 1:
            return {}
        for crossing in crossings.values():
            crossing.close(running.do_classifier_free_guidance)
        return end_guidance(running, tensors)

    pipeline.unet.set_attn_processor(own | crossings)
    try:
        yield {"callback_on_step_end": close, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    finally:
        pipeline.unet.set_attn_processor(dict(own))

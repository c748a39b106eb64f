"""Names, shapes and examples of what a denoiser takes.

Names follow diffusers, those of ControlNet residuals StreamDiffusion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SAMPLE, TIMESTEP, CONTEXT = "sample", "timestep", "encoder_hidden_states"
POOLED, TIME_IDS, CLASS_LABELS = "text_embeds", "time_ids", "class_labels"
LOW_RES = "low_res"

BATCH = 2
TOKENS = 5
"""Sizes of examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a denoiser."""

    name: str
    example: Tensor
    """[2, ...]; sizes that may change differ from each other where the denoiser allows it."""
    dynamic: tuple[int, ...] = ()
    """Axes, beside the batch, whose size may change."""
    native: Tensor | None = None
    """Example of the size the denoiser was trained for, where it can be captured at that size only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """How the denoisers of a class are called."""

    inputs: Callable[[Any, torch.Generator], list[Input]]
    """Lists the inputs of a denoiser; refuses what is not supported."""
    call: Callable[[Any, dict[str, Any]], Tensor]
    """Calls a denoiser with inputs by name; returns [batch, channel, height, width]."""


def text(name: str, width: int, generator: torch.Generator) -> Input:
    """Make an input of any number of tokens."""
    return Input(name=name, example=torch.randn(BATCH, TOKENS, width, generator=generator), dynamic=(1,))


def vector(name: str, width: int, generator: torch.Generator) -> Input:
    """Make an input of one vector per sample."""
    return Input(name=name, example=torch.randn(BATCH, width, generator=generator))


def timestep() -> Input:
    """Make the input of a timestep per sample."""
    return Input(name=TIMESTEP, example=torch.tensor([10.0, 500.0]))

"""Names, shapes and examples of a denoiser's inputs.

Names follow diffusers; the names of ControlNet inputs follow StreamDiffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unetc.call import TIMESTEP

BATCH = 2
TOKENS = 5
"""Sizes of the examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One input of a denoiser."""

    name: str
    example: Tensor
    """[2, ...]; sizes that may change differ from each other if the denoiser allows it."""
    dynamic: tuple[int, ...] = ()
    """Axes other than the batch whose size may change."""
    native: Tensor | None = None
    """Example at the size the denoiser was trained for, used if a capture with dynamic sizes fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Inputs and call of a class of denoiser."""

    multiples: Callable[[Any], tuple[int, ...]]
    """Lists the numbers that height and width may have to be multiples of, the smallest first."""
    inputs: Callable[..., list[Input]]
    """Lists the inputs of a denoiser and refuses unsupported configurations; called with the model, a generator, and a
    number that height and width are multiples of."""
    call: Callable[[Any, dict[str, Any]], Tensor]
    """Calls a denoiser with inputs by name; returns [batch, channel, height, width]."""
    largest: Callable[[Any], int] | None = None
    """Computes the largest height and width; None if there is no limit."""


def forms(inputs: tuple[Input, ...]) -> Iterator[tuple[Input, ...]]:
    """Yield the inputs in the order to try them: with dynamic sizes first, then at their native size."""
    yield inputs
    if any(item.native is not None for item in inputs):
        yield tuple(item if item.native is None else Input(name=item.name, example=item.native) for item in inputs)


def text(name: str, width: int, generator: torch.Generator) -> Input:
    """Make an input with any number of tokens."""
    return Input(name=name, example=torch.randn(BATCH, TOKENS, width, generator=generator), dynamic=(1,))


def vector(name: str, width: int, generator: torch.Generator) -> Input:
    """Make an input with one vector per sample."""
    return Input(name=name, example=torch.randn(BATCH, width, generator=generator))


def timestep() -> Input:
    """Make the input with one timestep per sample."""
    return Input(name=TIMESTEP, example=torch.tensor([10.0, 500.0]))

"""Read the tensors of a request for images."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unetc.errors import RequestError
from unetc.runtime.batching.ladder import AUTO
from unetc.server.inputs import INPUTS, applies
from unetc.server.limits import DRAWN_SEEDS, LARGEST_SCALE, LARGEST_SEED, LONGEST_PROMPT, MOST_IMAGES
from unetc.server.open_inference import BYTES
from unetc.server.prompts import PromptReader

from .backend import Utilities

NOT_TAKEN = frozenset({"height", "width", "least_quality", "image", "strength"})
"""Inputs of `unetc serve` that the loop does not take: images have the model's own size and start from noise."""


def taken(prompts: PromptReader) -> tuple[str, ...]:
    """List the inputs that the loop of a model takes."""
    return tuple(name for name in INPUTS if name not in NOT_TAKEN and applies(name, prompts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Images that a client asks for."""

    prompt: str | None = None
    negative_prompt: str | None = None
    label: int | None = None
    guidance_scale: float | None = None
    seeds: tuple[int, ...]
    """One seed, or one per image."""
    count: int = 1
    """Number of images of one seed; 1 with several seeds."""
    steps: int | None = None
    """Number of steps; the bundle's default if None."""
    quality: str = AUTO

    @property
    def indices(self) -> Sequence[int]:
        """Index of each image within its seed."""
        return [0] * len(self.seeds) if len(self.seeds) > 1 else range(self.count)

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            RequestError: If there is one.
        """
        for number in (self.count, len(self.seeds)):
            if not 1 <= number <= MOST_IMAGES:
                raise RequestError(f"count is {number}. Expected 1 to {MOST_IMAGES} images.", "count")
        if len(self.seeds) > 1 and self.count > 1:
            raise RequestError("count is given with several seeds, which make one image each. Omit it.", "count")
        for seed in self.seeds:
            if not 0 <= seed <= LARGEST_SEED:
                raise RequestError(f"seed is {seed}. Expected a whole number from 0 to {LARGEST_SEED}.", "seed")
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if text is not None and len(text) > LONGEST_PROMPT:
                raise RequestError(f"{name} has {len(text)} characters. Expected at most {LONGEST_PROMPT}.", name)
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= LARGEST_SCALE:
            raise RequestError(
                f"guidance_scale is {self.guidance_scale}. Expected 0 to {LARGEST_SCALE:g}.", "guidance_scale"
            )

    @classmethod
    def read(cls, request: Any, utilities: Utilities, names: Sequence[str]) -> Asked:
        """Read a request of Triton.

        Args:
            request: The request.
            utilities: The module `triton_python_backend_utils`.
            names: The inputs that the model takes.

        Raises:
            RequestError: If an input is wrong.
        """
        values: dict[str, Any] = {}
        for name in names:
            tensor = utilities.get_input_tensor_by_name(request, name)
            if tensor is not None:
                values[name] = _read(name, tensor.as_numpy())
        seeds = values.pop("seed", None) or (secrets.randbelow(DRAWN_SEEDS),)
        return cls(seeds=seeds, **values)


def _read(name: str, array: Any) -> Any:
    """Read an input of one element, or the seeds."""
    listed = array.ravel().tolist()
    several = name == "seed"
    if not listed or (len(listed) > 1 and not several):
        expected = "[count]" if several else "[1]"
        raise RequestError(f"{name} has shape {list(array.shape)}. Expected {expected}.", name)
    if several:
        return tuple(listed)
    value = listed[0]
    if INPUTS[name].datatype == BYTES:
        try:
            return value.decode() if isinstance(value, bytes) else str(value)
        except UnicodeDecodeError:
            raise RequestError(f"{name} is not valid UTF-8. Send text in UTF-8.", name) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{name} is {value}. Expected a finite number.", name)
    return value

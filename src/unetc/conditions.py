"""What samples are conditioned on beside noise and timestep, and classifier-free guidance.

A guided denoiser call is one call of twice the batch: first the samples with their negative conditions, then with their
own. What comes back is negative + scale * (own - negative). Engines know nothing of it.

Source:
    Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598, equation 6.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .controlnet import ControlNetInput, zeros
from .device import HOST, Device, Tensor
from .errors import ShapeMismatch

Values = Mapping[str, Tensor]
"""Input of the denoiser → one row per sample, [batch, ...]; arrays, until they are put on a device."""

NEGATIVE = "negative."
"""Prefix of the names of negative conditions, where both kinds are in one mapping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The conditions of a batch; without any, the denoiser is called with noise and timestep alone.

    Raises:
        ShapeMismatch: If the inputs have different numbers of rows, or the negative ones other names or shapes.
    """

    own: Values = field(default_factory=dict)
    negative: Values = field(default_factory=dict)
    """What to be led away from; empty when nothing is guided."""
    scale: float = 1.0
    """How far, dimensionless; 1 is no guidance."""
    controlnet: tuple[ControlNetInput, ...] = ()
    """What the denoiser takes of a ControlNet; zero unless `own` has it."""
    device: Device = HOST
    """Where the conditions are, and the calls that are made of them."""

    def __post_init__(self) -> None:
        """Check that all rows belong together."""
        if len({len(array) for array in self.own.values()}) > 1:
            rows = {name: len(array) for name, array in self.own.items()}
            raise ShapeMismatch(f"conditions have different numbers of rows: {rows}; expected one per sample.")
        if self.negative:
            wanted, got = ({name: array.shape for name, array in side.items()} for side in (self.own, self.negative))
            if wanted != got:
                raise ShapeMismatch(
                    f"negative conditions have the shapes {got}; expected those of the others, {wanted}."
                )

    @property
    def guided(self) -> bool:
        """Whether every call has twice the batch."""
        return bool(self.negative)

    @property
    def rows_per_sample(self) -> int:
        """Rows of a denoiser call for each sample."""
        return 2 if self.guided else 1

    @property
    def rows(self) -> int | None:
        """Number of rows; None without conditions, which fit any batch."""
        return next((len(array) for array in self.own.values()), None)

    def take(self, rows: Sequence[int]) -> Conditions:
        """Pick rows, the same ones as often as asked; a row counts modulo how many there are."""

        def pick(values: Values) -> Values:
            return {name: array[np.asarray(rows) % len(array)] for name, array in values.items()}

        return replace(self, own=pick(self.own), negative=pick(self.negative))

    def on(self, device: Device) -> Conditions:
        """Put arrays on a device."""

        def put(values: Values) -> Values:
            return {name: device.put(array) for name, array in values.items()}

        return replace(self, own=put(self.own), negative=put(self.negative), device=device)

    def widen(self, sample: Tensor, timestep: float, **rows: Tensor) -> dict[str, Tensor]:
        """Make the inputs of one denoiser call.

        Args:
            sample: What the denoiser sees, [batch, channel, height, width].
            timestep: The scheduler's value.
            rows: Further inputs, [batch, ...].
        """
        batch, _, height, width = sample.shape
        return self.varying(sample, timestep, **rows) | self.constant(batch, height, width)

    def varying(self, sample: Tensor, timestep: float, **rows: Tensor) -> dict[str, Tensor]:
        """Make those inputs that are others in every call; arguments as for `widen`."""
        inputs = {"sample": sample, **rows}
        if self.guided:
            inputs = {name: self.device.concatenate([tensor, tensor]) for name, tensor in inputs.items()}
        inputs["timestep"] = self.device.full((len(sample) * self.rows_per_sample,), timestep)
        return inputs

    def constant(self, batch: int, height: int, width: int) -> dict[str, Tensor]:
        """Make those inputs that are the same at every timestep, for a batch of samples of a size."""
        inputs = dict(zeros(self.controlnet, batch * self.rows_per_sample, height, width, self.device))
        if not self.guided:
            return {**inputs, **self.own}
        join = self.device.concatenate
        return inputs | {name: join([self.negative[name], tensor]) for name, tensor in self.own.items()}

    def guide(self, prediction: Tensor, channels: int) -> Tensor:
        """Combine the two halves of a prediction, [2 * batch, ...]; of the channels behind the first, take the own.

        Those are a predicted variance, which is not guided.
        """
        if not self.guided:
            return prediction
        batch = len(prediction) // 2
        negative, own = prediction[:batch], prediction[batch:]
        guided = negative + float(self.scale) * (own - negative)  # a float of numpy would widen float32
        if own.shape[1] > channels:
            guided[:, channels:] = own[:, channels:]
        return guided

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tell the shape of one row of every input."""
        return {name: array.shape[1:] for name, array in self.to_arrays().items()}

    def sha256(self) -> str:
        """Hash what decides a guided prediction."""
        digest = hashlib.sha256(repr(self.scale).encode())
        for name, array in sorted(self.to_arrays().items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Put both kinds into one mapping."""
        return {**self.own, **{f"{NEGATIVE}{name}": array for name, array in self.negative.items()}}

    @classmethod
    def from_arrays(cls, arrays: Values, scale: float, controlnet: tuple[ControlNetInput, ...] = ()) -> Conditions:
        """Read `to_arrays` back."""
        return cls(
            own={name: array for name, array in arrays.items() if not name.startswith(NEGATIVE)},
            negative={
                name.removeprefix(NEGATIVE): array for name, array in arrays.items() if name.startswith(NEGATIVE)
            },
            scale=scale,
            controlnet=controlnet,
        )


UNCONDITIONAL = Conditions()
"""No conditions: noise and timestep are all that the denoiser gets."""

"""Conditions of samples, such as encoded prompts, and classifier-free guidance.

A guided denoiser call has twice the batch: first every sample with its negative conditions, then every sample with its
own. The result is negative + scale * (own - negative). Engines do not know about guidance.

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

from .controlnet import Control, ControlNetInput, zeros
from .device import HOST, Device, Tensor
from .errors import ShapeMismatch

Values = Mapping[str, Tensor]
"""Values by denoiser input, one row per sample, [batch, ...]; arrays until they are put on a device."""

NEGATIVE = "negative."
"""Prefix for the names of negative conditions in a mapping that holds both kinds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The conditions of a batch; without conditions, the denoiser receives only noise and timestep.

    Raises:
        ShapeMismatch: If inputs differ in their number of rows, or negative conditions have other names or shapes.
    """

    own: Values = field(default_factory=dict)
    negative: Values = field(default_factory=dict)
    """Conditions from which guidance moves the samples away; empty without guidance."""
    scale: float = 1.0
    """Guidance scale, dimensionless; 1 without guidance."""
    controlnet: tuple[ControlNetInput, ...] = ()
    """ControlNet inputs of the denoiser; zero unless `own` has values for them, or `control` computes them."""
    control: Control | None = None
    """Control images of the samples, one per row; None without."""
    device: Device = HOST
    """Device of the conditions and of the calls made with them."""

    def __post_init__(self) -> None:
        """Check that all inputs have the same rows."""
        if len({len(array) for array in self.own.values()}) > 1:
            rows = {name: len(array) for name, array in self.own.items()}
            raise ShapeMismatch(f"conditions have different numbers of rows: {rows}. Expected one row per sample.")
        if self.negative:
            wanted, got = ({name: array.shape for name, array in side.items()} for side in (self.own, self.negative))
            if wanted != got:
                raise ShapeMismatch(
                    f"negative conditions have the shapes {got}. Expected the same shapes as the conditions: {wanted}."
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
        """Select rows by index, modulo their number; an index may occur more than once."""

        def pick(values: Values) -> Values:
            return {name: array[np.asarray(rows) % len(array)] for name, array in values.items()}

        control = None if self.control is None else self.control.take(rows)
        return replace(self, own=pick(self.own), negative=pick(self.negative), control=control)

    def on(self, device: Device) -> Conditions:
        """Move all conditions to a device."""

        def put(values: Values) -> Values:
            return {name: device.put(array) for name, array in values.items()}

        return replace(self, own=put(self.own), negative=put(self.negative), device=device)

    def widen(self, sample: Tensor, timestep: float, **rows: Tensor) -> dict[str, Tensor]:
        """Build the inputs of one denoiser call.

        Args:
            sample: Input samples of the denoiser, [batch, channel, height, width].
            timestep: The scheduler's value.
            rows: Further inputs, [batch, ...].

        Returns:
            Tensors by input name, with `rows_per_sample` * batch rows.
        """
        batch, _, height, width = sample.shape
        return self.varying(sample, timestep, **rows) | self.constant(batch, height, width)

    def varying(self, sample: Tensor, timestep: float, **rows: Tensor) -> dict[str, Tensor]:
        """Build the inputs that differ from call to call; see `widen` for the arguments."""
        inputs = {"sample": sample, **rows}
        if self.guided:
            inputs = {name: self.device.concatenate([tensor, tensor]) for name, tensor in inputs.items()}
        inputs["timestep"] = self.device.full((len(sample) * self.rows_per_sample,), timestep)
        if self.control is not None:
            inputs |= self._controlled(self.control, inputs)
        return inputs

    def _controlled(self, control: Control, inputs: Values) -> dict[str, Tensor]:
        """Compute the ControlNet inputs of a call."""
        read = {"sample": inputs["sample"], "timestep": inputs["timestep"], **self._joined()}
        arrays = {name: self.device.to_array(tensor) for name, tensor in read.items()}
        return {name: self.device.put(array) for name, array in control.residuals(arrays).items()}

    def constant(self, batch: int, height: int, width: int) -> dict[str, Tensor]:
        """Build the inputs that stay the same at every timestep, for a batch of samples of this size."""
        inputs: dict[str, Tensor] = {}
        if self.control is None:
            inputs |= zeros(self.controlnet, batch * self.rows_per_sample, height, width, self.device)
        return inputs | self._joined()

    def _joined(self) -> dict[str, Tensor]:
        """Join the negative conditions with the others, as the rows of a call need them."""
        if not self.guided:
            return dict(self.own)
        join = self.device.concatenate
        return {name: join([self.negative[name], tensor]) for name, tensor in self.own.items()}

    def guide(self, prediction: Tensor, channels: int) -> Tensor:
        """Combine the two halves of a prediction, [2 * batch, ...].

        Only the first `channels` channels are guided. The others hold a predicted variance and come from the own half.
        """
        if not self.guided:
            return prediction
        batch = len(prediction) // 2
        negative, own = prediction[:batch], prediction[batch:]
        guided = negative + float(self.scale) * (own - negative)  # a numpy float would widen float32
        if own.shape[1] > channels:
            guided[:, channels:] = own[:, channels:]
        return guided

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of one row of every input."""
        return {name: array.shape[1:] for name, array in self.to_arrays().items()}

    def sha256(self) -> str:
        """Hash everything that determines a guided prediction."""
        digest = hashlib.sha256(repr(self.scale).encode())
        for name, array in sorted(self.to_arrays().items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        if self.control is not None:
            digest.update(repr(self.control.measured).encode())
        return digest.hexdigest()

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Merge own and negative conditions into one mapping."""
        return {**self.own, **{f"{NEGATIVE}{name}": array for name, array in self.negative.items()}}

    @classmethod
    def from_arrays(cls, arrays: Values, scale: float, controlnet: tuple[ControlNetInput, ...] = ()) -> Conditions:
        """Split a mapping made by `to_arrays` into own and negative conditions."""
        return cls(
            own={name: array for name, array in arrays.items() if not name.startswith(NEGATIVE)},
            negative={
                name.removeprefix(NEGATIVE): array for name, array in arrays.items() if name.startswith(NEGATIVE)
            },
            scale=scale,
            controlnet=controlnet,
        )


UNCONDITIONAL = Conditions()
"""No conditions: the denoiser receives only noise and timestep."""

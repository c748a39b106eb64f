"""Conditions of samples, such as encoded prompts, and classifier-free guidance.

A guided denoiser call has twice the batch: first every sample with its negative conditions, then every sample with its
own. The result is negative + scale * (own - negative). Models that edit images have a third set of conditions between
these two: the image without the text. Their calls have three times the batch, and the result is negative + scale *
(own - middle) + middle_scale * (middle - negative). Engines do not know about guidance.

Source:
    Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598, equation 6.
    Brooks, Holynski and Efros 2022, "InstructPix2Pix", arXiv:2211.09800, equation 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import real_number, whole_number
from .call import SIZE_NUMBERS, TIME_IDS
from .controlnet import Control, ControlNetInput, zeros
from .device import HOST, Device, Tensor
from .errors import SessionError, ShapeMismatch

Values = Mapping[str, Tensor]
"""Values by denoiser input, one row per sample, [batch, ...]; arrays until they are put on a device."""

NEGATIVE, MIDDLE = "negative.", "middle."
"""Prefixes for the names of these conditions in a mapping that holds all kinds."""

_OWN_SIZE, _TARGET_SIZE = slice(0, 2), slice(4, 6)
"""Columns of SDXL's `time_ids` for the original and the target size, each as height and width."""

_LARGEST_SCALE = 1000


def read_scale(value: object) -> float:
    """Read a guidance scale, which may be a number of numpy or torch; refuse one that nobody means.

    Negative numbers compare as no guidance, and infinity makes NaN of a sample.

    Raises:
        SessionError: If it is no number, or out of range.
    """
    scale = real_number("a guidance scale", value)
    if not 0 <= scale < _LARGEST_SCALE:
        raise SessionError(
            f"a guidance scale lies in [0, {_LARGEST_SCALE}), and 0 to 1 turns guidance off; got {scale:g}."
        )
    return scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The conditions of a batch; without conditions, the denoiser receives only noise and timestep.

    Raises:
        ShapeMismatch: If inputs differ in their number of rows, if negative or middle conditions have other names or
            shapes, or if there are middle conditions without negative ones.
        SessionError: If a guidance scale is no number, or out of range.
    """

    own: Values = field(default_factory=dict)
    negative: Values = field(default_factory=dict)
    """Conditions from which guidance moves the samples away; empty without guidance."""
    scale: float = 1.0
    """Guidance scale, dimensionless; without negative conditions it is not applied."""
    middle: Values = field(default_factory=dict)
    """Conditions between negative and own, for models that edit images: the image without the text."""
    middle_scale: float = 1.0
    """Guidance scale from the negative to the middle conditions, dimensionless; not applied without them."""
    size: tuple[int, int] | None = None
    """Height and width of the images in pixels, if `time_ids` must follow the size of each request; None if not."""
    notes: tuple[str, ...] = ()
    """Warnings for the user, such as the words of a prompt that were cut."""
    controlnet: tuple[ControlNetInput, ...] = ()
    """ControlNet inputs of the denoiser; zero unless `own` has values for them, or `control` computes them."""
    control: Control | None = None
    """Control images of the samples, one per row; None without."""
    device: Device = HOST
    """Device of the conditions and of the calls made with them."""

    def __post_init__(self) -> None:
        """Check that all inputs have the same rows; guidance scales are in range, and become plain floats."""
        for name in ("scale", "middle_scale"):  # a float of numpy would widen float32 and give another hash
            object.__setattr__(self, name, read_scale(getattr(self, name)))
        if len({len(array) for array in self.own.values()}) > 1:
            rows = {name: len(array) for name, array in self.own.items()}
            raise ShapeMismatch(f"conditions have different numbers of rows: {rows}. Expected one row per sample.")
        wanted = {name: array.shape for name, array in self.own.items()}
        for kind, side in (("negative", self.negative), ("middle", self.middle)):
            got = {name: array.shape for name, array in side.items()}
            if got and wanted != got:
                raise ShapeMismatch(
                    f"{kind} conditions have the shapes {got}. Expected the same shapes as the conditions: {wanted}."
                )
        if self.middle and not self.negative:
            raise ShapeMismatch("there are middle conditions, but no negative ones. Give both, or neither.")

    @property
    def guided(self) -> bool:
        """Whether every call has a multiple of the batch."""
        return bool(self.negative)

    @property
    def paired(self) -> bool:
        """Whether the rows of a call are pairs: every sample with its negative conditions, and with its own."""
        return self.rows_per_sample == 2

    @property
    def sets(self) -> tuple[Values, ...]:
        """The sets of conditions in a call, from the first rows to the last: negative, middle, own."""
        return (*(side for side in (self.negative, self.middle) if side), self.own)

    @property
    def rows_per_sample(self) -> int:
        """Rows of a denoiser call for each sample: 1, 2 with guidance, 3 if it has middle conditions."""
        return 1 + bool(self.negative) + bool(self.middle)

    @property
    def rows(self) -> int | None:
        """Number of rows; None without conditions, which fit any batch."""
        return next((len(array) for array in self.own.values()), None)

    def take(self, rows: Sequence[int]) -> Conditions:
        """Select rows by index, modulo their number; an index may occur more than once."""
        control = None if self.control is None else self.control.take(rows)
        return replace(self._each(lambda array: array[np.asarray(rows) % len(array)]), control=control)

    def on(self, device: Device) -> Conditions:
        """Move all conditions to a device."""
        return replace(self._each(device.put), device=device)

    def for_size(self, height: int, width: int) -> Conditions:
        """Adapt SDXL's `time_ids` to images of another size, as the pipelines of diffusers do by default.

        Conditions without a `size` were made for a size that the user has chosen. They stay as they are.

        Args:
            height: Height of the images in pixels.
            width: Width of the images in pixels.
        """
        if self.size is None or self.size == (height, width):
            return self

        def follow(times: NDArray[Any]) -> None:
            for columns in (_OWN_SIZE, _TARGET_SIZE) if times.shape[1] == SIZE_NUMBERS else (_OWN_SIZE,):
                times[:, columns] = height, width

        return replace(self._with_times(follow), size=(height, width))

    def with_sizes(
        self, original: tuple[int, int], crop: tuple[int, int] = (0, 0), target: tuple[int, int] | None = None
    ) -> Conditions:
        """Set SDXL's `time_ids`; they no longer follow the size of the images.

        Args:
            original: Original height and width in pixels.
            crop: Top and left of the crop in pixels.
            target: Target height and width in pixels; the original ones when not given. SDXL's refiner has none.

        Raises:
            SessionError: If one is not two whole numbers.
        """
        numbers = [number for pair in (original, crop, target or original) for number in _pair(pair)]

        def choose(times: NDArray[Any]) -> None:
            times[:, :4] = numbers[:4]
            if times.shape[1] == SIZE_NUMBERS:
                times[:, _TARGET_SIZE] = numbers[4:]

        return replace(self._with_times(choose), size=None)

    def _with_times(self, change: Callable[[NDArray[Any]], None]) -> Conditions:
        """Change a copy of SDXL's `time_ids` in all kinds of conditions that have them."""

        def changed(values: Values) -> Values:
            if TIME_IDS not in values:
                return values
            change(times := np.array(values[TIME_IDS]))
            return {**values, TIME_IDS: times}

        return replace(self, own=changed(self.own), negative=changed(self.negative), middle=changed(self.middle))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """Change every value."""

        def changed(values: Values) -> Values:
            return {name: change(value) for name, value in values.items()}

        return replace(self, own=changed(self.own), negative=changed(self.negative), middle=changed(self.middle))

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
            copies = self.rows_per_sample
            inputs = {name: self.device.concatenate([tensor] * copies) for name, tensor in inputs.items()}
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
        return {name: join([values[name] for values in self.sets]) for name in self.own}

    def guide(self, prediction: Tensor, channels: int) -> Tensor:
        """Combine the parts of a prediction, [rows_per_sample * batch, ...].

        Only the first `channels` channels are guided. The others hold a predicted variance and come from the own part.
        """
        if not self.guided:
            return prediction
        batch = len(prediction) // self.rows_per_sample
        negative, own = prediction[:batch], prediction[-batch:]
        if self.middle:
            middle = prediction[batch:-batch]
            guided = negative + self.scale * (own - middle) + self.middle_scale * (middle - negative)
        else:
            guided = negative + self.scale * (own - negative)
        if own.shape[1] > channels:
            guided[:, channels:] = own[:, channels:]
        return guided

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of one row of every input."""
        return {name: array.shape[1:] for name, array in self.to_arrays().items()}

    def sha256(self) -> str:
        """Hash everything that determines a guided prediction."""
        scales = self.scale if not self.middle else (self.scale, self.middle_scale)
        digest = hashlib.sha256(repr(scales).encode())
        for name, array in sorted(self.to_arrays().items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        if self.control is not None:
            digest.update(repr(self.control.measured).encode())
        return digest.hexdigest()

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Merge all kinds of conditions into one mapping."""
        sides = (("", self.own), (NEGATIVE, self.negative), (MIDDLE, self.middle))
        return {f"{prefix}{name}": array for prefix, side in sides for name, array in side.items()}

    @classmethod
    def from_arrays(
        cls,
        arrays: Values,
        scale: float,
        controlnet: tuple[ControlNetInput, ...] = (),
        *,
        middle_scale: float = 1.0,
        size: tuple[int, int] | None = None,
    ) -> Conditions:
        """Split a mapping made by `to_arrays` into its kinds."""

        def side(prefix: str) -> Values:
            return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

        own = {name: value for name, value in arrays.items() if not name.startswith((NEGATIVE, MIDDLE))}
        return cls(
            own=own,
            negative=side(NEGATIVE),
            scale=scale,
            middle=side(MIDDLE),
            middle_scale=middle_scale,
            size=size if TIME_IDS in own else None,
            controlnet=controlnet,
        )


UNCONDITIONAL = Conditions()
"""No conditions: the denoiser receives only noise and timestep."""


def _pair(values: Any) -> list[int]:
    """Read a size or a place of a crop."""
    pair = [whole_number("a size or a crop", value) for value in values]
    if len(pair) != 2:
        raise SessionError(f"a size or a crop is {values!r}. Expected two whole numbers.")
    return pair

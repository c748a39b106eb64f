"""ControlNet inputs of a UNet: one tensor for every skip connection and one for the middle block.

A graph captured for a ControlNet has an input for each of these tensors. They are zero when no ControlNet is used. The
input names follow StreamDiffusion.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .device import Array, Device, Tensor

if TYPE_CHECKING:
    from .artifacts.profile import ControlMeasured

PREFIX = "input_control_"
"""Prefix for the names of all ControlNet inputs."""
MIDDLE = f"{PREFIX}middle"
"""Name of the ControlNet input for the middle block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlNetInput:
    """One ControlNet input, [batch, channel, height, width]."""

    name: str
    channels: int
    halvings: int
    """Number of times that the height and width of the sample are halved, rounded up."""

    def shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Compute its shape for a batch of samples of this size."""
        stride = 2**self.halvings
        return batch, self.channels, -(-height // stride), -(-width // stride)


def controlnet_inputs(config: Mapping[str, Any]) -> tuple[ControlNetInput, ...]:
    """List the ControlNet inputs of a UNet2DConditionModel in the order of its arguments, the middle block last.

    Args:
        config: Configuration of the UNet.

    Source:
        diffusers 0.42.1, models/controlnets/controlnet.py, `ControlNetModel.__init__`.
    """
    widths = config["block_out_channels"]
    layers = config["layers_per_block"]
    places = [(widths[0], 0)]
    for level, width in enumerate(widths):
        places += [(width, level)] * (layers if isinstance(layers, int) else layers[level])
        if level + 1 < len(widths):
            places.append((width, level + 1))
    names = [*(f"{PREFIX}{i:02d}" for i in range(len(places))), MIDDLE]
    places.append((widths[-1], len(widths) - 1))
    return tuple(
        ControlNetInput(name=name, channels=channels, halvings=halvings)
        for name, (channels, halvings) in zip(names, places, strict=True)
    )


def spread(residual: Any, shape: tuple[int, ...]) -> Any:
    """Repeat a residual that its ControlNet has pooled over the height and width of its input; pass others on.

    Args:
        residual: Array or torch tensor; [batch, channel, 1, 1] if it is pooled (`global_pool_conditions`).
        shape: Shape of the input, [batch, channel, height, width].
    """
    if tuple(getattr(residual, "shape", ())) != (*shape[:2], 1, 1):
        return residual
    if isinstance(residual, np.ndarray):
        return np.ascontiguousarray(np.broadcast_to(residual, shape))
    return residual.expand(shape).contiguous()


class Control(Protocol):
    """Control images, from which a ControlNet computes the ControlNet inputs of every call."""

    @property
    def measured(self) -> ControlMeasured:
        """The ControlNet and the images, as artifacts record them."""

    def take(self, rows: Sequence[int]) -> Control:
        """Select an image for each row by index, modulo their number."""

    def residuals(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, Array]:
        """Compute the ControlNet inputs of a call from its sample, timestep and conditions."""


@functools.lru_cache(maxsize=4)
def zeros(
    controlnet: tuple[ControlNetInput, ...], batch: int, height: int, width: int, device: Device
) -> Mapping[str, Tensor]:
    """Create zeros for all ControlNet inputs, once per size."""
    return {one.name: device.full(one.shape(batch, height, width), 0.0) for one in controlnet}

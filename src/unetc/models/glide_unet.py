"""GLIDE's UNets as diffusers modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from unetc.errors import ModelError


class SuperResolutionUNet(UNet2DConditionModel):  # type: ignore[misc]
    """A UNet that reads the noisy image and an enlarged low-resolution image; each takes half of the input channels."""

    def forward(self, sample: Tensor, timestep: Tensor, *, low_res: Tensor, **others: Any) -> Any:
        """Call the UNet with both images concatenated along the channels."""
        return super().forward(torch.cat([sample, low_res], dim=1), timestep, **others)


KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in (SuperResolutionUNet, UNet2DConditionModel)}


def load_unet(kind: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """Create a UNet from converted weights.

    Args:
        kind: Class of the UNet, a key of `KINDS`.
        config: Configuration of the UNet.
        weights: Weights under the names of diffusers.

    Returns:
        The UNet in float32 and in evaluation mode.

    Raises:
        ModelError: If the weights do not fit the configuration.
    """
    unet: nn.Module = KINDS[kind](**config)
    try:
        unet.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ModelError(f"the checkpoint does not fit: {' '.join(str(error).split())[:300]}.") from error
    return unet.float().eval().requires_grad_(False)

"""GLIDE's UNets as modules of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from unetc.errors import ModelError


class SuperResolutionUNet(UNet2DConditionModel):  # type: ignore[misc]
    """A UNet that sees a low-resolution image, already enlarged, beside the noisy one: half of its channels."""

    def forward(self, sample: Tensor, timestep: Tensor, *, low_res: Tensor, **others: Any) -> Any:
        """Call the UNet."""
        return super().forward(torch.cat([sample, low_res], dim=1), timestep, **others)


KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in (SuperResolutionUNet, UNet2DConditionModel)}


def load_unet(kind: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """Make a UNet of converted weights.

    Args:
        kind: A key of `KINDS`.
        config: Its configuration.
        weights: By the names of diffusers.

    Raises:
        ModelError: If the weights do not fit.
    """
    unet: nn.Module = KINDS[kind](**config)
    try:
        unet.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ModelError(f"the checkpoint does not fit: {' '.join(str(error).split())[:300]}.") from error
    return unet.float().eval().requires_grad_(False)

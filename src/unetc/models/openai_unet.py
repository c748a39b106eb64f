"""OpenAI's UNets as diffusers modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from torch import Tensor, nn

from unetc.errors import ModelError, brief


def load_unet(kind: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """Create a UNet from converted weights.

    Args:
        kind: Class of the UNet in diffusers.
        config: Configuration of the UNet.
        weights: Weights under the names of diffusers.

    Returns:
        The UNet in float32 and in evaluation mode.

    Raises:
        ModelError: If the weights do not fit the configuration.
    """
    unet: nn.Module = getattr(diffusers, kind)(**config)
    try:
        unet.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ModelError(f"the checkpoint does not fit: {brief(error)}.") from error
    return unet.float().eval().requires_grad_(False)

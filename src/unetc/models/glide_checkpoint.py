"""Conversion of OpenAI's text-conditional UNet checkpoints to weights of diffusers' `UNet2DConditionModel`.

Both are the same network, with different weight names. The only structural difference is that OpenAI projects the
query, key and value of each head in turn with one matrix. The configuration of the UNet determines the place of every
block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .glide_text import PARTS
from .openai_checkpoint import OUTER, Move, places, split_by_head


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The two parts of a checkpoint."""

    unet: Mapping[str, Tensor]
    """Weights of the UNet, under the names of diffusers."""
    text: Mapping[str, Tensor]
    """Weights of the text transformer, under OpenAI's names."""


def convert(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Checkpoint:
    """Convert the weights of a checkpoint to the names and layout of diffusers.

    Args:
        weights: A checkpoint of OpenAI.
        config: Configuration of the `UNet2DConditionModel`.

    Raises:
        ModelError: If a weight is missing, or has no place in the UNet.
    """
    text = {name: value for name, value in weights.items() if name.split(".")[0] in PARTS}
    move = Move({name: value for name, value in weights.items() if name not in text})
    for source, target in OUTER.items():
        move.layer(source, target)
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    residuals, attentions, resamplers = places(attends, config["layers_per_block"])
    for source, target in (*residuals, *resamplers):
        move.residual(source, target)
    width = config["attention_head_dim"]
    for source, target in attentions:
        move.layer(f"{source}.norm", f"{target}.group_norm")
        for own, others in (
            ("proj_out", ("to_out.0",)),
            ("qkv", ("to_q", "to_k", "to_v")),
            ("encoder_kv", ("add_k_proj", "add_v_proj")),
        ):
            for kind, value in move.take(f"{source}.{own}"):
                for other, part in zip(others, split_by_head(value, len(others), width), strict=True):
                    move.moved[f"{target}.{other}.{kind}"] = part
    return Checkpoint(unet=move.finish(), text=text)

"""Conversion of OpenAI's text-conditional UNet checkpoints to weights of diffusers' `UNet2DConditionModel`.

Both are the same network, with different weight names. The only structural difference is that OpenAI projects the
query, key and value of each head in turn with one matrix. The configuration of the UNet determines the place of every
block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from unetc.errors import ModelError

from .glide_text import PARTS

_OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
_SHORTCUT = "skip_connection"
"""Exists only in blocks that change the number of channels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The two parts of a checkpoint."""

    unet: Mapping[str, Tensor]
    """Weights of the UNet, under the names of diffusers."""
    text: Mapping[str, Tensor]
    """Weights of the text transformer, under OpenAI's names."""


def read(path: Path) -> Mapping[str, Tensor]:
    """Read a checkpoint without executing any code in it.

    Raises:
        ModelError: If the file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many unrelated classes
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"cannot read weights from {path}: {reason}. Expected .pt or .safetensors.") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ModelError(f"{path} is not a state dict. Expected a mapping of names to tensors.")
    return weights


def convert(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> Checkpoint:
    """Convert the weights of a checkpoint to the names and layout of diffusers.

    Args:
        weights: A checkpoint of OpenAI.
        config: Configuration of the `UNet2DConditionModel`.

    Raises:
        ModelError: If a weight is missing, or has no place in the UNet.
    """
    remaining = dict(weights)
    text = {name: remaining.pop(name) for name in weights if name.split(".")[0] in PARTS}
    unet: dict[str, Tensor] = {}

    def take(source: str) -> Iterator[tuple[str, Tensor]]:
        for kind in ("weight", "bias"):
            if (name := f"{source}.{kind}") not in remaining:
                raise ModelError(f"the checkpoint has no {name}. Check that it belongs to this model.")
            yield kind, remaining.pop(name)

    def move(source: str, target: str) -> None:
        unet.update({f"{target}.{kind}": value for kind, value in take(source)})

    for source, target in _OUTER.items():
        move(source, target)
    residuals, attentions = _blocks(config)
    for source, target in residuals:
        for own, other in _RESIDUAL.items():
            move(f"{source}.{own}", f"{target}.{other}")
        if f"{source}.{_SHORTCUT}.weight" in remaining:
            move(f"{source}.{_SHORTCUT}", f"{target}.conv_shortcut")
    width = config["attention_head_dim"]
    for source, target in attentions:
        move(f"{source}.norm", f"{target}.group_norm")
        for own, others in (
            ("proj_out", ("to_out.0",)),
            ("qkv", ("to_q", "to_k", "to_v")),
            ("encoder_kv", ("add_k_proj", "add_v_proj")),
        ):
            for kind, value in take(f"{source}.{own}"):
                for other, part in zip(others, _apart(value, len(others), width), strict=True):
                    unet[f"{target}.{other}.{kind}"] = part
    if remaining:
        raise ModelError(
            f"the checkpoint has {min(remaining)}, which has no place in this model. Check the model's name."
        )
    return Checkpoint(unet=unet, text=text)


def _apart(value: Tensor, parts: int, width: int) -> tuple[Tensor, ...]:
    """Split a joint projection into its parts, each over all heads; a convolution of width 1 counts as a matrix."""
    rest = value.shape[1:2]
    heads = value.reshape(-1, parts, width, *rest)
    return tuple(part.reshape(-1, *rest) for part in heads.unbind(1))


def _blocks(config: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """List the residual blocks and the attentions, each with its OpenAI and its diffusers name."""
    attends = ["CrossAttn" in kind for kind in config["down_block_types"]]
    blocks, bottom = config["layers_per_block"], len(attends) - 1
    residuals = [("middle_block.0", "mid_block.resnets.0"), ("middle_block.2", "mid_block.resnets.1")]
    attentions = [("middle_block.1", "mid_block.attentions.0")]
    position = 1  # position 0 is a convolution
    for level, attending in enumerate(attends):
        for block in range(blocks):
            residuals.append((f"input_blocks.{position}.0", f"down_blocks.{level}.resnets.{block}"))
            if attending:
                attentions.append((f"input_blocks.{position}.1", f"down_blocks.{level}.attentions.{block}"))
            position += 1
        if level < bottom:
            residuals.append((f"input_blocks.{position}.0", f"down_blocks.{level}.downsamplers.0"))
            position += 1
    position = 0
    for level, attending in enumerate(reversed(attends)):
        for block in range(blocks + 1):
            residuals.append((f"output_blocks.{position}.0", f"up_blocks.{level}.resnets.{block}"))
            if attending:
                attentions.append((f"output_blocks.{position}.1", f"up_blocks.{level}.attentions.{block}"))
            position += 1
        if level < bottom:
            last = f"output_blocks.{position - 1}.{2 if attending else 1}"
            residuals.append((last, f"up_blocks.{level}.upsamplers.0"))
    return residuals, attentions

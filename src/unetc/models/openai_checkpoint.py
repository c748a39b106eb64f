"""What all checkpoints of OpenAI's UNets have in common: the names of their weights, and the place of every block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from unetc.errors import ModelError

OUTER = {
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

Names = Sequence[tuple[str, str]]
"""Layers, each with its OpenAI and its diffusers name."""


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


class Move:
    """Moves weights to their names in diffusers, each once."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._left = dict(weights)
        self.moved: dict[str, Tensor] = {}
        """Weights under the names of diffusers."""

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, source: str) -> Iterator[tuple[str, Tensor]]:
        """Take the weight and the bias of a layer.

        Raises:
            ModelError: If one is missing.
        """
        for kind in ("weight", "bias"):
            yield kind, self.take_one(f"{source}.{kind}")

    def take_one(self, name: str) -> Tensor:
        """Take one weight.

        Raises:
            ModelError: If it is missing.
        """
        if name not in self._left:
            raise ModelError(f"the checkpoint has no {name}. Check that it belongs to this model.")
        return self._left.pop(name)

    def layer(self, source: str, target: str) -> None:
        """Move the weight and the bias of a layer."""
        self.moved.update({f"{target}.{kind}": value for kind, value in self.take(source)})

    def residual(self, source: str, target: str) -> None:
        """Move the layers of a residual block."""
        for own, other in _RESIDUAL.items():
            self.layer(f"{source}.{own}", f"{target}.{other}")
        if f"{source}.{_SHORTCUT}.weight" in self:
            self.layer(f"{source}.{_SHORTCUT}", f"{target}.conv_shortcut")

    def finish(self) -> Mapping[str, Tensor]:
        """Return the moved weights.

        Raises:
            ModelError: If a weight was not taken.
        """
        if self._left:
            raise ModelError(
                f"the checkpoint has {min(self._left)}, which has no place in this model. Check the model's name."
            )
        return self.moved


def places(attends: Sequence[bool], blocks: int) -> tuple[Names, Names, Names]:
    """List the residual blocks, the attentions and the resampling layers.

    Args:
        attends: Whether each level has attention, from the highest resolution to the lowest.
        blocks: Residual blocks per level of the encoder.
    """
    bottom = len(attends) - 1
    residuals = [("middle_block.0", "mid_block.resnets.0"), ("middle_block.2", "mid_block.resnets.1")]
    attentions = [("middle_block.1", "mid_block.attentions.0")]
    resamplers = []
    position = 1  # position 0 is a convolution
    for level, attending in enumerate(attends):
        for block in range(blocks):
            residuals.append((f"input_blocks.{position}.0", f"down_blocks.{level}.resnets.{block}"))
            if attending:
                attentions.append((f"input_blocks.{position}.1", f"down_blocks.{level}.attentions.{block}"))
            position += 1
        if level < bottom:
            resamplers.append((f"input_blocks.{position}.0", f"down_blocks.{level}.downsamplers.0"))
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
            resamplers.append((last, f"up_blocks.{level}.upsamplers.0"))
    return residuals, attentions, resamplers


def split_by_head(value: Tensor, parts: int, width: int) -> tuple[Tensor, ...]:
    """Split a joint projection that is ordered by head into its parts, each over all heads.

    Args:
        value: Weight or bias, [head * part * channel of a head, ...]; a convolution of width 1 counts as a matrix.
        parts: Number of parts: query, key and value are three.
        width: Channels of a head.
    """
    rest = value.shape[1:2]
    heads = value.reshape(-1, parts, width, *rest)
    return tuple(part.reshape(-1, *rest) for part in heads.unbind(1))


def split_by_part(value: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split a joint projection that is ordered by part: all queries, all keys, all values."""
    return value.reshape(*value.shape[:2]).chunk(parts)

"""Conversion of the checkpoints of guided-diffusion and its relatives to diffusers' `UNet2DModel`.

Both are the same network. Widths, levels, attentions, classes and the kinds of norms and resampling are read off the
weights. The number of heads and the order of the joint projection leave no trace in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from unetc.errors import ModelError

from .openai_checkpoint import OUTER, Move, places, split_by_head, split_by_part

KIND = "UNet2DModel"
_GROUPS = 32
"""Groups of every norm."""
_LABELS = "label_emb.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads of every attention: a number of them, or the channels of each."""

    number: int | None = None
    channels: int | None = None
    by_part: bool = False
    """Whether the joint projections hold all queries, then all keys and all values; otherwise head after head."""

    def width(self, channels: int) -> int:
        """Return the channels of a head in an attention over so many channels.

        Raises:
            ModelError: If they cannot be divided.
        """
        divisor = self.channels or self.number
        assert divisor is not None
        if channels % divisor:
            what = f"heads of {self.channels} channels" if self.channels else f"{self.number} heads"
            raise ModelError(f"an attention of {channels} channels cannot have {what}. Check the options of the model.")
        return self.channels or channels // divisor


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What the weights of a checkpoint say about their network."""

    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    """Channels of each level, from the highest resolution to the lowest."""
    attends: tuple[bool, ...]
    """Whether each level has attention."""
    blocks: int
    """Residual blocks per level of the encoder."""
    classes: int | None
    scale_shift: bool
    """Whether the time scales and shifts a norm, or is added."""
    residual_resampling: bool
    """Whether residual blocks resample, or plain convolutions."""

    @property
    def learns_variance(self) -> bool:
        """Whether the prediction has a second half for the variance."""
        return self.out_channels == 2 * self.in_channels

    def config(self, size: int, heads: Heads) -> dict[str, Any]:
        """Describe the network by a configuration of `UNet2DModel`.

        The configuration cannot express a number of heads other than one; `fit` does.

        Args:
            size: Height and width in pixels.
            heads: The heads of every attention.
        """
        plain = "Resnet{}sampleBlock2D" if self.residual_resampling else "{}Block2D"
        kinds = ["Attn{}Block2D" if own else plain for own in self.attends]
        resample = "resnet" if self.residual_resampling else "conv"
        return {
            "sample_size": size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.widths,
            "layers_per_block": self.blocks,
            "down_block_types": tuple(kind.format("Down") for kind in kinds),
            "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
            "downsample_type": resample,
            "upsample_type": resample,
            "attention_head_dim": heads.channels,
            "norm_num_groups": _GROUPS,
            "attn_norm_num_groups": _GROUPS,
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
            "num_class_embeds": self.classes,
        }


def read_network(weights: Mapping[str, Tensor]) -> Network:
    """Read the form of a network off its weights.

    Raises:
        ModelError: If they belong to another network, or to a form that `UNet2DModel` does not have.
    """
    time, last = _shape(weights, "time_embed.0.weight"), _shape(weights, "out.2.weight")
    first = _shape(weights, "input_blocks.0.0.weight")
    _shape(weights, "middle_block.1.qkv.weight")
    blocks, levels = _levels(weights)
    starts = [1 + level * (blocks + 1) for level in range(levels)]
    inputs = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("input_blocks.")), default=0)
    if inputs != levels * (blocks + 1):
        raise ModelError(
            f"the checkpoint has {inputs} input blocks and {levels} levels of {blocks} residual blocks, which need "
            f"{levels * (blocks + 1)}. Expected as many residual blocks on every level."
        )
    widths = tuple(_shape(weights, f"input_blocks.{start}.0.out_layers.3.weight")[0] for start in starts)
    if time[1] != widths[0]:
        raise ModelError(
            f"the checkpoint has a first level of {widths[0]} channels and embeds the time in {time[1]}. {KIND} has "
            "one number for both, so this network cannot be converted."
        )
    network = Network(
        in_channels=first[1],
        out_channels=last[0],
        widths=widths,
        attends=tuple(f"input_blocks.{start}.1.qkv.weight" in weights for start in starts),
        blocks=blocks,
        classes=_shape(weights, _LABELS)[0] if _LABELS in weights else None,
        scale_shift=_shape(weights, "input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0],
        residual_resampling=f"input_blocks.{blocks + 1}.0.in_layers.2.weight" in weights,
    )
    if network.out_channels not in (network.in_channels, 2 * network.in_channels):
        raise ModelError(
            f"the checkpoint takes {network.in_channels} channels and predicts {network.out_channels}. Expected as "
            "many, or twice as many with a learned variance; a network that enlarges images is not supported."
        )
    if any(width % _GROUPS for width in widths):
        raise ModelError(f"the checkpoint has levels of {widths} channels. Expected multiples of {_GROUPS}.")
    return network


def _levels(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Count the residual blocks per level of the encoder, and the levels.

    Only the decoder tells the levels apart: the last block of each but the lowest also has a layer that enlarges.
    """
    enlarging = {
        int(block)
        for _, block, part, layer in (name.split(".")[:4] for name in weights if name.startswith("output_blocks."))
        if part != "0" and layer in ("in_layers", "conv")
    }
    if not enlarging:
        raise ModelError(
            "the checkpoint has no output_blocks that enlarge. Expected a UNet of two levels or more, no classifier."
        )
    return min(enlarging), len(enlarging) + 1


def _shape(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in weights:
        raise ModelError(f"the checkpoint has no {name}. Expected a UNet of guided-diffusion or one of its relatives.")
    return tuple(weights[name].shape)


def convert(weights: Mapping[str, Tensor], network: Network, heads: Heads) -> Mapping[str, Tensor]:
    """Convert the weights of a checkpoint to the names and layout of `UNet2DModel`.

    Args:
        weights: A checkpoint.
        network: What was read off it.
        heads: The heads of every attention.

    Raises:
        ModelError: If a weight is missing, or has no place in the UNet.
    """
    move = Move(weights)
    for source, target in OUTER.items():
        move.layer(source, target)
    if network.classes is not None:
        move.moved["class_embedding.weight"] = move.take_one(_LABELS)
    residuals, attentions, resamplers = places(network.attends, network.blocks)
    for source, target in residuals:
        move.residual(source, target)
    for source, target in resamplers:
        if network.residual_resampling:
            move.residual(source, target)
        else:
            move.layer(f"{source}.{'op' if source.startswith('input') else 'conv'}", f"{target}.conv")
    for source, target in attentions:
        move.layer(f"{source}.norm", f"{target}.group_norm")
        for kind, value in move.take(f"{source}.proj_out"):
            move.moved[f"{target}.to_out.0.{kind}"] = value.reshape(value.shape[:2])
        for kind, value in move.take(f"{source}.qkv"):
            width = heads.width(value.shape[0] // 3)
            parts = split_by_part(value, 3) if heads.by_part else split_by_head(value, 3, width)
            for part, own in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                move.moved[f"{target}.{part}.{kind}"] = own
    return move.finish()


def fit(unet: nn.Module, heads: Heads, time_scale: float) -> nn.Module:
    """Set what no configuration of `UNet2DModel` can express: a number of heads, and the scale of the time.

    Args:
        unet: The UNet, changed in place.
        heads: The heads of every attention.
        time_scale: Factor between the timesteps of the scheduler and those of the network.
    """
    for module in unet.modules():
        if isinstance(module, Attention):
            module.heads = module.inner_dim // heads.width(module.inner_dim)
        elif isinstance(module, Timesteps):
            module.scale = time_scale
    return unet

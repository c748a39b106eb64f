"""The autoencoders that unetc decodes with, and the keys of their configurations.

A key is listed if the decoder obeys it when it is built from the configuration, or if `Latents` does. Every other key
is refused by name, because it could change the image unnoticed.

Source:
    The end of `__call__` in StableDiffusionPipeline and StableDiffusionXLPipeline of diffusers 0.42.1. The first
    divides latents by `scaling_factor` and reads no other number. The second also reads `latents_mean` and
    `latents_std`, if both are given. Neither reads `shift_factor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from unetc.errors import ModelError

CHANNELS = 3
"""Channels of an image."""

_COMMON = frozenset(
    {"in_channels", "out_channels", "act_fn", "latent_channels", "scaling_factor", "shift_factor", "force_upcast"}
)
_KL = _COMMON | {
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "sample_size",
    "latents_mean",
    "latents_std",
    "use_quant_conv",
    "use_post_quant_conv",
    "mid_block_add_attention",
}
_TINY = _COMMON | {
    "encoder_block_out_channels",
    "decoder_block_out_channels",
    "block_out_channels",
    "upsample_fn",
    "upsampling_scaling_factor",
    "num_encoder_blocks",
    "num_decoder_blocks",
    "latent_magnitude",
    "latent_shift",
}

AUTOENCODERS: Mapping[str, frozenset[str]] = MappingProxyType({"AutoencoderKL": _KL, "AutoencoderTiny": _TINY})
"""The keys of each class that are known."""

_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "AsymmetricAutoencoderKL": "its decoder also takes the masked image",
        "ConsistencyDecoderVAE": "its decoder is a diffusion model, which samples",
        "VQModel": "it decodes tokens of a codebook",
    }
)
"""Classes that a user may expect to work, each with the reason why it does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latents:
    """How a pipeline turns latents into the input of its decoder: latents * std / scaling_factor + mean."""

    channels: int
    pixels: int
    """Image pixels per latent pixel, along each side."""
    scaling_factor: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """One number per channel; both are None for a pipeline that does not read them."""


def read_vae(name: str, kind: str, config: Mapping[str, Any], *, statistics: bool) -> Latents:
    """Check the class and the configuration of an autoencoder.

    Args:
        name: Name of the model, for messages.
        kind: Class of the autoencoder.
        config: Its configuration, as in its folder.
        statistics: Whether the pipeline reads `latents_mean` and `latents_std`.

    Raises:
        ModelError: If unetc does not run its decoder, or does not know a key.
    """
    if kind not in AUTOENCODERS:
        reason = f": {_REFUSED[kind]}" if kind in _REFUSED else ""
        raise ModelError(f"{name} has a {kind} as its vae{reason}. Supported: {', '.join(AUTOENCODERS)}.")
    if unknown := sorted(key for key in config if not key.startswith("_") and key not in AUTOENCODERS[kind]):
        raise ModelError(
            f"the vae of {name} has {unknown[0]!r}, a setting that unetc does not know in a {kind}. Remove it from "
            "vae/config.json if it changes nothing."
        )
    if (colours := config.get("out_channels", CHANNELS)) != CHANNELS:
        raise ModelError(f"the vae of {name} makes images of {colours} channels. Expected {CHANNELS}.")
    levels = "block_out_channels" if kind == "AutoencoderKL" else "decoder_block_out_channels"
    widths = config.get(levels, (64,) if kind == "AutoencoderKL" else (64,) * 4)
    if not isinstance(widths, list | tuple) or not widths:
        raise ModelError(f"the vae of {name} has {levels} {widths!r}. Expected the widths of its levels.")
    if (factor := config.get("upsampling_scaling_factor", 2)) != 2:
        raise ModelError(
            f"the vae of {name} has upsampling_scaling_factor {factor!r}. Expected 2, as its pipeline computes the "
            "sizes of images with it."
        )
    channels = config.get("latent_channels", 4)
    if not isinstance(channels, int) or channels < 1:
        raise ModelError(f"the vae of {name} has latent_channels {channels!r}. Expected a whole number above 0.")
    scaling = _number(name, "scaling_factor", config.get("scaling_factor", 0.18215 if kind == "AutoencoderKL" else 1.0))
    if not scaling:
        raise ModelError(f"the vae of {name} has scaling_factor 0, by which latents are divided.")
    mean, std = (config.get(key) for key in ("latents_mean", "latents_std"))
    read = statistics and mean is not None and std is not None
    return Latents(
        channels=channels,
        pixels=2 ** (len(widths) - 1),
        scaling_factor=scaling,
        mean=_numbers(name, "latents_mean", mean, channels) if read else None,
        std=_numbers(name, "latents_std", std, channels) if read else None,
    )


def _numbers(name: str, key: str, values: object, count: int) -> tuple[float, ...]:
    if not isinstance(values, list | tuple) or len(values) != count:
        raise ModelError(f"the vae of {name} has {key} {values!r}. Expected {count} numbers, one per latent channel.")
    return tuple(_number(name, key, value) for value in values)


def _number(name: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(f"the vae of {name} has {key} {value!r}. Expected a finite number.")
    return float(value)

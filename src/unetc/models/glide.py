"""GLIDE, from OpenAI's checkpoints: the base model and the upsampler.

Each checkpoint holds a UNet and a text transformer. The UNet becomes a diffusers `UNet2DConditionModel`. The text
transformer computes the conditions once per prompt.

Source:
    Nichol et al. 2021, arXiv:2112.10741. The sizes come from the published small, filtered models.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from unetc.artifacts.profile import ModelReference
from unetc.call import EXTRA_CHANNELS, CallSignature
from unetc.conditions import Conditions
from unetc.errors import MissingDependency, ModelError

from .folder import hash_file
from .prompts import cut_note

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from .glide_checkpoint import Checkpoint
    from .images import Images

logger = logging.getLogger(__name__)

LOW_RES = "low_res.npy"
"""File next to the weights of the upsampler: one image per prompt, [prompt, 3, height, width], float32 in -1 to 1."""
_LOW_RES_ADVICE = (
    "Save samples of glide:base there, [prompt, 3, 64, 64] as floats in -1 to 1, in the order of the prompts."
)
_LARGEST_PIXEL = 1.5
"""Samples exceed 1 by a little; larger values are pixels that nobody has scaled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One of the published networks."""

    size: int
    """Height and width in pixels."""
    unet: Mapping[str, Any]
    """Configuration of the UNet."""
    denoiser: str
    """Class of the UNet in diffusers."""
    scheduler_config: Mapping[str, Any]
    text_heads: int
    guidance_scale: float
    scheduler: str
    """Default scheduler."""
    steps: int
    """Default number of steps."""


def unet_config(
    *, size: int, in_channels: int, widths: Sequence[int], attending: Sequence[bool], blocks: int, text_width: int
) -> dict[str, Any]:
    """Describe OpenAI's UNet by a diffusers configuration.

    Args:
        size: Height and width in pixels.
        in_channels: 3, or 6 if there is a low-resolution image.
        widths: Channels of each level, from the highest resolution to the lowest.
        attending: Whether each level has attention.
        blocks: Residual blocks per level of the encoder.
        text_width: Width of a token's state.

    Returns:
        Arguments of `UNet2DConditionModel`.
    """
    kinds = ["SimpleCrossAttn{}Block2D" if own else "Resnet{}sampleBlock2D" for own in attending]
    return {
        "sample_size": size,
        "in_channels": in_channels,
        "out_channels": 6,
        "block_out_channels": tuple(widths),
        "layers_per_block": blocks,
        "down_block_types": tuple(kind.format("Down") for kind in kinds),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
        "attention_head_dim": 64,
        "cross_attention_dim": text_width,
        "resnet_time_scale_shift": "scale_shift",
        "class_embed_type": "identity",
    }


_SCHEDULE: Mapping[str, Any] = {"prediction_type": "epsilon", "variance_type": "learned_range", "clip_sample": True}

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "glide:base": Variant(
            size=64,
            unet=unet_config(
                size=64,
                in_channels=3,
                widths=(192, 384, 576, 768),
                attending=(False, True, True, True),
                blocks=3,
                text_width=512,
            ),
            denoiser="UNet2DConditionModel",
            scheduler_config={**_SCHEDULE, "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "linspace"},
            text_heads=8,
            guidance_scale=3.0,
            scheduler="ddpm",
            steps=100,
        ),
        "glide:upsample": Variant(
            size=256,
            unet=unet_config(
                size=256,
                in_channels=6,
                widths=(192, 192, 384, 384, 768, 768),
                attending=(False, False, False, True, True, True),
                blocks=2,
                text_width=512,
            ),
            denoiser="UNet2DConditionModel",
            scheduler_config={**_SCHEDULE, "beta_schedule": "linear"},
            text_heads=8,
            guidance_scale=1.0,
            scheduler="ddim",
            steps=27,
        ),
    }
)
"""Variants by model name."""


@dataclass(frozen=True, kw_only=True)
class GlideModel:
    """An OpenAI checkpoint, read only when needed."""

    reference: ModelReference
    variant: Variant
    weights: Path

    decoder_scale = 1

    @property
    def denoiser_config(self) -> dict[str, Any]:
        """Configuration of the UNet, in the form that diffusers reads."""
        return dict(self.variant.unet)

    @property
    def calls(self) -> CallSignature:
        """The calls of the UNet; the upsampler gets the low-resolution image as extra channels."""
        return CallSignature.of(self.variant.denoiser, self.denoiser_config, channels=self.sample_shape[0])

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Configuration of a diffusers scheduler."""
        return dict(self.variant.scheduler_config)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[channel, height, width]."""
        return 3, self.variant.size, self.variant.size

    @property
    def guidance_scale(self) -> float:
        """Default scale of classifier-free guidance."""
        return self.variant.guidance_scale

    def prompts(self) -> tuple[str, ...]:
        """Read the prompts used to measure the model."""
        from .prompts import PROMPTS, read_prompts

        own = self.weights.with_name(PROMPTS)
        return read_prompts(own if own.is_file() else Path(__file__).parent / PROMPTS)

    def encode(self, prompts: Sequence[str], guidance_scale: float, *, images: Images | None = None) -> Conditions:
        """Turn prompts into conditions.

        Args:
            prompts: One prompt per row.
            guidance_scale: Scale of classifier-free guidance; 1 or less means no guidance.
            images: Must not name a folder: low-resolution images are next to the weights.

        Raises:
            ModelError: If the checkpoint cannot be used, the upsampler has too few low-resolution images, or a folder
                of images is given.
            MissingDependency: If OpenAI's tokenizer is not installed.
        """
        import torch

        from .glide_text import text_transformer

        if images is not None and images.folder is not None:
            raise ModelError(f"{self.reference.name} takes no folder of images. Its images are in {LOW_RES}.")

        model = text_transformer(self._read().text, self.variant.text_heads)
        length = len(model.positional_embedding)

        @torch.no_grad()
        def conditions(texts: Sequence[str]) -> dict[str, NDArray[Any]]:
            states, summary = model(*tokenize(texts, length))
            return {"encoder_hidden_states": states.numpy(), "class_labels": summary.numpy(), **low_res}

        low_res = self._low_res(len(prompts)) if self.variant.unet["in_channels"] > 3 else {}
        guided = guidance_scale > 1
        notes = cut_prompts(prompts, length)
        for note in notes:
            logger.warning("%s.", note)
        return Conditions(
            own=conditions(prompts),
            negative=conditions([""] * len(prompts)) if guided else {},
            scale=max(1.0, guidance_scale),
            notes=notes,
        )

    def load_decoder(self) -> None:
        """Return None, because samples are images."""

    def load_encoder(self) -> None:
        """Return None, because samples are images."""

    def load_text(self) -> None:
        """Refuse, because the text encoder takes a mask of its tokens, from a tokenizer that is not a file.

        Raises:
            ModelError: Always.
        """
        raise ModelError(f"the text encoder of {self.reference.name} cannot be exported")

    def load_denoiser(self) -> nn.Module:
        """Load the UNet in evaluation mode.

        Raises:
            ModelError: If the checkpoint does not fit the variant.
        """
        from .openai_unet import load_unet

        return load_unet(self.variant.denoiser, self.variant.unet, self._read().unet)

    def _read(self) -> Checkpoint:
        """Read the checkpoint each time; keeping it would double the memory of the model."""
        from .glide_checkpoint import convert
        from .openai_checkpoint import read

        return convert(read(self.weights), self.variant.unet)

    def _low_res(self, count: int) -> dict[str, NDArray[np.float32]]:
        path = self.weights.with_name(LOW_RES)
        try:
            images = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ModelError(
                f"{self.reference.name} enlarges images, but {path} cannot be read: {error}. {_LOW_RES_ADVICE}"
            ) from error
        if not isinstance(images, np.ndarray):
            raise ModelError(f"{path} holds several arrays. {_LOW_RES_ADVICE}")
        if images.ndim != 4 or images.shape[1] != 3 or len(images) < count or not images.size:
            raise ModelError(f"{path} has shape {images.shape}. Expected [{count} or more, 3, height, width].")
        if images.dtype.kind != "f":
            raise ModelError(f"{path} has values of type {images.dtype}. {_LOW_RES_ADVICE}")
        if not np.abs(images).max() <= _LARGEST_PIXEL:  # NaN is not either
            raise ModelError(f"{path} has values from {images.min():g} to {images.max():g}. {_LOW_RES_ADVICE}")
        return {EXTRA_CHANNELS: enlarge(images[:count].astype(np.float32), self.variant.size)}


def find_glide(name: str, weights: Path | None) -> GlideModel:
    """Find a checkpoint.

    Args:
        name: A key of `VARIANTS`.
        weights: A .pt or .safetensors file.

    Raises:
        ModelError: If no weights are given, or they cannot be read.
    """
    if weights is None:
        raise ModelError(f"{name} needs a checkpoint of OpenAI. Pass it with --weights.")
    variant = VARIANTS[name]
    digest = hashlib.sha256(json.dumps([dict(variant.unet), dict(variant.scheduler_config)]).encode())
    digest.update(hash_file(weights, expected=".pt or .safetensors weights"))
    reference = ModelReference(name=name, sha256=digest.hexdigest(), pipeline="GLIDE", denoiser=variant.denoiser)
    return GlideModel(reference=reference, variant=variant, weights=weights)


def enlarge(images: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Enlarge images bilinearly to the size of the upsampler, for its extra channels.

    Args:
        images: [batch, 3, height, width].
        size: New height and width in pixels.

    Returns:
        [batch, 3, size, size].
    """
    import torch
    from torch.nn.functional import interpolate

    enlarged: NDArray[np.float32] = interpolate(torch.from_numpy(images), (size, size), mode="bilinear").numpy()
    return enlarged


def cut_prompts(texts: Sequence[str], length: int) -> tuple[str, ...]:
    """Describe the texts that have more tokens than the text transformer reads, with the words that are lost.

    Raises:
        MissingDependency: If the tokenizer is not installed.
    """
    encoder = _tokenizer()
    found = {text: encoder.encode(text) for text in texts}
    return tuple(
        cut_note(text, length, encoder.decode(tokens[length:]))
        for text, tokens in found.items()
        if len(tokens) > length
    )


def _tokenizer() -> Any:
    try:
        bpe = importlib.import_module("glide_text2im.tokenizer.bpe")
    except ImportError as error:
        raise MissingDependency(
            "encoding prompts for GLIDE needs OpenAI's tokenizer: "
            "pip install git+https://github.com/openai/glide-text2im"
        ) from error
    return bpe.get_encoder()


def tokenize(texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Split texts into tokens with OpenAI's tokenizer.

    Args:
        texts: Texts to split.
        length: Number of tokens to which each text is padded or cut.

    Returns:
        Tokens and mask, each [text, length].

    Raises:
        MissingDependency: If the tokenizer is not installed.
    """
    import torch

    encoder = _tokenizer()
    padded = [encoder.padded_tokens_and_mask(encoder.encode(text), length) for text in texts]
    return torch.tensor([tokens for tokens, _ in padded]), torch.tensor([mask for _, mask in padded])

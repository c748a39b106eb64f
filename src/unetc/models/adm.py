"""UNets of OpenAI's guided-diffusion, improved-diffusion and consistency models, from their checkpoints.

    unetc analyze adm:image_size=64,num_head_channels=64,noise_schedule=cosine --weights model.pt

The form of the network is read off the weights. What leaves no trace in them is given by the flags of OpenAI's training
scripts. The UNet becomes a diffusers `UNet2DModel`, and labels of classes are its conditions.

Source:
    Dhariwal and Nichol 2021, arXiv:2105.05233; Nichol and Dhariwal 2021, arXiv:2102.09672; Song et al. 2023,
    arXiv:2303.01469, and the scripts published with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from unetc.artifacts.profile import ModelReference
from unetc.call import CallSignature
from unetc.class_labels import encode_labels, spread_labels
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.errors import ModelError, brief

from .folder import hash_file

if TYPE_CHECKING:
    from torch import nn

    from .adm_checkpoint import Heads, Network
    from .images import Images

PREFIX = "adm:"
_PIPELINE = "ADM"

READ_OFF = (
    "attention_resolutions",
    "channel_mult",
    "class_cond",
    "learn_sigma",
    "num_channels",
    "num_res_blocks",
    "resblock_updown",
    "use_scale_shift_norm",
)
"""Flags of OpenAI's scripts that the weights answer."""


class NoiseSchedule(StrEnum):
    """Values of `noise_schedule`."""

    LINEAR = "linear"
    COSINE = "cosine"


class Process(StrEnum):
    """How a network was trained to denoise."""

    DIFFUSION = "diffusion"
    """It predicts noise, or the image, at whole timesteps."""
    EDM = "edm"
    """It is preconditioned by noise levels, as in the repository of consistency models."""


class AdmOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the weights of a network do not say; names and defaults are those of OpenAI's scripts."""

    image_size: int
    """Height and width in pixels."""
    num_heads: int | None = None
    num_head_channels: int | None = None
    use_new_attention_order: bool | None = None
    """Whether joint projections hold all queries, then all keys and all values; otherwise head after head."""
    noise_schedule: NoiseSchedule = NoiseSchedule.LINEAR
    diffusion_steps: int = 1000
    predict_xstart: bool = False
    rescale_timesteps: bool = False
    """Whether the network gets timesteps of a process of 1,000 steps, whatever its own number is."""
    process: Process = Process.DIFFUSION

    @classmethod
    def parse(cls, name: str) -> AdmOptions:
        """Read the options in the name of a model.

        Raises:
            ModelError: If an option is unknown, missing, or has a bad value.
        """
        given: dict[str, str] = {}
        for text in filter(None, name.removeprefix(PREFIX).split(",")):
            key, equals, value = text.partition("=")
            if key in READ_OFF:
                raise ModelError(f"{name}: {key} is read off the weights. Leave it out.")
            if key not in cls.__struct_fields__ or not equals or key in given:
                known = ", ".join(cls.__struct_fields__)
                raise ModelError(f"{name}: {text!r} is no option. Expected each of these at most once: {known}.")
            given[key] = value
        if "image_size" not in given:
            raise ModelError(f"{name} has no image_size, which is not in the weights. Write {PREFIX}image_size=64,…")
        try:
            options = msgspec.convert(given, cls, strict=False)
        except msgspec.ValidationError as error:
            raise ModelError(f"{name}: {brief(error)}.") from error
        options._check(name)
        return options

    def _check(self, name: str) -> None:
        for key in ("image_size", "num_heads", "num_head_channels", "diffusion_steps"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ModelError(f"{name}: {key} is {value}. Expected a whole number above 0.")
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise ModelError(
                f"{name} needs either num_heads or num_head_channels, as in the flags of its training: the weights do "
                "not say how many heads an attention has."
            )
        if self.process == Process.EDM and self.use_new_attention_order is None:
            raise ModelError(
                f"{name} needs use_new_attention_order: true for a network trained with attention_type flash, false "
                "otherwise."
            )

    def heads(self) -> Heads:
        """Return the heads of every attention."""
        from .adm_checkpoint import Heads

        by_part = bool(self.use_new_attention_order)
        return Heads(number=self.num_heads, channels=self.num_head_channels, by_part=by_part)

    @property
    def time_scale(self) -> float:
        """Factor between the timesteps of the scheduler and those of the network."""
        if self.process == Process.EDM:
            return 1000.0  # the network embeds 250 ln(sigma), and EDM's schedulers count in ln(sigma) / 4
        return 1000.0 / self.diffusion_steps if self.rescale_timesteps else 1.0

    def scheduler_config(self, *, learns_variance: bool) -> dict[str, Any]:
        """Describe the process by a configuration of a diffusers scheduler."""
        if self.process == Process.EDM:
            return {
                "_class_name": "EDMEulerScheduler",
                "sigma_min": 0.002,
                "sigma_max": 80.0,
                "sigma_data": 0.5,
                "prediction_type": "epsilon",
            }
        scale = 1000 / self.diffusion_steps
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.diffusion_steps,
            "beta_schedule": {"linear": "linear", "cosine": "squaredcos_cap_v2"}[self.noise_schedule],
            "beta_start": scale * 0.0001,
            "beta_end": scale * 0.02,
            "prediction_type": "sample" if self.predict_xstart else "epsilon",
            "variance_type": "learned_range" if learns_variance else "fixed_large",
            "clip_sample": True,
            "timestep_spacing": "linspace",
        }


@dataclass(frozen=True, kw_only=True)
class AdmModel:
    """A checkpoint, read only when needed."""

    reference: ModelReference
    options: AdmOptions
    network: Network
    weights: Path

    decoder_scale = 1
    guidance_scale = 1.0

    @property
    def denoiser_config(self) -> dict[str, Any]:
        """Configuration of the UNet, in the form that diffusers reads."""
        return self.network.config(self.options.image_size, self.options.heads())

    @property
    def calls(self) -> CallSignature:
        """The calls of the UNet."""
        return CallSignature.of(self.reference.denoiser, self.denoiser_config)

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Configuration of a diffusers scheduler."""
        return self.options.scheduler_config(learns_variance=self.network.learns_variance)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """[channel, height, width]."""
        return self.network.in_channels, self.options.image_size, self.options.image_size

    def prompts(self) -> tuple[str, ...]:
        """List labels of the classes; empty without classes."""
        return () if (classes := self.calls.classes) is None else spread_labels(classes)

    def encode(self, prompts: Sequence[str], guidance_scale: float, *, images: Images | None = None) -> Conditions:
        """Turn labels of classes into conditions.

        Raises:
            ModelError: If there are no classes, a label is not the number of one, or a folder of images is given.
        """
        name = self.reference.name
        if images is not None and images.folder is not None:
            raise ModelError(f"{name} takes no images. Omit them.")
        if (classes := self.calls.classes) is not None:
            return encode_labels(name, prompts, classes, guidance_scale)
        if prompts:
            raise ModelError(f"{name} takes no prompts, and its checkpoint has no classes.")
        return UNCONDITIONAL

    def load_decoder(self) -> None:
        """Return None, because samples are images."""

    def load_encoder(self) -> None:
        """Return None, because samples are images."""

    def load_text(self) -> None:
        """Return None, because there are no prompts."""

    def load_denoiser(self) -> nn.Module:
        """Load the UNet in evaluation mode.

        Raises:
            ModelError: If the checkpoint cannot be read any more, or does not fit.
        """
        from .adm_checkpoint import convert, fit
        from .openai_checkpoint import read
        from .openai_unet import load_unet

        heads = self.options.heads()
        converted = convert(read(self.weights), self.network, heads)
        return fit(load_unet(self.reference.denoiser, self.denoiser_config, converted), heads, self.options.time_scale)


def find_adm(name: str, weights: Path | None) -> AdmModel:
    """Find a checkpoint, and check that it fits its options.

    Args:
        name: `PREFIX` and options.
        weights: A .pt or .safetensors file.

    Raises:
        ModelError: If an option is bad, no weights are given, or they cannot be read or converted.
    """
    options = AdmOptions.parse(name)
    if weights is None:
        raise ModelError(f"{name} needs a checkpoint. Pass it with --weights.")
    from .adm_checkpoint import KIND, convert, read_network
    from .openai_checkpoint import read

    digest = hashlib.sha256(json.dumps(msgspec.to_builtins(options), sort_keys=True).encode())
    digest.update(hash_file(weights, expected=".pt or .safetensors weights"))
    read_weights = read(weights)
    network = read_network(read_weights)
    convert(read_weights, network, options.heads())
    multiple = 2 ** (len(network.widths) - 1)
    if options.image_size % multiple:
        raise ModelError(
            f"{name}: a network of {len(network.widths)} levels takes multiples of {multiple} pixels. Check image_size."
        )
    reference = ModelReference(name=name, sha256=digest.hexdigest(), pipeline=_PIPELINE, denoiser=KIND)
    return AdmModel(reference=reference, options=options, network=network, weights=weights)

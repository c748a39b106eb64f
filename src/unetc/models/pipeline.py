"""Models in diffusers pipeline folders.

Nothing in a model folder is executed: unetc reads only safetensors weights, and `pipelines` lists all allowed classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unetc.artifacts.profile import ModelReference
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.controlnet import controlnet_inputs
from unetc.errors import ModelError

from .control_images import ControlImages, ControlSource
from .lora import Lora
from .pipelines import PIPELINES, TEXT_PIPELINES
from .prompts import PROMPTS, read_prompts

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineModel:
    """A pretrained model in a local diffusers folder."""

    reference: ModelReference
    denoiser_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    sample_shape: tuple[int, int, int]
    """[channel, height, width] for which the denoiser was trained; a latent shape if there is a decoder."""
    folder: Path
    loras: tuple[Lora, ...] = ()
    """LoRAs fused into the UNet and the text encoders, in order."""
    control: ControlImages | None = None
    """Control images to measure with."""

    @property
    def conditional(self) -> bool:
        """Whether the denoiser takes more than noise and a timestep."""
        return PIPELINES[self.reference.pipeline].text

    @property
    def guidance_scale(self) -> float:
        """Default scale of classifier-free guidance; 1 for a model without guidance."""
        return PIPELINES[self.reference.pipeline].guidance_scale

    def prompts(self) -> tuple[str, ...]:
        """Read the prompts used to measure the model; empty for an unconditional model."""
        if not self.conditional:
            return ()
        own = self.folder / PROMPTS
        return read_prompts(own if own.is_file() else Path(__file__).parent / PROMPTS)

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> Conditions:
        """Turn prompts into conditions.

        Raises:
            ModelError: If the model takes no prompts, its text encoders cannot be loaded, or a LoRA does not fit them.
            MissingDependency: If transformers is not installed.
        """
        if not self.conditional:
            if prompts:
                raise ModelError(f"{self.reference.name} takes no prompts; it is a {self.reference.pipeline}.")
            return UNCONDITIONAL
        from .text import encode_prompts, load_text_encoders

        _, height, width = self.sample_shape
        size = height * self.decoder_scale, width * self.decoder_scale
        pipeline = load_text_encoders(self.folder, self.reference.pipeline)
        if self.loras:
            from .lora_fusion import fuse_into_text_encoders

            fuse_into_text_encoders(pipeline, self.loras, self.denoiser_config)
        encoded = encode_prompts(pipeline, prompts, guidance_scale=guidance_scale, size=size)
        if not self.reference.controlnet:
            return encoded
        control = None if self.control is None else self.control.take(range(encoded.rows or 0))
        return replace(encoded, controlnet=controlnet_inputs(self.denoiser_config), control=control)

    def with_control(self, source: ControlSource) -> PipelineModel:
        """Return the model with control images to measure with.

        Raises:
            ModelError: If the ControlNet does not fit the model, or there are no images.
        """
        _, height, width = self.sample_shape
        size = height * self.decoder_scale, width * self.decoder_scale
        return replace(self, control=source.open(self.denoiser_config, size))

    @property
    def decoder_scale(self) -> int:
        """Image pixels per sample pixel, along each side; 1 if samples are images."""
        if not self.conditional:
            return 1
        levels = _read_json(self.folder / "vae/config.json").get("block_out_channels", [0])
        return int(2 ** (len(levels) - 1))

    def load_decoder(self) -> nn.Module | None:
        """Load the decoder from samples to images, [batch, 3, height, width] in -1 to 1; None if samples are images.

        Raises:
            ModelError: If the weights of the decoder do not fit its configuration.
        """
        if not self.conditional:
            return None
        from diffusers import AutoencoderKL

        return self._load(AutoencoderKL, "vae")

    def load_denoiser(self) -> nn.Module:
        """Load the denoiser in evaluation mode.

        Raises:
            ModelError: If the weights of the denoiser do not fit its configuration, or a LoRA does not fit.
        """
        import diffusers

        denoiser = self._load(getattr(diffusers, self.reference.denoiser), "unet")
        if self.loras:
            from .lora_fusion import fuse_into_unet

            fuse_into_unet(denoiser, self.loras, self.reference.pipeline)
        return denoiser

    def _load(self, kind: Any, part: str) -> nn.Module:
        from diffusers.utils import logging

        logging.set_verbosity_error()
        what = f"cannot load the {part} of {self.reference.name}"
        model: nn.Module
        try:
            model, report = kind.from_pretrained(
                self.folder / part,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except Exception as error:  # diffusers raises many unrelated classes
            raise ModelError(f"{what}: {brief(error)}.") from error
        if strangers := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
            raise ModelError(
                f"{what}: its weights do not fit its configuration. {strangers[0]!r} is in only one of them. "
                f"Check that {part}/config.json belongs to the weights."
            )
        return model.float().eval().requires_grad_(False)


def open_pipeline(name: str, folder: Path, loras: tuple[Lora, ...], controlnet: bool) -> PipelineModel:
    """Open a diffusers pipeline folder and check that unetc supports it.

    Args:
        name: Name of the model, as the user typed it.
        folder: Folder of the pipeline.
        loras: LoRAs to fuse into the UNet and the text encoders, in order.
        controlnet: Whether the denoiser gets ControlNet inputs.

    Raises:
        ModelError: If a part is missing, or unetc does not support its class.
    """
    index = _read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ModelError(f"{name} is a {pipeline}; supported pipelines: {', '.join(PIPELINES)}.")
    kind = PIPELINES[pipeline]
    if controlnet and not kind.text:
        raise ModelError(f"{name} is a {pipeline}; a ControlNet is supported with {', '.join(TEXT_PIPELINES)}.")
    if loras and not kind.text:
        raise ModelError(f"{name} is a {pipeline}; a LoRA is supported with {', '.join(TEXT_PIPELINES)}.")
    for lora in loras:
        lora.check()
    entry = index.get("unet")
    denoiser_class = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else "nothing"
    if denoiser_class != kind.denoiser:
        raise ModelError(f"{name} has {denoiser_class} as its unet; a {pipeline} is supported with {kind.denoiser}.")
    config = _read_json(folder / "unet/config.json")
    weights = sorted((folder / "unet").glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder / 'unet'} has no .safetensors weights. Other formats can run code and are not read.")
    scheduler_config = _read_json(folder / "scheduler/scheduler_config.json")
    size = config.get("sample_size")
    if size is None:
        raise ModelError(f"{folder / 'unet/config.json'} has no sample_size. Add it: noise of that size is drawn.")
    try:
        height, width = size if isinstance(size, list) else (size, size)
        sample_shape = int(config.get("in_channels", 3)), int(height), int(width)  # 3 is the default of diffusers
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / 'unet/config.json'} has sample_size {size} and in_channels {config.get('in_channels')}. "
            "Expected whole numbers."
        ) from error
    variance_type = str(scheduler_config.get("variance_type"))
    channels = sample_shape[0]
    allowed = (channels, 2 * channels) if variance_type.startswith("learned") else (channels,)
    if (predicted := config.get("out_channels", 3)) not in allowed:
        raise ModelError(
            f"{name} predicts {predicted} channels for samples of {channels}. Expected "
            f"{' or '.join(map(str, allowed))}, because its scheduler has variance_type {variance_type}."
        )
    return PipelineModel(
        reference=ModelReference(
            name=name,
            sha256=_hash(config, scheduler_config, weights, loras, controlnet),
            pipeline=pipeline,
            denoiser=denoiser_class,
            controlnet=controlnet,
            loras=tuple(map(str, loras)),
        ),
        denoiser_config=_plain(config),
        scheduler_config=scheduler_config,
        sample_shape=sample_shape,
        folder=folder,
        loras=loras,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}. Expected a diffusers pipeline folder.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object. Expected a diffusers pipeline folder.")
    return value


def _hash(
    config: dict[str, Any],
    scheduler: dict[str, Any],
    weights: list[Path],
    loras: tuple[Lora, ...],
    controlnet: bool,
) -> str:
    """Hash everything that determines the denoiser's output."""
    digest = hashlib.sha256()
    for settings in (config, scheduler):
        digest.update(json.dumps(_plain(settings), sort_keys=True).encode())
    for path in weights:
        digest.update(_hash_file(path))
    for lora in loras:
        digest.update(f"lora {lora.scale}".encode() + _hash_file(lora.path))
    if controlnet:
        digest.update(b"controlnet")
    return digest.hexdigest()


def _hash_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}. Expected safetensors weights.") from error


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Remove the versions and paths that libraries write into configurations."""
    return {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}


def brief(error: Exception) -> str:
    """Shorten the message of a library to one line of at most 300 characters."""
    return (" ".join(str(error).split())[:300] or type(error).__name__).rstrip(".")

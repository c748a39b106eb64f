"""Models in diffusers pipeline folders.

Nothing in a model folder is executed: unetc reads only safetensors weights, and `pipelines` lists all allowed classes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unetc.artifacts.profile import ModelReference
from unetc.call import (
    AESTHETIC_NUMBERS,
    CLASS_LABELS,
    CONTEXT,
    EXTRA_CHANNELS,
    POOLED,
    SIZE_NUMBERS,
    TIME_IDS,
    TIMESTEP_COND,
    CallSignature,
)
from unetc.class_labels import encode_labels, spread_labels
from unetc.conditions import UNCONDITIONAL, Conditions
from unetc.controlnet import controlnet_inputs
from unetc.errors import MissingDependency, ModelError, ShapeMismatch, brief

from .control_images import ControlImages, ControlSource
from .folder import (
    CONFIG,
    SCHEDULER_CONFIG,
    TOKENIZER_FILES,
    TRANSFORMERS,
    Part,
    find_weights,
    hash_file,
    part_file,
    part_folder,
    plain,
    read_config,
    read_json,
    variants,
    view,
)
from .images import Images
from .labels import read_classes
from .loading import load_model
from .lora import Lora
from .lora_file import check_loras
from .lora_names import PARTS
from .model_index import MODEL_INDEX, ModelIndex, read_model_index
from .pipelines import PIPELINES, TEXT_PIPELINES, sample_channels
from .prompts import PROMPTS, read_prompts
from .vae import Latents, read_vae

if TYPE_CHECKING:
    from torch import nn

    from .latent_decoder import LatentDecoder
    from .latent_encoder import LatentEncoder
    from .text import TextEncoders

logger = logging.getLogger(__name__)

_LARGE_SIZES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
"""Pipelines that take a size below 64 in files before diffusers 0.9 for a mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineModel:
    """A pretrained model in a local diffusers folder."""

    reference: ModelReference
    denoiser_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    sample_shape: tuple[int, int, int]
    """[channel, height, width] for which the denoiser was trained; a latent shape if there is a decoder."""
    calls: CallSignature
    """The calls of the denoiser: its inputs and their shapes."""
    folder: Path
    parts: Mapping[str, Part]
    """The parts with weights: the denoiser, and for a model with text its VAE and text encoders."""
    text_files: Mapping[str, Path] = field(default_factory=dict)
    """The other files for encoding prompts, by their path in a pipeline folder."""
    latents: Latents | None = None
    """Input of the decoder; None if samples are images."""
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
        """Read the prompts used to measure the model, or list labels of its classes; empty if it takes neither."""
        if self.calls.classes is not None:
            return spread_labels(self.calls.classes)
        if not self.conditional:
            return ()
        own = self.folder / PROMPTS
        return read_prompts(own if own.is_file() else Path(__file__).parent / PROMPTS)

    def encode(self, prompts: Sequence[str], guidance_scale: float, *, images: Images | None = None) -> Conditions:
        """Turn prompts, or labels of classes, into conditions.

        Args:
            prompts: One text or label per row.
            guidance_scale: Scale of classifier-free guidance; 1 or less means no guidance.
            images: Images for a model that takes some, one per row; drawn when not given.

        Raises:
            ModelError: If the model takes no prompts, no labels or no images, its text encoders cannot be loaded, a
                LoRA does not fit them, or an image cannot be read.
            MissingDependency: If transformers or pillow is not installed.
        """
        name, pipeline = self.reference.name, self.reference.pipeline
        if images is not None and images.folder is not None and EXTRA_CHANNELS not in self.calls.names:
            raise ModelError(f"{name} takes no images; it is a {pipeline} without extra channels. Omit the images.")
        if self.calls.classes is not None:
            return encode_labels(name, prompts, self.calls.classes, guidance_scale)
        if not self.conditional:
            if prompts:
                raise ModelError(f"{name} takes no prompts; it is a {pipeline}.")
            return UNCONDITIONAL
        size = self.image_size
        encoded = self._load_text().encode(prompts, guidance_scale)
        if EXTRA_CHANNELS in self.calls.names:
            from .image_conditions import add_images

            use, decoder = PIPELINES[pipeline].images, self.load_decoder()
            assert use is not None
            assert decoder is not None
            scale = PIPELINES[pipeline].image_guidance_scale
            encoded = add_images(encoded, images or Images(), decoder.autoencoder, use, size, scale)
        for note in encoded.notes:
            logger.warning("%s.", note)
        self._check_fit(encoded)
        control = None if self.control is None else self.control.take(range(encoded.rows or 0))
        return replace(encoded, controlnet=self.calls.controlnet, control=control)

    def load_text(self) -> TextEncoders | None:
        """Load the text encoders; None for a model that takes no prompts.

        Raises:
            ModelError: If they cannot be loaded, a LoRA does not fit them, or the model takes an image with a prompt.
            MissingDependency: If transformers is not installed.
        """
        if not self.conditional:
            return None
        if EXTRA_CHANNELS in self.calls.names:
            raise ModelError(f"{self.reference.name} takes an image with every prompt")
        return self._load_text()

    def _load_text(self) -> TextEncoders:
        from .text import TextEncoders, load_text_encoders

        pipeline = self.reference.pipeline
        parts = [part for part in self.parts.values() if part.stem == TRANSFORMERS]
        with view(parts, self.text_files) as folder:
            try:
                encoders = load_text_encoders(folder, pipeline)
            except ModelError as error:
                raise ModelError(str(error).replace(str(folder), str(self.folder))) from error
        if self.loras:
            from .lora_fusion import fuse_into_text_encoders

            fuse_into_text_encoders(encoders, self.loras)
        return TextEncoders(pipeline=encoders, kind=PIPELINES[pipeline], calls=self.calls, size=self.image_size)

    def _check_fit(self, encoded: Conditions) -> None:
        """Refuse a pipeline whose encoders do not fit its denoiser, before any long work."""
        sample = np.broadcast_to(np.float32(0), (encoded.rows or 1, *self.sample_shape))
        try:
            for values in encoded.sets:
                self.calls.check(sample, values)
        except ShapeMismatch as error:
            raise ModelError(f"the encoders of {self.reference.name} do not fit its denoiser: {error}") from error

    def with_control(self, source: ControlSource) -> PipelineModel:
        """Return the model with control images to measure with.

        Raises:
            ModelError: If the ControlNet does not fit the model, or there are no images.
        """
        return replace(self, control=source.open(self.denoiser_config, self.image_size))

    @property
    def decoder_scale(self) -> int:
        """Image pixels per sample pixel, along each side; 1 if samples are images."""
        return 1 if self.latents is None else self.latents.pixels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels, for samples of the trained shape."""
        _, height, width = self.sample_shape
        return height * self.decoder_scale, width * self.decoder_scale

    def load_decoder(self) -> LatentDecoder | None:
        """Load the decoder from samples to images, [batch, 3, height, width] in -1 to 1; None if samples are images.

        Raises:
            ModelError: If the weights of the decoder do not fit its configuration.
        """
        if self.latents is None:
            return None
        from .latent_decoder import LatentDecoder

        return LatentDecoder(self._load("vae"), self.latents)

    def load_encoder(self) -> LatentEncoder | None:
        """Load the encoder from images, [batch, 3, height, width] in -1 to 1, to samples; None if they are images.

        Raises:
            ModelError: If the weights of the encoder do not fit its configuration.
        """
        if self.latents is None:
            return None
        from .latent_encoder import LatentEncoder

        return LatentEncoder(self._load("vae"), self.latents)

    def load_denoiser(self) -> nn.Module:
        """Load the denoiser in evaluation mode.

        Raises:
            ModelError: If the weights of the denoiser do not fit its configuration, or a LoRA does not fit.
        """
        denoiser = self._load("unet")
        if self.loras:
            from .lora_fusion import fuse_into_unet

            fuse_into_unet(denoiser, self.loras)
        return denoiser

    def _load(self, name: str) -> nn.Module:
        part = self.parts[name]
        with view([part], {}) as folder:
            return load_model(
                part.kind,
                folder / name,
                f"cannot load the {name} of {self.reference.name}",
                config=f"{name}/{CONFIG}",
                shown=self.folder,
            )


def open_pipeline(
    name: str, folder: Path, loras: tuple[Lora, ...], controlnet: bool, variant: str | None = None
) -> PipelineModel:
    """Open every part of a diffusers pipeline folder and check that unetc supports it.

    Args:
        name: Name of the model, as the user typed it.
        folder: Folder of the pipeline.
        loras: LoRAs to fuse into the UNet and the text encoders, in order.
        controlnet: Whether the denoiser gets ControlNet inputs.
        variant: Variant of the weights to read where it exists.

    Raises:
        ModelError: If a part is missing or damaged, or unetc does not support a class or a setting.
        MissingDependency: If a library is missing that reads a part.
    """
    index = read_model_index(name, folder)
    pipeline, kind = index.pipeline, index.kind
    if controlnet and not kind.text:
        raise ModelError(f"{name} is a {pipeline}; a ControlNet is supported with {', '.join(TEXT_PIPELINES)}.")
    if loras and not kind.text:
        raise ModelError(f"{name} is a {pipeline}; a LoRA is supported with {', '.join(TEXT_PIPELINES)}.")
    scheduler_config = read_config(part_file(folder, "scheduler", SCHEDULER_CONFIG))
    latents = None
    if kind.text:
        vae = read_config(part_file(folder, "vae", CONFIG))
        latents = read_vae(name, index.classes["vae"], vae, statistics=kind.two_encoders)
    config = _effective(read_config(part_file(folder, "unet", CONFIG)), index, folder)
    scored = kind.scored and bool(index.settings.get("requires_aesthetics_score"))
    variance_type = str(scheduler_config.get("variance_type"))
    try:
        channels = sample_channels(pipeline, config, variance_type, None if latents is None else latents.channels)
        calls = CallSignature.of(
            kind.denoiser, config, channels=channels, size_numbers=AESTHETIC_NUMBERS if scored else SIZE_NUMBERS
        )
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # settings of any type, in any combination
        raise ModelError(
            f"{name}: its unet has settings that contradict each other or have wrong types: {brief(error)}. Check "
            f"unet/{CONFIG}."
        ) from error
    _check_conditions(name, pipeline, calls)
    if calls.classes is not None:
        calls = calls.with_classes(read_classes(folder, calls.classes.count))
    height, width = _sample_size(folder, config)
    parts = _open_parts(name, folder, index, config, variant)
    check_loras(loras, {part: parts[part].weights.shapes for part in PARTS if part in parts})
    text_files = _text_files(name, folder, index)
    _check_widths(name, config, parts)
    return PipelineModel(
        reference=ModelReference(
            name=name,
            sha256=_hash(parts["unet"], scheduler_config, loras, controlnet),
            pipeline=pipeline,
            denoiser=kind.denoiser,
            controlnet=controlnet,
            loras=tuple(map(str, loras)),
            **({"text_sha256": _hash_text(index, parts, text_files)} if kind.text else {}),
        ),
        denoiser_config=plain(config),
        scheduler_config=scheduler_config,
        sample_shape=(channels, height, width),
        calls=replace(calls, controlnet=controlnet_inputs(config) if controlnet else ()),
        folder=folder,
        parts=parts,
        text_files=text_files,
        latents=latents,
        loras=loras,
    )


def _check_conditions(name: str, pipeline: str, calls: CallSignature) -> None:
    """Refuse a denoiser with an input for which its pipeline has no values."""
    kind = PIPELINES[pipeline]
    given = {EXTRA_CHANNELS} if kind.images else set()
    if kind.text:
        given |= {CONTEXT, TIMESTEP_COND, *((POOLED, TIME_IDS) if kind.two_encoders else ())}
    elif any(item.classes is not None for item in calls.conditions):
        given.add(CLASS_LABELS)
    if unknown := sorted(calls.names - given):
        raise ModelError(
            f"{name}: its {kind.denoiser} needs {', '.join(unknown)}, which a {pipeline} does not give it. "
            f"Supported conditions of a {pipeline}: {', '.join(sorted(given)) or 'labels of num_class_embeds classes'}."
        )


def _effective(config: dict[str, Any], index: ModelIndex, folder: Path) -> dict[str, Any]:
    """Apply the change that a pipeline makes to the configuration of its denoiser: the size in old files.

    Source:
        `is_unet_version_less_0_9_0` in StableDiffusionPipeline of diffusers 0.42.1.
    """
    version = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version")))
    size = config.get("sample_size")
    if index.pipeline not in _LARGE_SIZES or version is None or (int(version[1]), int(version[2])) >= (0, 9):
        return config
    if not isinstance(size, int) or size >= 64:
        return config
    logger.warning(
        "%s has sample_size %d and is of a release before diffusers 0.9, so that its pipeline takes 64", folder, size
    )
    return {**config, "sample_size": 64}


def _sample_size(folder: Path, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the height and width of the noise that the pipeline draws."""
    path = part_folder(folder, "unet") / CONFIG
    if (size := config.get("sample_size")) is None:
        raise ModelError(f"{path} has no sample_size. Add it: noise of that size is drawn.")
    try:
        height, width = map(int, size if isinstance(size, list | tuple) else (size, size))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} has sample_size {size}. Expected whole numbers: one, or height and width.") from error
    if min(height, width) < 1:
        raise ModelError(f"{path} has sample_size {size}. Expected whole numbers above 0.")
    return height, width


def _check_widths(name: str, config: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
    """Check that the text encoders make tokens as wide as the denoiser takes them."""
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim", 1280)
    encoders = [part for part in parts.values() if part.stem == TRANSFORMERS]
    made = sum(
        shape[-1]
        for part in encoders
        for key, shape in part.weights.shapes.items()
        if key.endswith("token_embedding.weight")
    )
    taken = width if isinstance(width, list | tuple) else (width,)
    if encoders and any(one != made for one in taken):
        raise ModelError(
            f"the text encoders of {name} make tokens of width {made}, and its unet takes {width}. Check that they are "
            "of the same model."
        )


def _open_parts(
    name: str, folder: Path, index: ModelIndex, config: Mapping[str, Any], variant: str | None
) -> dict[str, Part]:
    """Open the parts with weights, and check the headers of all files."""
    stems = index.stems
    if any(stem == TRANSFORMERS for stem in stems.values()) and importlib.util.find_spec("transformers") is None:
        raise MissingDependency("encoding prompts needs transformers: pip install 'unetc[compile]'")
    folders = {part: part_folder(folder, part) for part in stems}
    known = {one for part, stem in stems.items() for one in variants(folders[part], stem)}
    if variant is not None and variant not in known:
        rest = f"It has {', '.join(sorted(known))}." if known else "Its weights exist in no variant."
        raise ModelError(f"{name} has no weights in the variant {variant!r}. {rest}")
    parts = {}
    for part, stem in stems.items():
        own = folders[part]
        parts[part] = Part(
            name=part,
            kind=index.classes[part],
            folder=own,
            config=config if part == "unet" else read_config(part_file(folder, part, CONFIG)),
            weights=find_weights(own, stem, variant),
            stem=stem,
        )
    if variant is None and (others := {part.weights.variant for part in parts.values()} - {None}):
        named = ", ".join(part.name for part in parts.values() if part.weights.variant)
        logger.warning(
            "%s: the weights of %s are read as %s, their only variant",
            name,
            named,
            ", ".join(map(str, sorted(others, key=str))),
        )
    from .fitting import check_part

    for one in parts.values():
        check_part(name, one)
    return parts


def _text_files(name: str, folder: Path, index: ModelIndex) -> dict[str, Path]:
    """List the tokenizers' files and the configurations with which prompts are encoded."""
    tokenizers = [part for part in index.classes if part.startswith("tokenizer")]
    if not tokenizers:
        return {}
    files = {
        MODEL_INDEX: folder / MODEL_INDEX,
        f"scheduler/{SCHEDULER_CONFIG}": part_file(folder, "scheduler", SCHEDULER_CONFIG),
    }
    for part in tokenizers:
        own = part_folder(folder, part)
        found = [file for file in TOKENIZER_FILES if (own / file).is_file()]
        if "tokenizer.json" not in found and not {"vocab.json", "merges.txt"} <= {*found}:
            raise ModelError(f"{own} has no {part} of {name}. Expected vocab.json and merges.txt, or tokenizer.json.")
        for file in found:
            if file.endswith(".json"):
                read_json(own / file)
            files[f"{part}/{file}"] = own / file
    return files


def _hash(unet: Part, scheduler: Mapping[str, Any], loras: tuple[Lora, ...], controlnet: bool) -> str:
    """Hash everything that determines the denoiser's output."""
    digest = hashlib.sha256()
    for settings in (unet.config, scheduler):
        digest.update(json.dumps(plain(settings), sort_keys=True).encode())
    for path in unet.weights.files:
        digest.update(hash_file(path))
    for lora in loras:
        digest.update(f"lora {lora.scale}".encode())
        for path in lora.files:
            digest.update(hash_file(path))
    if controlnet:
        digest.update(b"controlnet")
    return digest.hexdigest()


def _hash_text(index: ModelIndex, parts: Mapping[str, Part], files: Mapping[str, Path]) -> str:
    """Hash everything that determines how prompts are encoded."""
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        if part.stem == TRANSFORMERS:
            digest.update(f"{name} {part.kind} {part.sha256()}".encode())
    for name, path in sorted(files.items()):
        if name.startswith("tokenizer"):
            digest.update(name.encode() + hash_file(path))
    digest.update(json.dumps(index.settings.get("force_zeros_for_empty_prompt", True)).encode())
    return digest.hexdigest()

"""Control images and the ControlNet that reads them, for measuring damage as a pipeline with a ControlNet uses a model.

The residuals depend on the sample and the timestep, so the ControlNet runs before every denoiser call. It runs in torch
on the CPU, and its time is no part of any measured time.

Source:
    diffusers 0.42.1, pipelines/controlnet/pipeline_controlnet.py: the ControlNet gets the scaled sample, the same
    conditions as the UNet, and the image in 0 to 1 at the size of the output.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unetc.artifacts.profile import ControlMeasured
from unetc.controlnet import controlnet_inputs, spread
from unetc.device import Array
from unetc.errors import ModelError

from .folder import CONFIG, DIFFUSERS, Part, find_weights, read_json, view
from .images import image_files, to_colour
from .loading import load_model

SUFFIXES = (".png", ".jpg", ".jpeg")
_CLASS = "ControlNetModel"
_ADDED = ("text_embeds", "time_ids")
_SHARED = ("cross_attention_dim", "addition_embed_type", "class_embed_type", "projection_class_embeddings_input_dim")
"""Keys of a configuration in which a ControlNet and its UNet must agree, besides the sizes of the inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSource:
    """A ControlNet and control images."""

    model: Path
    """Folder of a diffusers ControlNetModel."""
    images: Path
    """Folder of images, .png or .jpg; in the order of their names, prompt k is measured with image k."""

    def open(self, denoiser_config: Mapping[str, Any], size: tuple[int, int]) -> ControlImages:
        """Check the ControlNet against the denoiser and read the images.

        Args:
            denoiser_config: Configuration of the UNet.
            size: Height and width of the images, in pixels.

        Raises:
            ModelError: If the ControlNet cannot be read or does not fit the UNet, or there are no images.
        """
        config = read_json(self.model / CONFIG, f"the folder of a diffusers {_CLASS}")
        if config.get("_class_name") != _CLASS:
            raise ModelError(
                f"{self.model} is a {config.get('_class_name')}; control images are measured with a {_CLASS}."
            )
        try:
            fits = controlnet_inputs(config) == controlnet_inputs(denoiser_config)
        except (KeyError, TypeError, IndexError):
            fits = False
        different = [key for key in _SHARED if config.get(key) != denoiser_config.get(key)]
        if not fits or different:
            part = different[0] if different else "block_out_channels or layers_per_block"
            raise ModelError(
                f"the ControlNet {self.model} does not fit the denoiser: they differ in {part}. "
                "Expected a ControlNet that was made for this model."
            )
        if config.get("conditioning_channels", 3) != 3:
            raise ModelError(
                f"the ControlNet {self.model} reads {config['conditioning_channels']} channels. Expected 3, as in an "
                "RGB image."
            )
        if (order := config.get("controlnet_conditioning_channel_order", "rgb")) not in ("rgb", "bgr"):
            raise ModelError(
                f"the ControlNet {self.model} has controlnet_conditioning_channel_order {order!r}. Expected 'rgb' or "
                "'bgr'."
            )
        own = _part(self.model, config)
        from .fitting import check_part

        try:
            check_part(str(self.model), own)
        except ModelError as error:
            raise ModelError(str(error).replace(f"{own.name}/{CONFIG}", str(self.model / CONFIG))) from error
        images = self._read_images(size)
        return ControlImages(
            folder=self.model,
            images=images,
            measured=ControlMeasured(
                model=str(self.model),
                model_sha256=own.sha256(),
                images=len(images),
                images_sha256=hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest(),
            ),
        )

    def _read_images(self, size: tuple[int, int]) -> tuple[Array, ...]:
        from PIL import Image, ImageOps

        height, width = size
        images = []
        for path in image_files(self.images, SUFFIXES):
            try:
                with Image.open(path) as image:
                    upright = to_colour(ImageOps.exif_transpose(image))
                    pixels = np.asarray(upright.resize((width, height), Image.Resampling.LANCZOS))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise ModelError(f"cannot read the image {path}: {error}. Remove or replace it.") from error
            images.append(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(255))
        return tuple(images)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlImages:
    """Computes the ControlNet inputs of denoiser calls from control images."""

    folder: Path
    """Folder of the ControlNet."""
    images: tuple[Array, ...]
    """One image for each sample, [3, height, width] in 0 to 1."""
    measured: ControlMeasured

    def take(self, rows: Sequence[int]) -> ControlImages:
        """Select an image for each row by index, modulo their number."""
        return replace(self, images=tuple(self.images[row % len(self.images)] for row in rows))

    def residuals(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Array]:
        """Compute the ControlNet inputs of a call.

        A ControlNet with `global_pool_conditions` sees only the rows with the samples' own conditions, as in the
        pipelines of diffusers. The inputs of other rows are zero.

        Args:
            inputs: Sample, timestep and conditions of the call by input name, [row, ...]. There are as many rows as
                images, or twice as many with guidance.
        """
        import torch

        model = _load(self.folder)
        given = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        images = np.stack(self.images)
        pooled = bool(model.config.global_pool_conditions)
        others = len(given["sample"]) - len(images) if pooled else 0
        given = {name: value[others:] for name, value in given.items()}
        sample = given.pop("sample")
        condition = torch.from_numpy(np.concatenate([images] * (len(sample) // len(images))))
        if added := {name: given.pop(name) for name in _ADDED if name in given}:
            given["added_cond_kwargs"] = added  # type: ignore[assignment]
        with torch.no_grad():
            down, middle = model(sample, controlnet_cond=condition, return_dict=False, **given)
        _, _, height, width = sample.shape
        found = {}
        for own, value in zip(controlnet_inputs(model.config), (*down, middle), strict=True):
            residual = spread(value.numpy(), own.shape(len(sample), height, width))
            found[own.name] = np.pad(residual, ((others, 0), *((0, 0),) * 3)) if others else residual
        return found


def _part(folder: Path, config: Mapping[str, Any]) -> Part:
    """Find the files of a ControlNet.

    Raises:
        ModelError: If the weights are missing or damaged.
    """
    weights = find_weights(folder, DIFFUSERS)
    return Part(name="controlnet", kind=_CLASS, folder=folder, config=config, weights=weights, stem=DIFFUSERS)


@functools.lru_cache(maxsize=1)
def _load(folder: Path) -> Any:
    part = _part(folder, read_json(folder / CONFIG))
    with view([part], {}) as root:
        return load_model(
            part.kind,
            root / part.name,
            f"cannot load the ControlNet {folder}",
            config=f"{folder / CONFIG}",
            shown=folder,
        )

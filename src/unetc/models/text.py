"""Encoding of prompts with the text encoders of a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unetc.conditions import Conditions
from unetc.errors import MissingDependency, ModelError


def encode_prompts(
    pipeline: Any, prompts: Sequence[str], *, guidance_scale: float, size: tuple[int, int]
) -> Conditions:
    """Encode prompts; with guidance, encode the empty prompt as their negative.

    Args:
        pipeline: A pipeline with tokenizers and text encoders, of a class in `_ENCODERS`.
        prompts: One prompt per row.
        guidance_scale: Scale of classifier-free guidance; 1 or less means no guidance.
        size: Height and width of the images in pixels; SDXL uses them as conditions.
    """
    import torch

    with torch.no_grad():
        return _ENCODERS[type(pipeline).__name__](pipeline, list(prompts), guidance_scale, size)


def load_text_encoders(folder: Path, pipeline: str) -> Any:
    """Load the tokenizers and text encoders of a pipeline, without its denoiser and decoder.

    Args:
        folder: A pipeline folder with tokenizers and text encoders.
        pipeline: Class of the pipeline, with a row in `PIPELINES`.

    Returns:
        A diffusers pipeline for `encode_prompts`.

    Raises:
        ModelError: If the text encoders cannot be loaded.
        MissingDependency: If transformers is not installed.
    """
    import diffusers

    try:
        import transformers
    except ImportError as error:
        raise MissingDependency("encoding prompts needs transformers: pip install 'unetc[compile]'") from error
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    try:
        loaded = getattr(diffusers, pipeline).from_pretrained(
            folder,
            unet=None,
            vae=None,
            use_safetensors=True,
            local_files_only=True,
            **({"safety_checker": None, "feature_extractor": None} if pipeline == "StableDiffusionPipeline" else {}),
        )
    except Exception as error:  # diffusers and transformers raise many unrelated classes
        raise ModelError(f"cannot load the text encoders of {folder}: {' '.join(str(error).split())[:300]}.") from error
    for part in loaded.components.values():
        if hasattr(part, "float"):  # weights in half precision would be computed with in half precision
            part.float()
    return loaded


def _stable_diffusion(pipeline: Any, prompts: list[str], scale: float, size: tuple[int, int]) -> Conditions:
    guided = scale > 1
    own, negative = pipeline.encode_prompt(prompts, "cpu", 1, guided)
    return _conditions({"encoder_hidden_states": own}, {"encoder_hidden_states": negative}, scale)


def _stable_diffusion_xl(pipeline: Any, prompts: list[str], scale: float, size: tuple[int, int]) -> Conditions:
    guided = scale > 1
    own, negative, own_pooled, negative_pooled = pipeline.encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided
    )
    times = own.new_tensor([[*size, 0, 0, *size]]).repeat(len(prompts), 1)  # original size, crop, target size
    return _conditions(
        {"encoder_hidden_states": own, "text_embeds": own_pooled, "time_ids": times},
        {"encoder_hidden_states": negative, "text_embeds": negative_pooled, "time_ids": times},
        scale,
    )


def _conditions(own: Mapping[str, Any], negative: Mapping[str, Any], scale: float) -> Conditions:
    def arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        return {name: np.ascontiguousarray(value.float().numpy()) for name, value in values.items()}

    return Conditions(own=arrays(own), negative=arrays(negative) if scale > 1 else {}, scale=max(1.0, scale))


_ENCODERS = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
}
"""Encoding function of each pipeline class."""

"""Encoding of prompts with the text encoders of a diffusers pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unetc.call import CONTEXT, POOLED, TIME_IDS, TIMESTEP_COND, CallSignature
from unetc.conditions import Conditions, read_scale
from unetc.errors import MissingDependency, ModelError, brief

from .lora_names import TEXT_ENCODERS
from .pipelines import PIPELINES, PipelineKind
from .prompts import AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE, cut_note, list_prompts, size_numbers
from .quiet import quiet

_ENCODING_PIPELINES: Mapping[bool, str] = {False: "StableDiffusionPipeline", True: "StableDiffusionXLPipeline"}
"""Pipeline that encodes prompts, by whether there are two text encoders; those for images encode in the same way."""

_TOKENIZERS = ("tokenizer", "tokenizer_2")

_NOT_FOR_TEXT = {"unet", "vae", "safety_checker", "feature_extractor", "image_encoder"}
"""Parts of a pipeline that encoding does not need."""

_QUIET: Mapping[str, Mapping[str, object]] = {
    "StableDiffusionPipeline": {"requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
"""Settings that keep a pipeline from asking for parts that encoding does not need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoders:
    """The loaded text encoders of a model, with LoRAs fused."""

    pipeline: Any
    """From `load_text_encoders`."""
    kind: PipelineKind
    """The pipeline of the model."""
    calls: CallSignature
    """The calls of the denoiser."""
    size: tuple[int, int]
    """Height and width of the images in pixels."""

    def encode(self, prompts: Sequence[str], guidance_scale: float) -> Conditions:
        """Encode prompts for images of the model's own size; see `encode_prompts`."""
        return encode_prompts(
            self.pipeline,
            prompts,
            guidance_scale=guidance_scale,
            size=self.size,
            kind=self.kind,
            calls=self.calls,
        )


def encode_prompts(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    guidance_scale: float,
    size: tuple[int, int],
    kind: PipelineKind,
    calls: CallSignature,
) -> Conditions:
    """Encode prompts; with guidance, encode the empty prompt as their negative.

    A denoiser that reads the guidance scale itself gets it as `timestep_cond`, and there are no negative conditions.

    Args:
        pipeline: Text encoders from `load_text_encoders`.
        prompts: One prompt per row.
        guidance_scale: Scale of classifier-free guidance; 1 or less means no guidance.
        size: Height and width of the images in pixels; SDXL uses them as conditions.
        kind: The pipeline of the model.
        calls: The calls of the denoiser.

    Returns:
        The conditions that the denoiser takes. Their notes name the words of prompts that are too long.

    Raises:
        ModelError: If a tokenizer does not fit its text encoder.
        SessionError: If the guidance scale is out of range, or there is no prompt, or one is no text.
    """
    import diffusers
    import torch
    import transformers

    guidance_scale = read_scale(guidance_scale)
    prompts = list_prompts(prompts)
    widths = {item.name: item.axes[-1] for item in calls.conditions if item.axes}
    guided = guidance_scale > 1 and TIMESTEP_COND not in widths
    with torch.no_grad(), quiet(diffusers, transformers):
        encode = _two_encoders if kind.two_encoders else _one_encoder
        try:
            own, negative = encode(pipeline, prompts, guided)
        except (IndexError, OverflowError, ValueError) as error:
            raise ModelError(
                f"the tokenizer does not fit the text encoder: {error}. Check that model_max_length is in "
                "tokenizer_config.json, and that both are of the same model."
            ) from error
        if TIME_IDS in widths:
            count = widths[TIME_IDS]
            assert isinstance(count, int)
            for values, score in ((own, AESTHETIC_SCORE), (negative, NEGATIVE_AESTHETIC_SCORE)):
                numbers = size_numbers(size, count, score)
                values[TIME_IDS] = torch.tensor([numbers]).repeat(len(prompts), 1)
        if TIMESTEP_COND in widths:
            scales = torch.tensor(guidance_scale - 1).repeat(len(prompts))
            own[TIMESTEP_COND] = pipeline.get_guidance_scale_embedding(scales, embedding_dim=widths[TIMESTEP_COND])
        notes = _cut_prompts(pipeline, prompts)

    def arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        return {name: np.ascontiguousarray(values[name].float().numpy()) for name in values if name in calls.names}

    return Conditions(
        own=arrays(own),
        negative=arrays(negative) if guided else {},
        scale=guidance_scale if TIMESTEP_COND in widths else max(1.0, guidance_scale),
        size=size if TIME_IDS in widths else None,
        notes=notes,
    )


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
    try:
        kind = getattr(diffusers, _ENCODING_PIPELINES[PIPELINES[pipeline].two_encoders])
        others = set(inspect.signature(kind.__init__).parameters) & _NOT_FOR_TEXT
        with quiet(diffusers, transformers):
            loaded = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, **dict.fromkeys(others), **_QUIET[kind.__name__]
            )
    except Exception as error:  # diffusers and transformers raise many unrelated classes
        raise ModelError(f"cannot load the text encoders of {folder}: {brief(error)}.") from error
    for name in TEXT_ENCODERS:
        encoder = getattr(loaded, name, None)
        if encoder is not None and getattr(encoder.config, "eos_token_id", 0) is None:  # CLIP looks for this token
            raise ModelError(
                f"{folder / name / 'config.json'}: eos_token_id is null. Expected the number of the token that ends a "
                "prompt; give it, or remove the line."
            )
    for part in loaded.components.values():
        if hasattr(part, "float"):  # weights in half precision would be computed with in half precision
            part.float()
    return loaded


def added_tokens(pipeline: Any) -> tuple[str, ...]:
    """List the tokens that textual inversions added to the tokenizers of a pipeline."""
    tokenizers = (getattr(pipeline, name, None) for name in _TOKENIZERS)
    added = [tokenizer.added_tokens_decoder.values() for tokenizer in tokenizers if tokenizer is not None]
    return tuple(dict.fromkeys(token.content for tokens in added for token in tokens if not token.special))


def _one_encoder(pipeline: Any, prompts: list[str], guided: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    own, negative = pipeline.encode_prompt(prompts, "cpu", 1, guided)
    return {CONTEXT: own}, {CONTEXT: negative}


def _two_encoders(pipeline: Any, prompts: list[str], guided: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    own, negative, own_pooled, negative_pooled = pipeline.encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guided
    )
    return {CONTEXT: own, POOLED: own_pooled}, {CONTEXT: negative, POOLED: negative_pooled}


def _cut_prompts(pipeline: Any, prompts: Sequence[str]) -> tuple[str, ...]:
    """Describe the prompts that have more tokens than a text encoder reads, with the words that are lost."""
    notes: dict[str, None] = {}
    for part in _TOKENIZERS:
        tokenizer = getattr(pipeline, part, None)
        if tokenizer is None:
            continue
        most = tokenizer.model_max_length
        for prompt in prompts:
            tokens = tokenizer(pipeline.maybe_convert_prompt(prompt, tokenizer), truncation=False).input_ids
            if len(tokens) > most:
                lost = " ".join(tokenizer.decode(tokens[most - 1 : -1], skip_special_tokens=True).split())
                notes[cut_note(prompt, most, lost)] = None
    return tuple(notes)

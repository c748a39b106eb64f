"""Tiny pipelines with random weights, complete with tokenizer, text encoder and autoencoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers as untyped_diffusers
import transformers as untyped_transformers

from tests.models import condition_well

diffusers: Any = untyped_diffusers
transformers: Any = untyped_transformers

WORDS = ("a", "red", "blue", "square", "circle", "large", "small")
PROMPTS = "a red square\na blue circle\na large red circle\na small blue square\n"
_LENGTH = 6
_WIDTH = 16


def save_stable_diffusion(
    folder: Path,
    prediction: str = "epsilon",
    *,
    kind: str = "StableDiffusionPipeline",
    in_channels: int = 4,
    **options: Any,
) -> Path:
    """Save a pipeline of Stable Diffusion with 16x16 latents and 32x32 images.

    Args:
        folder: Folder to write.
        prediction: Prediction type of the denoiser.
        kind: Class of the pipeline.
        in_channels: Input channels of the denoiser.
        options: Further options of the denoiser.
    """
    unet = diffusers.UNet2DConditionModel(
        **options,
        sample_size=16,
        in_channels=in_channels,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        block_out_channels=(8, 16),
        cross_attention_dim=_WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    autoencoder = _autoencoder()
    tokenizer = _tokenizer(folder.parent / "words")
    encoder = _text_encoder(tokenizer)
    for seed, model in enumerate((unet, autoencoder, encoder)):
        condition_well(model, seed)
    getattr(diffusers, kind)(
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    (folder / "prompts.txt").write_text(PROMPTS)
    return folder


def save_stable_diffusion_2(folder: Path) -> Path:
    """Save a pipeline like Stable Diffusion 2, which predicts v and has no convolutions in its transformers."""
    return save_stable_diffusion(folder, "v_prediction", use_linear_projection=True)


def save_stable_diffusion_xl(
    folder: Path,
    *,
    kind: str = "StableDiffusionXLPipeline",
    in_channels: int = 4,
    refiner: bool = False,
    **settings: Any,
) -> Path:
    """Save a pipeline of SDXL with 16x16 latents and 32x32 images, with two text encoders.

    Args:
        folder: Folder to write.
        kind: Class of the pipeline.
        in_channels: Input channels of the denoiser.
        refiner: Whether there is only the second text encoder, and an aesthetic score among the size numbers.
        settings: Further settings of the pipeline.
    """
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        block_out_channels=(8, 16),
        cross_attention_dim=_WIDTH if refiner else 2 * _WIDTH,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=(5 if refiner else 6) * 8 + _WIDTH,
    )
    autoencoder = _autoencoder()
    tokenizer = _tokenizer(folder.parent / "words")
    encoders = (
        _text_encoder(tokenizer, layers=2),  # SDXL uses the output of the last layer but one
        _text_encoder(tokenizer, "CLIPTextModelWithProjection", layers=2),
    )
    for seed, model in enumerate((unet, autoencoder, *encoders)):
        condition_well(model, seed)
    if refiner:
        settings["requires_aesthetics_score"] = True
    getattr(diffusers, kind)(
        vae=autoencoder,
        text_encoder=None if refiner else encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=None if refiner else tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
        **settings,
    ).save_pretrained(folder)
    (folder / "prompts.txt").write_text(PROMPTS)
    return folder


def save_classes(folder: Path, **options: Any) -> Path:
    """Save a `DDPMPipeline` whose denoiser takes class labels, with 16x16 images of one channel.

    Args:
        folder: Folder to write.
        options: Further options of the denoiser.
    """
    unet = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        **options,
    )
    condition_well(unet, 0)
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


def _autoencoder() -> Any:
    return diffusers.AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def _tokenizer(folder: Path) -> Any:
    """Build a tokenizer with letters and `WORDS`."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(set("".join(WORDS)))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            pair = f"{parts[0]} {parts[1]}"
            parts[:2] = [parts[0] + parts[1]]
            if pair not in merges:
                merges.append(pair)
            if parts[0] not in tokens:
                tokens.append(parts[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return transformers.CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=_LENGTH
    )


def _text_encoder(tokenizer: Any, kind: str = "CLIPTextModel", *, layers: int = 1) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=_LENGTH,
        projection_dim=_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return getattr(transformers, kind)(config)

"""Find a model by name: one that ships with unetc, a folder of diffusers, a Hub id, or GLIDE with its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unetc.errors import ModelError

from .glide import VARIANTS, find_glide
from .lora import Lora
from .model import Model
from .pipeline import GUIDANCE, brief, open_pipeline
from .prompts import PROMPTS

BUILT_IN = ("digits", "prompted-digits")
"""Models that ship with unetc."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What a model is sampled with when nothing else is said."""

    scheduler: str = "ddim"
    steps: int = 50


def usual_sampling(name: str) -> Sampling:
    """Tell what a model is sampled with when nothing else is said."""
    if variant := VARIANTS.get(name):
        return Sampling(scheduler=variant.scheduler, steps=variant.steps)
    return Sampling()


def find_model(
    name: str, weights: Path | None = None, *, loras: Sequence[Lora] = (), controlnet: bool = False
) -> Model:
    """Find a model and check that it is supported.

    Args:
        name: A built-in name, the path of a diffusers pipeline folder, a Hub id ("owner/name"), or one of `VARIANTS`.
        weights: The checkpoint of one of `VARIANTS`; the others have weights of their own.
        loras: What is fused into its UNet and its text encoders, in order.
        controlnet: Whether its denoiser is to take the residuals of a ControlNet.

    Raises:
        ModelError: If there is no such model, it is of a class that unetc does not support, or a LoRA cannot be read.
        MissingDependency: If peft is not installed and there are LoRAs.
    """
    if name in VARIANTS:
        if loras:
            raise ModelError(f"{name} takes no LoRA: none is made for it; pipelines that do: {', '.join(GUIDANCE)}.")
        if controlnet:
            raise ModelError(f"{name} takes no residuals of a ControlNet; pipelines that do: {', '.join(GUIDANCE)}.")
        return find_glide(name, weights)
    if weights is not None:
        raise ModelError(f"{name} has weights of its own; --weights is for {', '.join(VARIANTS)}.")
    return open_pipeline(name, _find(name), tuple(loras), controlnet)


def _find(name: str) -> Path:
    if name in BUILT_IN:
        return Path(__file__).parent / name
    folder = Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown user
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json.")
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"no model {name!r}. Expected a built-in name ({', '.join(BUILT_IN)}), a diffusers folder, or a Hub id "
            "like owner/name."
        )
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        parts = ["model_index.json", PROMPTS, "scheduler/*.json", "tokenizer*/*.json", "tokenizer*/*.txt"]
        parts += [f"{part}/*.{kind}" for part in ("unet", "vae", "text_encoder*") for kind in ("json", "safetensors")]
        variants = ["*.fp16.*", "*non_ema*"]
        return Path(snapshot_download(name, allow_patterns=parts, ignore_patterns=variants))
    except Exception as error:  # network, authentication, missing repository: the library's classes vary
        raise ModelError(
            f"cannot get {name!r} from the Hub: {brief(error)}. Check the id and the network, or give a local folder."
        ) from error

"""Find a model by name: a built-in model, a diffusers folder, a Hub id, or GLIDE with its checkpoint."""

from __future__ import annotations

import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from unetc.errors import ModelError

from .control_images import ControlSource
from .glide import VARIANTS, find_glide
from .lora import Lora
from .model import Model
from .pipeline import brief, open_pipeline
from .pipelines import TEXT_PIPELINES
from .prompts import PROMPTS

BUILT_IN = ("digits", "prompted-digits")
"""Models shipped with unetc."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The source of a model, and the preparation of its denoiser."""

    name: str
    """A built-in name, the path of a diffusers pipeline folder, a Hub id ("owner/name"), or one of `VARIANTS`."""
    _: KW_ONLY
    weights: str | Path | None = None
    """Checkpoint of one of `VARIANTS`; all other models include their weights."""
    loras: tuple[Lora, ...] = ()
    """LoRAs to fuse into the UNet and the text encoders, in order."""
    controlnet: bool = False
    """Whether the denoiser has ControlNet inputs."""
    control: ControlSource | None = None
    """ControlNet and control images to measure with; the denoiser then has ControlNet inputs."""

    @classmethod
    def of(cls, model: ModelSource | str) -> ModelSource:
        """Turn a name into a source; a source stays as it is."""
        return cls(model) if isinstance(model, str) else model


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Default scheduler and number of steps of a model."""

    scheduler: str = "ddim"
    steps: int = 50


def usual_sampling(model: ModelSource | str) -> Sampling:
    """Look up the default scheduler and number of steps of a model."""
    if variant := VARIANTS.get(ModelSource.of(model).name):
        return Sampling(scheduler=variant.scheduler, steps=variant.steps)
    return Sampling()


def find_model(model: ModelSource | str) -> Model:
    """Find a model and check that it is supported.

    Args:
        model: The source, or just its name.

    Raises:
        ModelError: If there is no such model, its class is not supported, or a LoRA cannot be read.
        MissingDependency: If there are LoRAs and peft is not installed.
    """
    source = ModelSource.of(model)
    name = source.name
    if name in VARIANTS:
        if source.loras:
            raise ModelError(f"{name} takes no LoRA. Supported pipelines: {', '.join(TEXT_PIPELINES)}.")
        if source.controlnet or source.control:
            raise ModelError(f"{name} takes no ControlNet. Supported pipelines: {', '.join(TEXT_PIPELINES)}.")
        return find_glide(name, None if source.weights is None else Path(source.weights))
    if source.weights is not None:
        raise ModelError(f"{name} includes its weights; --weights is only for {', '.join(VARIANTS)}.")
    opened = open_pipeline(name, _find(name), source.loras, source.controlnet or source.control is not None)
    return opened if source.control is None else opened.with_control(source.control)


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
            f"cannot get {name!r} from the Hub: {brief(error)}. Check the id and the network, or pass a local folder."
        ) from error

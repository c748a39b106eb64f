"""Find a model by name: a built-in model, a diffusers folder, a Hub id, or one of OpenAI's with its checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from unetc.errors import ModelError, brief

from .adm import PREFIX as ADM
from .adm import AdmOptions, Process, find_adm
from .control_images import ControlSource
from .folder import CONFIG, DIFFUSERS, SCHEDULER_CONFIG, TRANSFORMERS
from .glide import VARIANTS, find_glide
from .labels import LABELS
from .lora import Lora
from .model import Model
from .model_index import MODEL_INDEX, read_model_index
from .pipeline import open_pipeline
from .pipelines import TEXT_PIPELINES
from .prompts import PROMPTS

BUILT_IN = ("digits", "fashion", "prompted-digits")
"""Models shipped with unetc."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The source of a model, and the preparation of its denoiser."""

    name: str
    """A built-in name, the path of a diffusers pipeline folder, a Hub id ("owner/name"), one of `VARIANTS`,
    or `ADM` and `AdmOptions`."""
    _: KW_ONLY
    weights: str | Path | None = None
    """Checkpoint of one of `VARIANTS` or of "adm:"; all other models include their weights."""
    loras: tuple[Lora, ...] = ()
    """LoRAs to fuse into the UNet and the text encoders, in order."""
    controlnet: bool = False
    """Whether the denoiser has ControlNet inputs."""
    control: ControlSource | None = None
    """ControlNet and control images to measure with; the denoiser then has ControlNet inputs."""
    variant: str | None = None
    """Variant of the weights, such as "fp16"; parts without it are read as usual. None if there is no choice."""

    @classmethod
    def of(cls, model: ModelSource | str) -> ModelSource:
        """Turn a name into a source; a source stays as it is."""
        return cls(model) if isinstance(model, str) else model


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Default scheduler and number of steps of a model."""

    scheduler: str = "ddim"
    steps: int = 50


_USUAL: Mapping[str, Sampling] = {
    "LCMScheduler": Sampling(scheduler="lcm", steps=4),
    "TCDScheduler": Sampling(scheduler="tcd", steps=4),
}
"""Sampling of models that were distilled for a scheduler, by the scheduler's class."""


def usual_sampling(model: ModelSource | str) -> Sampling:
    """Look up the default scheduler and number of steps of a model.

    Raises:
        ModelError: If there is no such model, or its pipeline is not supported.
    """
    source = ModelSource.of(model)
    name = source.name
    if variant := VARIANTS.get(name):
        return Sampling(scheduler=variant.scheduler, steps=variant.steps)
    if name.startswith(ADM) and AdmOptions.parse(name).process == Process.EDM:
        return Sampling(scheduler="edm-euler")
    if name.startswith(ADM):
        return Sampling()
    index = read_model_index(name, _find(name, source.variant))
    return _USUAL.get(index.scheduler, Sampling())


def find_model(model: ModelSource | str) -> Model:
    """Find a model and check that it is supported.

    Args:
        model: The source, or just its name.

    Raises:
        ModelError: If there is no such model, its class is not supported, or a LoRA does not fit.
    """
    source = ModelSource.of(model)
    name = source.name
    if name in VARIANTS or name.startswith(ADM):
        if source.loras:
            raise ModelError(f"{name} takes no LoRA. Supported pipelines: {', '.join(TEXT_PIPELINES)}.")
        if source.controlnet or source.control:
            raise ModelError(f"{name} takes no ControlNet. Supported pipelines: {', '.join(TEXT_PIPELINES)}.")
        if source.variant is not None:
            raise ModelError(f"{name} has no variants; --variant is for diffusers folders and Hub ids.")
        weights = None if source.weights is None else Path(source.weights)
        return find_adm(name, weights) if name.startswith(ADM) else find_glide(name, weights)
    if source.weights is not None:
        raise ModelError(f"{name} includes its weights; --weights is only for {', '.join(VARIANTS)} and {ADM}…")
    controlnet = source.controlnet or source.control is not None
    opened = open_pipeline(name, _find(name, source.variant), source.loras, controlnet, source.variant)
    return opened if source.control is None else opened.with_control(source.control)


def _find(name: str, variant: str | None) -> Path:
    if name in BUILT_IN:
        return Path(__file__).parent / name
    folder = Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown user
    if folder.is_dir():
        if not (folder / MODEL_INDEX).is_file():
            raise ModelError(
                f"{folder} is not a diffusers pipeline folder: it has no {MODEL_INDEX}. Save the whole pipeline with "
                "diffusers' save_pretrained, not one of its models."
            )
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"no model {name!r}. Expected a built-in name ({', '.join(BUILT_IN)}), a diffusers folder, or a Hub id "
            "like owner/name."
        )
    return _download(name, variant)


def _download(name: str, variant: str | None) -> Path:
    """Fetch the files of a pipeline from the Hub, with as few weights as possible.

    The first call fetches the weights without a variant, or in the variant that is asked for. Further calls fetch the
    weights of parts that have none yet: first without a variant, then in any variant.
    """
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_\-]+", variant):
        raise ModelError(f"there is no variant {variant!r}. Expected a name such as fp16.")
    weights = [*_weights("unet/", DIFFUSERS, variant), *_weights("vae/", DIFFUSERS, variant)]
    weights += [*_weights("text_encoder*/", TRANSFORMERS, variant), *_weights("", DIFFUSERS, variant)]
    folder = _fetch(name, [*_SETTINGS, *weights])
    index, tried = read_model_index(name, folder), [variant]
    for others in ("*",) if variant is None else (None, "*"):
        if not (missing := index.without_weights(folder, tried)):
            break
        folder = _fetch(name, [pattern for prefix, stem in missing for pattern in _weights(prefix, stem, others)])
        tried.append(others)
    return folder


_SETTINGS = (
    MODEL_INDEX,
    PROMPTS,
    LABELS,
    CONFIG,
    SCHEDULER_CONFIG,
    f"{DIFFUSERS}*.index*.json",
    "scheduler/*.json",
    "tokenizer*/*.json",
    "tokenizer*/*.txt",
    "unet/*.json",
    "vae/*.json",
    "text_encoder*/*.json",
)
"""Patterns of the files without weights; those at the root are of flat repositories."""


def _weights(prefix: str, stem: str, variant: str | None) -> list[str]:
    """Return the patterns of a part's weights: a file, or shards."""
    shard = "-?????-of-?????"
    if variant is None:
        return [f"{prefix}{stem}.safetensors", f"{prefix}{stem}{shard}.safetensors"]
    names = f"{stem}.{variant}", f"{stem}.{variant}{shard}", f"{stem}{shard}.{variant}"
    return [f"{prefix}{one}.safetensors" for one in names]


def _fetch(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*/*"]))
    except Exception as error:  # network, authentication, missing repository: the library's classes vary
        raise ModelError(
            f"cannot get {name!r} from the Hub: {brief(error)}. Check the id and the network, or pass a local folder."
        ) from error

"""model_index.json: the class of a pipeline, the classes of its parts, and its settings.

Every key is used, is harmless for the reason given here, or is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from unetc.errors import ModelError

from .folder import DIFFUSERS, TRANSFORMERS, has_weights, part_folder, read_json
from .pipelines import PIPELINES, PipelineKind
from .vae import AUTOENCODERS

MODEL_INDEX = "model_index.json"

_UNUSED = frozenset(
    {
        "safety_checker",  # blackens images after they are made
        "feature_extractor",  # prepares images for the safety checker
        "requires_safety_checker",  # decides about a warning
        "image_encoder",  # encodes the image of an IP-Adapter
        "requires_aesthetics_score",  # read by `open_pipeline` for SDXL's refiner, and by no other pipeline
    }
)
"""Keys that change nothing that unetc computes."""

_READ_BY_DIFFUSERS = frozenset({"force_zeros_for_empty_prompt"})
"""Keys that the pipeline's own class obeys when it encodes prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIndex:
    """The pipeline in a folder."""

    pipeline: str
    """Class of the pipeline, with a row in `PIPELINES`."""
    classes: Mapping[str, str]
    """Classes of the parts that are read, without the scheduler, by part."""
    settings: Mapping[str, Any]
    """The whole file, checked."""

    @property
    def scheduler(self) -> str:
        """Class of the pipeline's scheduler."""
        return str(self.settings["scheduler"][1])

    @property
    def kind(self) -> PipelineKind:
        """The row of the pipeline."""
        return PIPELINES[self.pipeline]

    @property
    def stems(self) -> Mapping[str, str]:
        """Names of the weights by part, for the parts that have weights."""
        named = {"unet": DIFFUSERS, "vae": DIFFUSERS}
        return {part: named.get(part, TRANSFORMERS) for part in self.classes if not part.startswith("tokenizer")}

    def without_weights(self, folder: Path, variants: Sequence[str | None]) -> list[tuple[str, str]]:
        """List the parts whose weights are not in a folder.

        Args:
            folder: Folder of the pipeline.
            variants: Variants to look for; None means weights without a variant.

        Returns:
            The folder of each, as a prefix of its files, and the name of its weights.
        """
        missing = []
        for part, stem in self.stems.items():
            own = part_folder(folder, part)
            if not any(has_weights(own, stem, variant) for variant in variants):
                missing.append(("" if own == folder else f"{part}/", stem))
        return missing


def read_model_index(name: str, folder: Path) -> ModelIndex:
    """Read model_index.json and check every key.

    Args:
        name: Name of the model, for messages.
        folder: Folder of the pipeline.

    Raises:
        ModelError: If the pipeline or the class of a part is not supported, a part is missing, or a key is unknown.
    """
    index = read_json(folder / MODEL_INDEX)
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ModelError(f"{name} is a {pipeline}; supported pipelines: {', '.join(PIPELINES)}.")
    kind = PIPELINES[pipeline]
    allowed: dict[str, tuple[str, tuple[str, ...]]] = {"unet": ("diffusers", (kind.denoiser,))}
    if kind.text:
        allowed["vae"] = "diffusers", tuple(AUTOENCODERS)
    allowed |= {part: ("transformers", classes) for part, classes in kind.text_parts.items()}
    parts = {part: _part(index, part) for part in allowed}
    first = {"tokenizer", "text_encoder"}
    if kind.two_encoders and not any(parts[part] for part in first):  # diffusers then uses the second encoder alone
        allowed = {part: own for part, own in allowed.items() if part not in first}
    for part, (library, classes) in allowed.items():
        own = parts[part]
        if own is None:
            raise ModelError(
                f"{name} has nothing as its {part}; a {pipeline} is supported with {' or '.join(classes)}."
            )
        if own[0] != library and own[1] in classes:
            raise ModelError(
                f"{name} takes its {part} from {own[0]!r}, which could run code. Expected {part}: "
                f'["{library}", "{own[1]}"] in {MODEL_INDEX}.'
            )
        if part != "vae" and own[1] not in classes:  # read_vae knows the reasons for other classes of VAE
            raise ModelError(
                f"{name} has {own[1]} as its {part}; a {pipeline} is supported with {' or '.join(classes)}."
            )
    _check_scheduler(name, index)
    _check_settings(name, pipeline, index, {*parts, "scheduler"})
    return ModelIndex(
        pipeline=pipeline,
        classes=MappingProxyType({part: own[1] for part in allowed if (own := parts[part])}),
        settings=MappingProxyType(index),
    )


def _part(index: Mapping[str, Any], part: str) -> tuple[str, str] | None:
    """Return library and class of a part; None if it is null or missing."""
    entry = index.get(part)
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(one, str) for one in entry):
        return None
    return entry[0], entry[1]


def _check_scheduler(name: str, index: Mapping[str, Any]) -> None:
    """Refuse a scheduler that is code of the folder; its class is read from its own configuration."""
    own = _part(index, "scheduler")
    if own is None:
        raise ModelError(f"{name} has nothing as its scheduler in {MODEL_INDEX}. Expected a scheduler of diffusers.")
    if own[0] != "diffusers":
        raise ModelError(
            f"{name} takes its scheduler from {own[0]!r}, which could run code. Expected scheduler: "
            f'["diffusers", "{own[1]}"] in {MODEL_INDEX}.'
        )


def _check_settings(name: str, pipeline: str, index: Mapping[str, Any], parts: set[str]) -> None:
    """Refuse a key that nobody has looked at, and a setting that would change the images."""
    for key, value in index.items():
        if key.startswith("_") or key in parts or key in _UNUSED or key in _READ_BY_DIFFUSERS:
            continue
        if value in (None, [None, None]):  # diffusers loads nothing either
            continue
        if key == "add_watermarker":
            if value is False:
                continue
            raise ModelError(
                f"{name} asks for a watermark (add_watermarker in {MODEL_INDEX}), and unetc adds none. Set it to false."
            )
        raise ModelError(
            f"{MODEL_INDEX} of {name} has {key!r}, a setting that unetc does not know in a {pipeline}. Remove it if it "
            "changes nothing."
        )

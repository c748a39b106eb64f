"""Find a model by name: one that ships with unetc, a local diffusers folder, or a Hub id.

Only safetensors weights are read, and the classes are named here: nothing in a model folder is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unetc.artifacts.profile import ModelReference
from unetc.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

BUILT_IN = ("digits", "prompted-digits")
"""Models that ship with unetc."""

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
"""Pipelines whose denoiser needs nothing but noise and a timestep."""

DENOISERS = ("UNet2DModel",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A pretrained model in a local folder; its weights are loaded only when asked for."""

    reference: ModelReference
    scheduler_config: dict[str, Any]
    sample_shape: tuple[int, int, int]
    """[channel, height, width] the denoiser was trained for."""
    folder: Path

    def load_denoiser(self) -> nn.Module:
        """Load the denoiser in evaluation mode.

        Raises:
            ModelError: If its weights do not fit its configuration.
        """
        from diffusers import UNet2DModel
        from diffusers.utils import logging

        logging.set_verbosity_error()
        what = f"cannot load the denoiser of {self.reference.name}"
        denoiser: nn.Module
        try:
            denoiser, report = UNet2DModel.from_pretrained(
                self.folder / "unet",
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except Exception as error:  # diffusers raises many unrelated classes
            raise ModelError(f"{what}: {_brief(error)}.") from error
        if strangers := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
            raise ModelError(
                f"{what}: its weights do not fit its configuration, {strangers[0]!r} is in only one of them. "
                "Check that unet/config.json belongs to the weights."
            )
        return denoiser.eval().requires_grad_(False)


def find_model(name: str) -> Model:
    """Find a model and check that it is supported.

    Args:
        name: A built-in name, the path of a diffusers pipeline folder, or a Hub id ("owner/name").

    Raises:
        ModelError: If there is no such model, or it is of a class that unetc does not support.
    """
    folder = _find(name)
    index = _read_json(folder / "model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in PIPELINES:
        raise ModelError(f"{name} is a {pipeline}; supported pipelines: {', '.join(PIPELINES)}.")
    entry = index.get("unet")
    denoiser_class = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else "nothing"
    if denoiser_class not in DENOISERS:
        raise ModelError(f"{name} has {denoiser_class} as its unet; supported denoisers: {', '.join(DENOISERS)}.")
    config = _read_json(folder / "unet/config.json")
    weights = sorted((folder / "unet").glob("*.safetensors"))
    if not weights:
        raise ModelError(f"{folder / 'unet'} has no .safetensors weights. Other formats can run code and are not read.")
    scheduler_config = _read_json(folder / "scheduler/scheduler_config.json")
    size = config.get("sample_size")
    if size is None:
        raise ModelError(
            f"{folder / 'unet/config.json'} names no sample_size; it is needed to draw noise of that size."
        )
    try:
        height, width = size if isinstance(size, list) else (size, size)
        sample_shape = int(config.get("in_channels", 3)), int(height), int(width)  # 3 is the default of diffusers
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / 'unet/config.json'} has sample_size {size} and in_channels {config.get('in_channels')}; "
            "expected whole numbers."
        ) from error
    if (predicted := config.get("out_channels", 3)) != sample_shape[0]:
        raise ModelError(
            f"{name} predicts {predicted} channels for samples of {sample_shape[0]}; expected as many. Denoisers that "
            "predict a variance too are not supported."
        )
    return Model(
        reference=ModelReference(
            name=name,
            sha256=_hash(config, scheduler_config, weights),
            pipeline=pipeline,
            denoiser=denoiser_class,
        ),
        scheduler_config=scheduler_config,
        sample_shape=sample_shape,
        folder=folder,
    )


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
        patterns = ["model_index.json", "unet/*.json", "unet/*.safetensors", "scheduler/*.json"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # network, authentication, missing repository: the library's classes vary
        raise ModelError(
            f"cannot get {name!r} from the Hub: {_brief(error)}. Check the id and the network, or give a local folder."
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}. Expected a diffusers pipeline folder.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object. Expected a diffusers pipeline folder.")
    return value


def _hash(config: dict[str, Any], scheduler: dict[str, Any], weights: list[Path]) -> str:
    """Hash what decides the denoiser's output; versions and paths that libraries write into configurations do not."""
    digest = hashlib.sha256()
    for settings in (config, scheduler):
        plain = {key: value for key, value in settings.items() if not key.startswith("_") or key == "_class_name"}
        digest.update(json.dumps(plain, sort_keys=True).encode())
    for path in weights:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror}. Expected safetensors weights.") from error
    return digest.hexdigest()


def _brief(error: Exception) -> str:
    """Put what a library says on one line of bearable length."""
    return (" ".join(str(error).split())[:300] or type(error).__name__).rstrip(".")

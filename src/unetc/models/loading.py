"""Load a model of diffusers from a folder, and check that all of its weights were read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from unetc.errors import ModelError, brief

from .quiet import quiet

if TYPE_CHECKING:
    from torch import nn


def load_model(kind: str, folder: Path, what: str, *, config: str, shown: Path | None = None) -> nn.Module:
    """Load a model in float32 and in evaluation mode.

    Args:
        kind: Name of its class in diffusers.
        folder: Folder with its configuration and its safetensors weights.
        what: Beginning of error messages.
        config: Name of the configuration in error messages.
        shown: Folder to name in messages if the parent of `folder` is temporary.

    Raises:
        ModelError: If diffusers cannot load the model, or its weights do not fit its configuration.
    """
    import diffusers

    model: nn.Module
    try:
        with quiet(diffusers):
            model, report = getattr(diffusers, kind).from_pretrained(
                folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
            )
    except Exception as error:  # diffusers raises many unrelated classes
        reason = brief(error) if shown is None else brief(error).replace(str(folder.parent), str(shown))
        raise ModelError(f"{what}: {reason}.") from error
    if strangers := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise ModelError(
            f"{what}: its weights do not fit its configuration. {strangers[0]!r} is in only one of them. "
            f"Check that {config} belongs to the weights."
        )
    return model.float().eval().requires_grad_(False)

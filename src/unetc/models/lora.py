"""LoRAs to fuse into a model, each with a scale."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from unetc.errors import MissingDependency, ModelError

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA to fuse into a model."""

    path: Path
    scale: float = 1.0
    """Factor of its change to the weights; dimensionless."""

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Parse `PATH.safetensors` or `PATH.safetensors:SCALE`; the path may contain colons.

        Raises:
            ModelError: If the text has neither form.
        """
        stem, suffix, rest = text.rpartition(SUFFIX)
        if not suffix or rest[:1] not in ("", ":"):
            raise ModelError(
                f"{text!r} does not name a LoRA. Expected a {SUFFIX} file, followed by a colon and its scale unless "
                f"that is 1: style{SUFFIX}:0.8. Other formats can run code and are not read."
            )
        try:
            scale = float(rest[1:]) if rest else 1.0
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise ModelError(f"the scale of LoRA {stem + suffix} must be a finite number, got {rest[1:]!r}.")
        return cls(path=Path(stem + suffix), scale=scale)

    def __str__(self) -> str:
        """Format the LoRA as text for `parse`."""
        return f"{self.path}:{self.scale}"

    def check(self) -> None:
        """Check the header of the file.

        Raises:
            ModelError: If the file cannot be read, or holds anything but a LoRA.
            MissingDependency: If peft is not installed.
        """
        if importlib.util.find_spec("peft") is None:
            raise MissingDependency("fusing a LoRA needs peft: pip install 'unetc[lora]'")
        try:
            with safe_open(self.path, framework="numpy") as file:
                names = sorted(file.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read LoRA {self.path}: {error}. Expected a {SUFFIX} file.") from error
        if not names:
            raise ModelError(f"{self.path} is not a LoRA: it holds no tensors.")
        if others := [name for name in names if "lora" not in name]:
            raise ModelError(f"{self.path} is not a LoRA: it holds {some(others)}.")
        if magnitudes := [name for name in names if "dora_scale" in name or "lora_magnitude_vector" in name]:
            raise ModelError(f"{self.path} is a DoRA (it holds {some(magnitudes)}); only plain LoRAs can be fused.")


def some(names: Sequence[str]) -> str:
    """Quote the first few names and count the rest."""
    rest = len(names) - 3
    return ", ".join(map(repr, names[:3])) + (f" and {rest} more" if rest > 0 else "")

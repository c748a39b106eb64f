"""Which LoRA is to be fused into a model, and how strongly."""

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
    """A LoRA that is to be fused into a model."""

    path: Path
    scale: float = 1.0
    """What it adds to the weights is multiplied with this; dimensionless."""

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read `PATH.safetensors` or `PATH.safetensors:SCALE`; the path may hold colons itself.

        Raises:
            ModelError: If it is neither of them.
        """
        stem, suffix, rest = text.rpartition(SUFFIX)
        if not suffix or rest[:1] not in ("", ":"):
            raise ModelError(
                f"cannot take {text!r} as a LoRA. Expected a {SUFFIX} file, and behind a colon its scale if that is "
                f"not 1: style{SUFFIX}:0.8. Other formats can run code and are not read."
            )
        try:
            scale = float(rest[1:]) if rest else 1.0
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise ModelError(f"the scale of LoRA {stem + suffix} must be a finite number, got {rest[1:]!r}.")
        return cls(path=Path(stem + suffix), scale=scale)

    def __str__(self) -> str:
        """Write it as it is parsed."""
        return f"{self.path}:{self.scale}"

    def check(self) -> None:
        """Look at the header of the file.

        Raises:
            ModelError: If it cannot be read, or holds something else than a LoRA.
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
            raise ModelError(f"{self.path} is no LoRA: it holds no tensors.")
        if others := [name for name in names if "lora" not in name]:
            raise ModelError(f"{self.path} is no LoRA: it holds {some(others)}.")
        if magnitudes := [name for name in names if "dora_scale" in name or "lora_magnitude_vector" in name]:
            raise ModelError(f"{self.path} is a DoRA, with {some(magnitudes)}; only plain LoRAs can be fused.")


def some(names: Sequence[str]) -> str:
    """Quote the first few names and count the rest."""
    rest = len(names) - 3
    return ", ".join(map(repr, names[:3])) + (f" and {rest} more" if rest > 0 else "")

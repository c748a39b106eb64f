"""LoRAs to fuse into a model, each with a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from unetc.arguments import plain_fields
from unetc.errors import ModelError

SUFFIX = ".safetensors"

_PEFT_FILE, _PEFT_CONFIGURATION = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA to fuse into a model."""

    path: Path
    scale: float = 1.0
    """Factor of its change to the weights; dimensionless. The model is unchanged at 0."""

    def __post_init__(self) -> None:
        """Check the scale.

        Raises:
            ModelError: If it is no finite number.
        """
        plain_fields(self, ModelError)
        if math.isinf(self.scale):
            raise ModelError(f"the scale of LoRA {self.path} must be a finite number, got {self.scale}.")

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

    @property
    def configuration(self) -> Path | None:
        """File with peft's configuration, if the LoRA is one half of a folder that peft saved."""
        beside = self.path.with_name(_PEFT_CONFIGURATION)
        return beside if self.path.name == _PEFT_FILE and beside.is_file() else None

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that determine the LoRA's change."""
        return (self.path,) if self.configuration is None else (self.path, self.configuration)

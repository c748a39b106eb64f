"""Requests for images and their answers, whatever the API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from unetc.artifacts.profile import Damage
from unetc.device import Array
from unetc.errors import RequestError
from unetc.runtime.batching.ladder import AUTO

from .images import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """Images that a client asks for, whatever the API. Every field has a default."""

    model: str | None = None
    """Name of a served model; None if only one is served."""
    prompt: str | None = None
    """Prompt of all images; None for the bundle's own prompts: image k of a seed has prompt k. A bundle
    without text encoders takes only its own prompts, by text or as #index."""
    negative_prompt: str | None = None
    label: int | None = None
    """Class of all images, for class-conditional models."""
    guidance_scale: float | None = None
    count: int = 1
    """Number of images of one seed."""
    seed: int | None = None
    """Seed of the noise; drawn if None."""
    first_index: int = 0
    """Index of the first image within the seed."""
    seeds: tuple[int, ...] = ()
    """One image per seed, its image 0, in place of `count`, `seed` and `first_index`."""
    steps: int | None = None
    """Number of steps; the bundle's default if None."""
    height: int | None = None
    """Height in pixels; the model's own if None."""
    width: int | None = None
    """Width in pixels; the model's own if None."""
    quality: str = AUTO
    """Name of a level, or `auto` for the bundle's default."""
    degrade: bool | None = None
    """Whether the server may step down under load; if None, only with quality `auto` or with a least quality."""
    least_quality: str | None = None
    """The fastest level to which it may step down; None for the server's own limit."""
    image: bytes | Array | None = None
    """Image to start from: the bytes of a file, or samples [1 or count, channel, height, width]."""
    stretch: bool = False
    """Whether the image of a file is stretched to the size; otherwise it covers the size and is cut."""
    strength: float | None = None
    """Share of the steps that are made when starting from an image, in (0, 1]; 0.8 if None."""
    seconds: float | None = None
    """Time limit in seconds; the server's if None."""
    form: Format = Format.PNG
    """Format of the files in the answer, which limits the sides of images."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Names of these fields in the client's API, where they differ; messages use them."""

    def problem(self, name: str, message: str) -> RequestError:
        """Make the error for a wrong field; `{}` in the message stands for its name in the client's API."""
        shown = self.names.get(name, name)
        return RequestError(message.replace("{}", shown, 1), shown)

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self.seeds) or self.count

    @property
    def indices(self) -> Sequence[int]:
        """Index of each image within its seed."""
        return [0] * len(self.seeds) if self.seeds else range(self.first_index, self.first_index + self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A quality level of a served model."""

    name: str
    time_ratio: float
    """Time of the schedule / time of the full model, as the build measured it; 1 for the full model."""
    damage: Damage | None
    """Damage that the build measured; None for the full model, which has none."""

    @property
    def relative_l2(self) -> float:
        """Mean norm of the difference to the full model / norm of its output, dimensionless."""
        return 0.0 if self.damage is None else self.damage.relative_l2.mean

    @property
    def psnr(self) -> float | None:
        """Mean peak signal-to-noise ratio in dB; None for the full model."""
        return None if self.damage is None else self.damage.psnr.mean

    def to_builtins(self) -> dict[str, object]:
        """Describe the level for answers of APIs."""
        damage = None if self.damage is None else {"relative_l2": self.relative_l2, "psnr": self.psnr}
        return {"level": self.name, "time_ratio": self.time_ratio, "damage": damage}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageAnswer:
    """Finished images of a request."""

    model: str
    images: Array
    """[image, channel, height, width], mostly between -1 and 1."""
    seeds: tuple[int, ...]
    """Seed of each image."""
    indices: tuple[int, ...]
    """Index of each image within its seed."""
    level: Level
    """The level that made them."""
    degraded: bool
    """Whether the server stepped down from the level that was asked for."""
    steps: int
    """Engine calls per image."""
    non_finite_steps: int
    """Steps that the full model repeated."""
    waited: float
    """Seconds between submission and the first step."""
    took: float
    """Seconds between submission and the last image."""
    notes: tuple[str, ...] = ()
    """Warnings for the user, such as the words of a prompt that were cut."""

    def to_builtins(self) -> dict[str, object]:
        """Describe how the images were made, for answers of APIs; without the images."""
        return {
            "model": self.model,
            **self.level.to_builtins(),
            "degraded": self.degraded,
            "seeds": list(self.seeds),
            "indices": list(self.indices),
            "steps": self.steps,
            "non_finite_steps": self.non_finite_steps,
            "queue_seconds": self.waited,
            "seconds": self.took,
            "notes": list(self.notes),
        }

"""The fields by which the OpenAI and the jobs API describe images."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from unetc.errors import RequestError
from unetc.runtime.batching.ladder import AUTO

from .images import Format, decode_base64
from .service import ImageRequest

NAMES = {
    "count": "n",
    "steps": "num_inference_steps",
    "height": "size",
    "width": "size",
    "least_quality": "min_quality",
    "seeds": "seed",
    "seconds": "timeout",
    "form": "output_format",
}
"""Names of the fields of `ImageRequest` that differ here."""

_MOST_IMAGES = 256
"""Longest list of seeds; the server's limit on images is usually lower."""

Seed = Annotated[int, Field(ge=0)]


class ImageBody(BaseModel):
    """A description of images, and the form in which they are sent. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    prompt: str | None = None
    """Prompt of all images; without one, image k of a seed has the bundle's prompt k."""
    model: str | None = None
    """Name of the model; only needed if there are several."""
    n: int | None = None
    """Number of images; 1 if not given."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels, or auto for the model's own."""
    quality: str | None = None
    """Name of a quality level, such as full or 27%, or auto."""
    min_quality: str | None = None
    """The fastest level to which the server may step down under load."""
    degrade: bool | None = None
    """Whether it may step down."""
    seed: Seed | Annotated[list[Seed], Field(min_length=1, max_length=_MOST_IMAGES)] | None = None
    """Seed of the noise, or one seed per image."""
    num_inference_steps: int | None = None
    """Number of steps; the bundle's default if not given."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance."""
    negative_prompt: str | None = None
    """Description of things that the images should not show."""
    label: int | None = None
    """Class of the images, for class-conditional models."""
    image: str | None = None
    """Image to start from: a PNG, JPEG or WebP file as base64."""
    strength: float | None = None
    """Share of the steps that change the image, in (0, 1]."""
    timeout: float | None = None
    """Seconds after which the answer is of no use."""
    output_format: Format | None = None
    """png, jpeg or webp."""
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    """Quality of JPEG and WebP in per cent."""
    user: str | None = None
    """Accepted for the client's sake; not used."""
    safety_identifier: str | None = None
    """Accepted for the client's sake; not used."""
    background: Literal["auto", "opaque"] | None = None
    """Images are opaque."""
    moderation: Literal["auto"] | None = None
    """There is no moderation."""

    @field_validator("output_format", mode="before")
    @classmethod
    def _read_format(cls, value: object) -> object:
        """Take the name of a format, which strict reading would not."""
        try:
            return value if value is None else Format(str(value))
        except ValueError:
            raise ValueError(f"expected {', '.join(Format)}") from None

    def to_request(self) -> ImageRequest:
        """Make the request.

        Raises:
            RequestError: If a field is wrong.
        """
        width, height = _read_size(self.size)
        seeds = tuple(self.seed) if isinstance(self.seed, list) else ()
        if seeds and self.n not in (None, len(seeds)):
            raise RequestError(f"n is {self.n}, but there are {len(seeds)} seeds. Omit n, or send as many seeds.", "n")
        return ImageRequest(
            model=self.model,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            label=self.label,
            guidance_scale=self.guidance_scale,
            count=1 if self.n is None else self.n,
            seed=self.seed if isinstance(self.seed, int) else None,
            seeds=seeds,
            steps=self.num_inference_steps,
            height=height,
            width=width,
            quality=self.quality or AUTO,
            degrade=self.degrade,
            least_quality=self.min_quality,
            image=None if self.image is None else decode_base64(self.image, "image"),
            strength=self.strength,
            seconds=self.timeout,
            form=self.form,
            names=NAMES,
        )

    @property
    def form(self) -> Format:
        """Format of the images."""
        return self.output_format or Format.PNG


def _read_size(text: str | None) -> tuple[int | None, int | None]:
    """Read width and height; None for the model's own."""
    if text in (None, "auto"):
        return None, None
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if found is None:
        raise RequestError(f"size is {text[:40]!r}. Expected WIDTHxHEIGHT in pixels, such as 512x512, or auto.", "size")
    return int(found[1]), int(found[2])

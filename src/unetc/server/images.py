"""Images in requests and answers: encoded as PNG, JPEG or WebP, and decoded within limits."""

from __future__ import annotations

import base64
import binascii
import io
from enum import StrEnum

import numpy as np
from PIL import Image, ImageOps

from unetc.device import Array
from unetc.errors import RequestError
from unetc.models.images import to_colour
from unetc.report.pictures import to_pixels

_PNG_LEVEL = 4
"""Compression of PNG: twice as fast as the default for a few per cent more bytes."""


class Format(StrEnum):
    """A file format of images."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"

    @property
    def media_type(self) -> str:
        """Value for Content-Type."""
        return f"image/{self.value}"

    @property
    def longest_side(self) -> int:
        """Most pixels along a side that a file can hold."""
        return {Format.PNG: 2**31 - 1, Format.JPEG: 65500, Format.WEBP: 16383}[self]


def encode(images: Array, form: Format = Format.PNG, *, quality: int | None = None) -> list[bytes]:
    """Encode images.

    Args:
        images: [batch, channel, height, width] in [-1, 1]; latents are shown by their first channel.
        form: File format.
        quality: Quality of JPEG or WebP, from 0 to 100; their default when not given. Without effect on PNG.

    Returns:
        One file per image.
    """
    return [_encode(Image.fromarray(pixels), form, quality) for pixels in to_pixels(images)]


def encode_base64(images: Array, form: Format = Format.PNG, *, quality: int | None = None) -> list[str]:
    """Encode images as `encode` does, and the files as base64."""
    return [base64.b64encode(data).decode() for data in encode(images, form, quality=quality)]


def _encode(image: Image.Image, form: Format, quality: int | None) -> bytes:
    buffer = io.BytesIO()
    if form is Format.PNG:
        image.save(buffer, "PNG", compress_level=_PNG_LEVEL)
    elif quality is None:
        image.save(buffer, form.name)
    else:
        image.save(buffer, form.name, quality=quality)
    return buffer.getvalue()


def decode_base64(text: str, field: str) -> bytes:
    """Decode base64, with or without the prefix of a data URL.

    Raises:
        RequestError: If the text is not base64.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{field} is not base64. Send the file of an image, encoded as base64.", field) from error


def decode(data: bytes, field: str, *, most_pixels: int) -> Image.Image:
    """Decode the file of an image.

    Raises:
        RequestError: If it is not a PNG, JPEG or WebP image, or has too many pixels.
    """
    try:
        return _decode(data, field, most_pixels)
    except RequestError:
        raise
    except Exception as error:  # damaged files raise struct.error, IndexError and others too
        raise RequestError(f"{field} cannot be read. Expected a PNG, JPEG or WebP image.", field) from error


def _decode(data: bytes, field: str, most_pixels: int) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=[form.name for form in Format]) as opened:
        if opened.width * opened.height > most_pixels:  # before anything is unpacked
            raise RequestError(
                f"{field} has {opened.width} x {opened.height} pixels. Expected at most {most_pixels} in total.",
                field,
            )
        return to_colour(_upright(opened))


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF data says; damaged EXIF data is ignored."""
    image.load()  # outside the `try`: damage of the pixels is an error
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def to_samples(image: Image.Image, channels: int, height: int, width: int, *, stretch: bool = False) -> Array:
    """Scale an image until it covers a size, and cut it in the middle; or stretch it to the size.

    Returns:
        [1, channels, height, width] in [-1, 1]; grey for one channel.
    """
    converted = image.convert("L" if channels == 1 else "RGB")
    size, filtered = (width, height), Image.Resampling.LANCZOS
    fitted = converted.resize(size, filtered) if stretch else ImageOps.fit(converted, size, filtered)
    values = np.asarray(fitted, np.float32) / 127.5 - 1
    return values[None, None] if channels == 1 else values.transpose(2, 0, 1)[None]

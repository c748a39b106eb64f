"""Images for models that take some: read from a folder, or drawn.

Drawn images are dead leaves: overlapping discs of one colour each, whose radii follow a power law. They have edges,
flat regions and all scales, as photographs do, but no objects.

Source:
    Lee, Mumford and Huang 2001, "Occlusion models for natural images", DOI 10.1023/A:1011109015675.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from unetc.errors import MissingDependency, ModelError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
"""Endings of the names of image files, in lower case."""

_DISCS = 400
"""Discs of a drawn image; enough to cover nearly all of it."""
_LARGEST, _SMALLEST = 0.35, 0.015
"""Radii of the discs, relative to the shorter side of the image."""
_LEAST_SIDE, _MOST_SIDE = 0.25, 0.75
"""Sides of a masked rectangle, relative to the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """A source of images and masks; image k is the same whatever the number of images."""

    folder: Path | None = None
    """Folder of images, sorted by name; image k is file k modulo their number. None for drawn images."""
    seed: int = 0
    """Seed of drawn images, and of all masks."""

    def read(self, count: int, height: int, width: int) -> NDArray[np.float32]:
        """Read or draw images, [count, 3, height, width], in -1 to 1.

        Files are scaled until they cover the size, and cut in the middle.

        Raises:
            ModelError: If the folder has no images, or one cannot be read.
            MissingDependency: If pillow is not installed.
        """
        if self.folder is None:
            return np.stack([draw_image(self.seed, i, height, width) for i in range(count)])
        files = self._files()
        read = {path: read_image(path, height, width) for path in files[:count]}
        return np.stack([read[files[i % len(files)]] for i in range(count)])

    def masks(self, count: int, height: int, width: int) -> NDArray[np.float32]:
        """Draw masks, [count, 1, height, width]: 1 in one rectangle that is to be painted, 0 elsewhere."""
        return np.stack([draw_mask(self.seed, i, height, width) for i in range(count)])

    def sha256(self) -> str:
        """Hash the files in the folder, or the seed of drawn images.

        Raises:
            ModelError: If the folder has no images, or one cannot be read.
        """
        digest = hashlib.sha256(str(self.seed).encode())
        for path in () if self.folder is None else self._files():
            try:
                digest.update(path.read_bytes())
            except OSError as error:
                raise ModelError(f"cannot read {path}: {error.strerror}. Expected an image.") from error
        return digest.hexdigest()

    def _files(self) -> list[Path]:
        assert self.folder is not None
        return image_files(self.folder)


def image_files(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """List the images in a folder, sorted by name.

    Raises:
        ModelError: If the folder cannot be read, or has no images.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror}. Expected a folder of images.") from error
    if not files:
        raise ModelError(f"{folder} has no images. Expected files that end with {', '.join(suffixes)}.")
    return files


def draw_image(seed: int, index: int, height: int, width: int) -> NDArray[np.float32]:
    """Draw an image of overlapping discs, [3, height, width], in -1 to 1."""
    rng = np.random.default_rng((seed, index, 0))
    shares = rng.uniform(size=_DISCS)
    largest, smallest = _LARGEST**-2, _SMALLEST**-2
    radii = min(height, width) / np.sqrt(smallest + shares * (largest - smallest))  # density falls with the cube
    colours = rng.uniform(-1, 1, (_DISCS, 3)).astype(np.float32)
    centres = rng.uniform(size=(_DISCS, 2)) * (height, width)
    image = np.full((3, height, width), rng.uniform(-1, 1), np.float32)
    for centre, radius, colour in zip(centres, radii, colours, strict=True):
        box = [slice(max(0, int(middle - radius)), int(middle + radius) + 1) for middle in centre]
        part = image[:, box[0], box[1]]
        rows, columns = np.ogrid[: part.shape[1], : part.shape[2]]
        down, across = (side.start + 0.5 - middle for side, middle in zip(box, centre, strict=True))
        part[:, (rows + down) ** 2 + (columns + across) ** 2 < radius**2] = colour[:, None]
    return image


def draw_mask(seed: int, index: int, height: int, width: int) -> NDArray[np.float32]:
    """Draw a mask with one rectangle, [1, height, width], 0 or 1."""
    rng = np.random.default_rng((seed, index, 1))
    mask = np.zeros((1, height, width), np.float32)
    parts = []
    for size in (height, width):
        side = max(1, round(size * rng.uniform(_LEAST_SIDE, _MOST_SIDE)))
        first = int(rng.integers(0, size - side + 1))
        parts.append(slice(first, first + side))
    mask[0, parts[0], parts[1]] = 1
    return mask


def to_colour(image: Image.Image) -> Image.Image:
    """Convert an image to RGB. Grey values of 16 bits, which Pillow would clip at 255, are scaled.

    Raises:
        ValueError: If the values are floating point numbers, whose range nobody knows.
    """
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its values are floating point numbers")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")


def read_image(path: Path, height: int, width: int, *, channels: int = 3) -> NDArray[np.float32]:
    """Read an image, cropped and scaled to a size.

    Args:
        path: A PNG, JPEG or WebP file.
        height: Height in pixels.
        width: Width in pixels.
        channels: 3 for colours, 1 for grey.

    Returns:
        [channel, height, width] in -1 to 1.

    Raises:
        ModelError: If the file cannot be read.
        MissingDependency: If pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingDependency("reading images needs pillow: pip install pillow") from error
    try:
        with Image.open(path) as opened:
            image = ImageOps.fit(
                to_colour(ImageOps.exif_transpose(opened)).convert("L" if channels == 1 else "RGB"),
                (width, height),
                Image.Resampling.LANCZOS,
            )
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ModelError(f"cannot read {path}: {error}. Expected a PNG, JPEG or WebP image.") from error
    pixels = np.asarray(image, np.float32).reshape(height, width, channels)
    return (pixels / 127.5 - 1).transpose(2, 0, 1)

"""Samples as pictures: 8-bit pixels, contact sheets and PNG bytes."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unetc.errors import ShapeMismatch

GAP = 6
"""White pixels between the pictures of a grid."""
_LEGIBLE = 128
"""Smaller pictures are enlarged towards this many pixels along their longer side."""

Samples = NDArray[np.floating[Any]]


def to_visible(samples: Samples) -> Samples:
    """Choose the channels to show as grey or colour.

    Args:
        samples: [batch, channel, height, width] in [-1, 1].

    Returns:
        [batch, 1 or 3, height, width] in [-1, 1]. Samples with other channel counts (latents) are reduced to their
        first channel, divided by its largest magnitude in the batch.

    Raises:
        ShapeMismatch: If the samples do not have four axes.
    """
    if samples.ndim != 4:
        raise ShapeMismatch(f"samples have shape {samples.shape}. Expected [batch, channel, height, width].")
    if samples.shape[1] in (1, 3):
        return samples
    first = samples[:, :1]
    return first / max(float(np.abs(first).max(initial=0)), 1e-30)


def to_pixels(samples: Samples) -> NDArray[np.uint8]:
    """Round samples to 8-bit pixels; values outside [-1, 1] are clipped.

    Args:
        samples: [batch, channel, height, width] in [-1, 1].

    Returns:
        [batch, height, width] for grey, [batch, height, width, 3] for colour; -1 becomes 0 and 1 becomes 255.

    Raises:
        ShapeMismatch: If the samples do not have four axes.
    """
    levels = np.rint((np.clip(to_visible(samples), -1, 1) + 1) * 127.5).astype(np.uint8)
    return levels[:, 0] if levels.shape[1] == 1 else np.moveaxis(levels, 1, -1)


def grid(samples: Samples, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Arrange samples on a white sheet, row by row.

    Args:
        samples: [batch, channel, height, width] in [-1, 1], batch >= 1.
        columns: Pictures per row; by default the sheet is roughly square.
        scale: Integer factor that enlarges every pixel; by default small pictures become easy to see.

    Returns:
        A grey or colour picture with `GAP` pixels between the samples.

    Raises:
        ShapeMismatch: If the samples do not have four axes, or there is no sample.
    """
    pixels = to_pixels(samples)
    batch, height, width = pixels.shape[:3]
    if batch == 0:
        raise ShapeMismatch("there is no sample to show. Expected a batch of at least 1.")
    columns = min(columns or math.ceil(math.sqrt(batch)), batch)
    scale = scale or max(1, _LEGIBLE // max(height, width))
    rows = math.ceil(batch / columns)
    cell_width, cell_height = width * scale + GAP, height * scale + GAP
    mode, white = ("L", 255) if pixels.ndim == 3 else ("RGB", (255, 255, 255))
    sheet = Image.new(mode, (columns * cell_width - GAP, rows * cell_height - GAP), white)
    for i, picture in enumerate(pixels):
        large = Image.fromarray(picture).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        sheet.paste(large, (i % columns * cell_width, i // columns * cell_height))
    return sheet


def png_bytes(image: Image.Image) -> bytes:
    """Encode a picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

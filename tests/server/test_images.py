"""Files of images in requests, and the limits of those in answers."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from unetc.errors import RequestError
from unetc.server.images import decode, to_samples


def file_of(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def read(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(decode(data, "image", most_pixels=4096))


def test_grey_values_of_16_bits_are_scaled() -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    pixels = read(file_of(Image.fromarray(values)))
    assert pixels[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_other_modes_are_taken(mode: str) -> None:
    assert read(file_of(Image.new("RGB", (3, 2), "white").convert(mode))).tolist() == [[[255] * 3] * 3] * 2


def test_an_image_is_cut_or_stretched_to_the_size() -> None:
    """The halves of a wide picture stay both when it is stretched; cutting leaves the middle."""
    values = np.repeat(np.array([[0] * 8 + [255] * 24], np.uint8), 16, axis=0)
    image = Image.fromarray(values)
    cut, stretched = to_samples(image, 1, 16, 16), to_samples(image, 1, 16, 16, stretch=True)
    assert cut.shape == stretched.shape == (1, 1, 16, 16)
    assert cut.min() == 1
    assert stretched[0, 0, 0, [0, 15]].tolist() == [-1, 1]
    assert to_samples(image, 3, 8, 4, stretch=True).shape == (1, 3, 8, 4)


def test_damaged_exif_data_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(Image.new("RGB", (3, 2)), "JPEG", exif=exif)
    assert read(data).shape == (3, 2, 3), "turned"

    def fail(_: object) -> None:
        raise struct.error

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    assert read(data).shape == (2, 3, 3)


@pytest.mark.parametrize("problem", [IndexError, KeyError, AssertionError])
def test_whatever_pillow_raises_is_an_error_of_the_request(
    monkeypatch: pytest.MonkeyPatch, problem: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(RequestError, match="image cannot be read"):
        read(file_of(Image.new("RGB", (3, 2))))

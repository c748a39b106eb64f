"""Images for models that take some are read or drawn the same every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unetc.errors import ModelError
from unetc.models.control_images import ControlSource
from unetc.models.images import Images, draw_image, draw_mask


def test_drawn_images_and_masks_depend_on_seed_and_index_alone() -> None:
    images, masks = Images(seed=3).read(3, 20, 30), Images(seed=3).masks(3, 20, 30)
    assert images.shape == (3, 3, 20, 30)
    np.testing.assert_array_equal(images[2], draw_image(3, 2, 20, 30))
    np.testing.assert_array_equal(masks[2], draw_mask(3, 2, 20, 30))
    assert np.abs(images).max() <= 1
    assert len({image.tobytes() for image in (*images, draw_image(4, 0, 20, 30))}) == 4
    assert images[0].std() > 0.1
    for mask in masks[:, 0]:
        rows, columns = np.nonzero(mask)
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all(), "a mask is one rectangle"
        assert 0.05 < mask.mean() < 0.6


def test_files_cover_the_size_and_are_cut_in_the_middle(tmp_path: Path) -> None:
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 255
    Image.fromarray(stripes).save(tmp_path / "b.png")
    Image.new("L", (5, 5), 0).save(tmp_path / "a.PNG")
    (tmp_path / "notes.txt").write_text("not an image")
    images = Images(folder=tmp_path)
    black, white, again = images.read(3, 10, 10)
    assert (black == -1).all()
    assert (white == 1).all()
    np.testing.assert_array_equal(again, black)
    before = images.sha256()
    Image.new("L", (5, 5), 9).save(tmp_path / "a.PNG")
    assert images.sha256() != before


def test_grey_values_of_16_bits_are_scaled(tmp_path: Path) -> None:
    ramp = np.repeat((np.arange(64) / 63 * 65535).round().astype(np.uint16)[None], 64, axis=0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    expected = np.linspace(-1, 1, 64)
    assert np.abs(Images(folder=tmp_path).read(1, 64, 64)[0, :, 5] - expected).max() < 1 / 127
    control = ControlSource(model=tmp_path, images=tmp_path)._read_images((64, 64))
    assert np.abs(control[0][:, 5] - (expected + 1) / 2).max() < 1 / 255


def test_floating_point_values_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.png", "TIFF")
    with pytest.raises(ModelError, match=r"a\.png.*floating point numbers"):
        Images(folder=tmp_path).read(1, 8, 8)


def test_bad_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no images"):
        Images(folder=tmp_path).read(1, 8, 8)
    with pytest.raises(ModelError, match="Expected a folder of images"):
        Images(folder=tmp_path / "missing").read(1, 8, 8)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ModelError, match=r"a\.png.*Expected a PNG"):
        Images(folder=tmp_path).read(1, 8, 8)

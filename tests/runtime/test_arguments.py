"""Arguments of a session that do not fit are refused in words, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import unetc
from unetc.errors import ModelError, SessionError, ShapeMismatch
from unetc.runtime.session import Session

SAMPLE = np.zeros((2, 1, 16, 16), np.float32)


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Session:
    return unetc.load(tiny_bundle, target="null")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strength": 0.5}, SessionError, "strength is 0.5, and no image is given"),
        ({"image": SAMPLE, "strength": 0.01, "steps": 4}, SessionError, "ddim: strength 0.01 makes none of 4 steps"),
        ({"image": SAMPLE[0]}, ShapeMismatch, r"shape \(1, 16, 16\); expected \[batch, 1, height, width\]"),
        ({"image": np.zeros((2, 3, 16, 16))}, ShapeMismatch, r"expected \[batch, 1, height, width\]"),
        ({"image": SAMPLE, "noise": SAMPLE[:1]}, ShapeMismatch, "Give both in one shape"),
        ({"image": SAMPLE, "height": 32}, ShapeMismatch, "an image of 16 x 16 and another height or width"),
        ({"noise": SAMPLE[0]}, ShapeMismatch, r"noise has shape \(1, 16, 16\)"),
        ({"noise": SAMPLE, "width": 16}, ShapeMismatch, "noise and a height or width are given"),
        ({"width": 0}, ShapeMismatch, "images of width 0. Expected a multiple of 1"),
        ({"batch": 0}, ShapeMismatch, "a batch of 0; expected at least 1"),
    ],
)
def test_they_are_refused(session: Session, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        session.sample(**arguments)


def test_labels_are_refused_by_a_model_without_classes(session: Session) -> None:
    with pytest.raises(ModelError, match="has no classes, so it takes no labels"):
        session.encode_labels([3])


def test_an_image_is_its_own_sample_without_a_decoder(session: Session) -> None:
    assert session.encode(SAMPLE.astype(np.float64)).dtype == np.float32

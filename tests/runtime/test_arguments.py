"""Arguments of a session that do not fit are refused in words, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unetc
from unetc.errors import ModelError, SessionError, ShapeMismatch
from unetc.runtime.session import Session
from unetc.sampler.noise import initial_noise, step_noise

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
        ({"batch": 2.0}, SessionError, r"batch is 2\.0, a float\. Expected a whole number"),
        ({"height": 16.0}, SessionError, r"height is 16\.0, a float"),
        ({"width": "16"}, SessionError, "width is '16', a str"),
        ({"seed": 1.5}, SessionError, r"seed is 1\.5, a float"),
        ({"seed": None}, SessionError, "seed is None, a NoneType"),
        ({"first_index": 0.5}, SessionError, r"first_index is 0\.5, a float"),
        ({"steps": "4"}, SessionError, "steps is '4', a str"),
        ({"image": SAMPLE, "strength": None}, SessionError, "strength is None, a NoneType. Expected a number"),
        ({"strength": "0.5"}, SessionError, "strength is '0.5', a str"),
        ({"image": SAMPLE, "strength": float("nan")}, SessionError, "strength is nan, a float. Expected a number"),
        ({"seed": True}, SessionError, "seed is True, a bool. Expected a whole number"),
        ({"batch": np.True_}, SessionError, "batch is .*True_?, a bool"),
        ({"noise": [[1]]}, SessionError, "noise: got elements of type int64. Expected floats"),
        ({"noise": [[1.0], [1.0, 2.0]]}, SessionError, "cannot read noise as an array"),
        ({"image": SAMPLE.astype(np.uint8)}, SessionError, "image: got elements of type uint8"),
        ({"conditions": ["a red square"]}, SessionError, "conditions: got a list. Expected Conditions"),
    ],
)
def test_they_are_refused(session: Session, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        session.sample(**arguments)


def test_a_number_of_steps_and_a_strength_are_read_everywhere(session: Session) -> None:
    table = session.scheduler.table(session.steps)
    assert session.schedule(np.int64(session.steps)) == session.schedule(session.steps)  # type: ignore[arg-type]
    assert session.first_step(table, np.float32(0.5)) == session.first_step(table, 0.5)  # type: ignore[arg-type]
    for other in ("4", None, True):
        with pytest.raises(SessionError, match=r"^steps is "):
            session.schedule(other)  # type: ignore[arg-type]
        with pytest.raises(SessionError, match=r"strength is .* Expected a number"):
            session.first_step(table, other)  # type: ignore[arg-type]


def test_threads_are_a_whole_number(tiny_bundle: Path) -> None:
    with pytest.raises(SessionError, match=r"threads is '2', a str. Expected a whole number"):
        unetc.load(tiny_bundle, target="null", threads="2")  # type: ignore[arg-type]


def test_labels_are_refused_by_a_model_without_classes(session: Session) -> None:
    with pytest.raises(ModelError, match="has no classes, so it takes no labels"):
        session.encode_labels([3])


def test_arrays_of_other_libraries_and_numbers_of_numpy_are_taken(session: Session) -> None:
    expected = session.sample(noise=SAMPLE)
    for noise in (torch.from_numpy(SAMPLE), SAMPLE.tolist(), SAMPLE.astype(np.float16)):
        np.testing.assert_array_equal(session.sample(noise=noise), expected)  # type: ignore[arg-type]
    numbers: dict[str, Any] = {"seed": np.int64(3), "batch": np.uint8(2), "height": np.int32(16)}
    np.testing.assert_array_equal(session.sample(**numbers), session.sample(2, seed=3))


def test_images_of_bytes_are_refused(session: Session) -> None:
    with pytest.raises(SessionError, match=r"images: got elements of type uint8\. Expected floats in -1 to 1"):
        session.encode(SAMPLE.astype(np.uint8))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_a_seed_that_is_not_whole_draws_no_noise(seed: Any) -> None:
    for draw in (lambda: initial_noise(seed, [0], (1, 2, 2)), lambda: step_noise(seed, [0], 0, (1, 2, 2))):
        with pytest.raises(SessionError, match="Expected a whole number"):
            draw()


def test_an_image_is_its_own_sample_without_a_decoder(session: Session) -> None:
    assert session.encode(SAMPLE.astype(np.float64)).dtype == np.float32

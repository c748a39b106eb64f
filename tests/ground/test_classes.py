"""Classes, their names, and `labels.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unetc.artifacts.classes import Classes
from unetc.call import CLASS_LABELS
from unetc.class_labels import MOST_LABELS, encode_labels, spread_labels
from unetc.errors import ModelError, SessionError
from unetc.models.labels import LABELS, read_classes


@st.composite
def some_classes(draw: st.DrawFn) -> Classes:
    """Draw classes with and without names, and with and without a label that means none."""
    count = draw(st.integers(1, 200))
    no_class = draw(st.none() | st.integers(0, count - 1))
    named = count - (no_class is not None)
    names = tuple(f"name {index}" for index in range(named)) if draw(st.booleans()) else ()
    return Classes(count=count, names=names, no_class=no_class)


@given(some_classes())
def test_every_class_is_found_by_its_word_and_its_number(classes: Classes) -> None:
    assert [classes.find(word) for word in classes.words] == [*classes.labels]
    assert [classes.find(word.upper()) for word in classes.words] == [*classes.labels]
    assert [classes.find(str(label)) for label in range(classes.count)] == [*range(classes.count)]
    assert classes.find(str(classes.count)) is None
    assert classes.find("") is None


@given(some_classes())
def test_spread_labels_are_classes(classes: Classes) -> None:
    spread = spread_labels(classes)
    assert len({*spread}) == len(spread) == min(MOST_LABELS, len(classes.labels))
    assert {*spread} <= {*classes.words}
    assert spread == spread_labels(classes)


@pytest.mark.parametrize("labels", ["10", 10, np.int64(10), ["10"], (10,), np.array([10]), np.array(10)])
def test_a_label_alone_is_a_list_of_one(labels: Any) -> None:
    conditions = encode_labels("the model", labels, Classes(count=12))
    assert conditions.own[CLASS_LABELS].tolist() == [10]


@pytest.mark.parametrize("labels", [1.5, True, None, [None], b"1"])
def test_what_is_no_label_is_refused(labels: Any) -> None:
    with pytest.raises(SessionError, match=r"^labels is .*Expected the number or the name of a class"):
        encode_labels("the model", labels, Classes(count=12))


def test_a_name_without_a_class_is_refused() -> None:
    classes = Classes(count=3, names=("cat", "dog"), no_class=2)
    with pytest.raises(ModelError, match=r"takes labels of its 2 classes, got 'cow'\. Expected .* or cat, dog"):
        encode_labels("the model", ["cow"], classes)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "does not hold a JSON object"),
        ("{", "cannot read"),
        ('{"classes": ["cat"]}', "unknown field `classes`"),
        ('{"names": "cat"}', "Expected `array`"),
        ('{"names": ["cat", "dog"]}', "2 classes have names, there are 3 labels"),
        ('{"names": ["cat", "dog", "cow"], "no_class": 2}', "3 classes have names"),
        ('{"no_class": 3}', "no_class is 3, but there are 3 labels"),
        ('{"no_class": -1}', "no_class is -1"),
        ('{"names": ["cat", "Cat", "cow"]}', "the same name"),
        ('{"names": ["cat", "7", "cow"]}', "'7' cannot be the name"),
        ('{"names": ["cat", "dog, cow", "cow"]}', "'dog, cow' cannot be the name"),
        ('{"names": ["cat", "", "cow"]}', "'' cannot be the name"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / LABELS).write_text(text)
    with pytest.raises(ModelError, match=problem) as caught:
        read_classes(tmp_path, 3)
    assert str(tmp_path / LABELS) in str(caught.value)


def test_a_file_names_the_classes(tmp_path: Path) -> None:
    assert read_classes(tmp_path, 3) == Classes(count=3)
    (tmp_path / LABELS).write_text('{"names": ["cat", "dog"], "no_class": 0}')
    classes = read_classes(tmp_path, 3)
    assert (classes.find("cat"), classes.find("dog"), classes.no_class) == (1, 2, 0)

"""The project is written in plain English."""

from __future__ import annotations

import pytest

from tests.house.prose import BODIES, measure

CALQUES_PER_THOUSAND_WORDS = 1.0
WORDS_PER_SENTENCE = 17


@pytest.mark.parametrize(
    "body", [pytest.param(body, marks=[pytest.mark.nightly] * (body == "tests and benchmarks")) for body in BODIES]
)
def test_sentences_are_short_and_idiomatic(body: str) -> None:
    found = measure(BODIES[body]())
    assert found.words > 1000
    assert found.median <= WORDS_PER_SENTENCE
    assert found.calques_per_thousand <= CALQUES_PER_THOUSAND_WORDS, "\n".join(found.calques)

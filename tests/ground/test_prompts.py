"""Notes about prompts that are longer than a text encoder reads."""

from __future__ import annotations

import pytest

from unetc.models.prompts import cut_note


def test_a_note_shows_all_lost_words_if_they_are_few() -> None:
    note = cut_note("a large red circle", 4, "red circle")
    assert note == "the prompt 'a large red circle'… is cut at 4 tokens; lost: 'red circle'. Shorten it"


@pytest.mark.parametrize("lost", ["word " * 1000, "x" * 5000, "one " + "y" * 300])
def test_a_note_of_a_very_long_prompt_is_short(lost: str) -> None:
    note = cut_note(lost, 77, lost.strip())
    assert len(note) < 300
    shown, end = note.partition("lost: '")[2].split("'… and ")
    assert lost.startswith(shown)
    assert end == f"{len(lost.strip()) - len(shown)} more characters. Shorten it"

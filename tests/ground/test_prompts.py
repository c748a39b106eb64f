"""Prompts are read and checked; notes tell of those that are longer than a text encoder reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from unetc.errors import SessionError, ShapeMismatch
from unetc.models.prompts import cut_note, list_prompts, read_prompts


def test_a_file_has_a_prompt_per_line_however_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red square\r\n\n one\x0ctwo\u2028three \rlast".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ("a red square", "one\x0ctwo\u2028three", "last")


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ShapeMismatch, "there is no prompt"),
        (["a", 3], SessionError, "prompts is 3, a int. Expected text"),
        (3, SessionError, "prompts is 3, a int. Expected text"),
        (["a \udcff b"], SessionError, "is not Unicode text: surrogates not allowed"),
    ],
)
def test_prompts_that_no_tokenizer_takes_are_refused(prompts: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list_prompts(prompts)


def test_a_text_alone_is_one_prompt() -> None:
    assert list_prompts("a red square") == list_prompts(("a red square",)) == ["a red square"]


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

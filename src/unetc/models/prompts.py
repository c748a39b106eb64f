"""Prompts used to measure a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from unetc.arguments import texts
from unetc.call import AESTHETIC_NUMBERS
from unetc.errors import ModelError, SessionError, ShapeMismatch

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""Default scores in diffusers, for a pipeline whose size numbers end with one."""

PROMPTS = "prompts.txt"
"""Name of the file of prompts, one per line; the file next to this module serves models that have no such file."""

_LINE_ENDS = re.compile(r"\r?\n|\r")
"""Ends of lines in text files; `str.splitlines` also ends one at a form feed."""
_MOST_LOST = 120
"""Most characters of the lost words that a note shows."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read one prompt per line; empty lines are skipped.

    Raises:
        ModelError: If the file cannot be read, or holds no prompt.
    """
    try:
        prompts = tuple(line.strip() for line in _LINE_ENDS.split(path.read_text("utf-8-sig")) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot read prompts from {path}: {error}"
        raise ModelError(f"{reason}. Expected a text file with one prompt per line.") from error
    if not prompts:
        raise ModelError(f"{path} holds no prompt. Expected one per line.")
    return prompts


def list_prompts(prompts: str | Sequence[str]) -> list[str]:
    """List prompts, and refuse those that no tokenizer takes.

    Args:
        prompts: One prompt per row; a text alone is one prompt.

    Raises:
        SessionError: If there is none, or one is no text, or cannot be written in UTF-8.
    """
    listed = texts("prompts", prompts, SessionError)
    if not listed:
        raise ShapeMismatch("there is no prompt. Give one per image.")
    for prompt in listed:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            shown = prompt[:40]
            raise SessionError(f"the prompt {shown!r} is not Unicode text: {error.reason}. Write it again.") from error
    return [*listed]


def cut_note(prompt: str, tokens: int, lost: str) -> str:
    """Describe a prompt that is longer than a text encoder reads.

    Args:
        prompt: The prompt.
        tokens: Number of tokens that are read.
        lost: The words that are not read.
    """
    end = ""
    if len(lost) > _MOST_LOST:
        shown = lost[:_MOST_LOST].rpartition(" ")[0] or lost[:_MOST_LOST]
        end = f"… and {len(lost) - len(shown)} more characters"
        lost = shown
    return f"the prompt {prompt[:40]!r}… is cut at {tokens} tokens; lost: {lost!r}{end}. Shorten it"


def size_numbers(size: tuple[int, int], count: int, score: float) -> tuple[float, ...]:
    """List SDXL's `time_ids` of an image that is not cropped.

    Args:
        size: Height and width of the image in pixels.
        count: Number of size numbers that the denoiser takes.
        score: Aesthetic score, which is the last number if there are `AESTHETIC_NUMBERS`.
    """
    return *map(float, size), 0.0, 0.0, *((score,) if count == AESTHETIC_NUMBERS else map(float, size))

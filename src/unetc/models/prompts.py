"""Prompts used to measure a model."""

from __future__ import annotations

from pathlib import Path

from unetc.errors import ModelError

PROMPTS = "prompts.txt"
"""Name of the file of prompts, one per line; the file next to this module serves models that have no such file."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read one prompt per line; empty lines are skipped.

    Raises:
        ModelError: If the file cannot be read, or holds no prompt.
    """
    try:
        prompts = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot read prompts from {path}: {error}"
        raise ModelError(f"{reason}. Expected a text file with one prompt per line.") from error
    if not prompts:
        raise ModelError(f"{path} holds no prompt. Expected one per line.")
    return prompts

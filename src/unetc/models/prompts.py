"""Prompts that a model is measured on."""

from __future__ import annotations

from pathlib import Path

from unetc.errors import ModelError

PROMPTS = "prompts.txt"
"""Prompts to measure a model on, one a line; the file beside this module is for models without their own."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read one prompt a line; empty lines are skipped.

    Raises:
        ModelError: If the file cannot be read or holds no prompt.
    """
    try:
        prompts = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read prompts from {path}: {error}. Expected a text file with one a line.") from error
    if not prompts:
        raise ModelError(f"{path} holds no prompt. Expected one a line.")
    return prompts

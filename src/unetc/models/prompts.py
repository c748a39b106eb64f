"""Prompts or class labels used to measure a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unetc.call import AESTHETIC_NUMBERS, CLASS_LABELS
from unetc.conditions import Conditions
from unetc.errors import ModelError

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""Default scores in diffusers, for a pipeline whose size numbers end with one."""

MOST_LABELS = 64
"""Most labels that a model is measured with by default."""

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


def cut_note(prompt: str, tokens: int, lost: str) -> str:
    """Describe a prompt that is longer than a text encoder reads.

    Args:
        prompt: The prompt.
        tokens: Number of tokens that are read.
        lost: The words that are not read.
    """
    return f"the prompt {prompt[:40]!r}… is cut at {tokens} tokens; lost: {lost!r}. Shorten it"


def size_numbers(size: tuple[int, int], count: int, score: float) -> tuple[float, ...]:
    """List SDXL's `time_ids` of an image that is not cropped.

    Args:
        size: Height and width of the image in pixels.
        count: Number of size numbers that the denoiser takes.
        score: Aesthetic score, which is the last number if there are `AESTHETIC_NUMBERS`.
    """
    return *map(float, size), 0.0, 0.0, *((score,) if count == AESTHETIC_NUMBERS else map(float, size))


def read_labels(text: str) -> tuple[int, ...]:
    """Read class labels, as in '0,3,7'.

    Raises:
        ModelError: If the text is not a list of whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ModelError(f"cannot read the labels {text!r}. Expected whole numbers, as in 0,3,7.") from error


def spread_labels(classes: int) -> tuple[str, ...]:
    """Spread labels evenly over all classes, in an order that mixes small and large ones.

    Args:
        classes: Number of classes.

    Returns:
        At most `MOST_LABELS` different labels. The same number of classes always gives the same labels.
    """
    count = min(classes, MOST_LABELS)
    labels = np.arange(count) * classes // count
    return tuple(map(str, np.random.default_rng(0).permutation(labels).tolist()))


def encode_labels(name: str, labels: Sequence[str], classes: int) -> Conditions:
    """Turn labels of classes into conditions.

    Args:
        name: Name of the model, for error messages.
        labels: One label per row, as a number.
        classes: Number of classes of the model.

    Raises:
        ModelError: If a label is not the number of a class.
    """
    known = {str(label): label for label in range(classes)}
    for label in labels:
        if label not in known:
            raise ModelError(
                f"{name} takes labels of its {classes} classes, got {label!r}. Expected whole numbers from 0 to "
                f"{classes - 1}: pass them with --labels."
            )
    return Conditions(own={CLASS_LABELS: np.array([known[label] for label in labels], np.int64)})

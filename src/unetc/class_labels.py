"""Labels of classes, as conditions of a class-conditional denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import arguments
from .artifacts.classes import Classes
from .call import CLASS_LABELS
from .conditions import Conditions, read_scale
from .errors import ModelError, SessionError

MOST_LABELS = 64
"""Most labels that a model is measured with by default."""


def spread_labels(classes: Classes) -> tuple[str, ...]:
    """Spread labels evenly over all classes, in an order that mixes small and large ones.

    Returns:
        At most `MOST_LABELS` different classes, in words. The same classes always give the same words.
    """
    words = classes.words
    count = min(len(words), MOST_LABELS)
    chosen = np.arange(count) * len(words) // count
    return tuple(words[index] for index in np.random.default_rng(0).permutation(chosen).tolist())


def encode_labels(name: str, labels: Sequence[str | int], classes: Classes, guidance_scale: float = 1.0) -> Conditions:
    """Turn labels of classes into conditions.

    Args:
        name: Name of the model, for error messages.
        labels: One class per row, by number or by name; one alone is a list of one.
        classes: Classes of the model.
        guidance_scale: Scale of classifier-free guidance; 1 or less means no guidance.

    Raises:
        ModelError: If a label means no class of the model, or it cannot be guided.
        SessionError: If a label is neither a number nor text, or the scale is no number, or out of range.
    """
    guidance_scale = read_scale(guidance_scale)
    found = []
    for one in arguments.labels("labels", labels, SessionError):
        if (number := classes.find(str(one))) is None:
            raise ModelError(
                f"{name} takes labels of its {len(classes.labels)} classes, got {str(one)!r}. Expected "
                f"{classes.describe()}: pass them with --labels."
            )
        found.append(number)
    own = {CLASS_LABELS: np.array(found, np.int64)}
    if guidance_scale <= 1:
        return Conditions(own=own)
    if classes.no_class is None:
        raise ModelError(
            f"{name} has no guidance: none of its labels means no class. Omit the guidance scale, or, if one does, "
            "name it as no_class in labels.json next to model_index.json."
        )
    negative = {CLASS_LABELS: np.full(len(found), classes.no_class, np.int64)}
    return Conditions(own=own, negative=negative, scale=guidance_scale)

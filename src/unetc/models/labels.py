"""`labels.json` of a model folder: names of the classes, and the label that means no class.

diffusers has no place for either in a folder of an unconditional pipeline, so the file is one of our own. It looks like
`{"names": ["cat", "dog"], "no_class": 2}`; both keys may be absent.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from unetc.artifacts.classes import Classes
from unetc.errors import ModelError

from .folder import read_json

LABELS = "labels.json"


class _Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    names: tuple[str, ...] = ()
    no_class: int | None = None


def read_classes(folder: Path, count: int) -> Classes:
    """Read what the labels of a denoiser mean; without a file, they are numbers of classes.

    Args:
        folder: Folder of the pipeline.
        count: Number of labels that the denoiser takes.

    Raises:
        ModelError: If the file cannot be read, or does not fit the denoiser.
    """
    path = folder / LABELS
    if not path.is_file():
        return Classes(count=count)
    try:
        named = msgspec.convert(read_json(path), _Named)
        return Classes(count=count, names=named.names, no_class=named.no_class)
    except (msgspec.ValidationError, ValueError) as error:
        raise ModelError(
            f"{path} does not fit the denoiser, which takes {count} labels: {error}. Expected names of the classes "
            'and the label that means no class, as in {"names": ["cat", "dog"], "no_class": 2}.'
        ) from error

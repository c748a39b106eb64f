"""The text encoders of a bundle: exported, and checked against the pipeline that they come from."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
from filelock import FileLock

from unetc.artifacts.manifest import BundleText, BundleTextEncoder
from unetc.artifacts.reading import sha256_of
from unetc.artifacts.record import Record, read_cached, write_atomically
from unetc.compiler.graph.text import export_text
from unetc.errors import ArtifactError, CompileError
from unetc.models.model import Model
from unetc.models.text import TextEncoders, added_tokens
from unetc.models.text_graphs import guidance_frequencies, text_parts, zero_negative
from unetc.runtime.backends.registry import DEFAULT_TARGET, open_backend
from unetc.runtime.text import OneEncoder, TextEncoder

from .prepare import Prepared

FOLDER = "text/"
"""Folder of the files in a bundle."""

TOLERANCE = 1e-4
"""Largest accepted difference between conditions of bundle and pipeline, relative to the largest number."""

PROBES = (
    "",
    "a photo of a cat",
    "A PHOTO of a Cat, 42 times (really!?) -- it's #1 & 3.14",
    "naïve Émigré, 日本語の猫, кошка 👍🏽",
    "many words " * 60,
)
"""Prompts on which the encoders are checked, in addition to the model's own."""

_OWN = 3
"""Number of the model's own prompts to check on."""
_ADDED = 16
"""Number of tokens of textual inversions to check on."""
_RECORD = "text.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedText:
    """Exported text encoders."""

    text: BundleText
    files: Mapping[str, Path]
    """Their files by the path in a bundle."""


class _Exported(Record, frozen=True, kw_only=True):
    """Record of exported text encoders in the cache."""

    text: BundleText
    sha256: dict[str, str]
    """Hash of every file by its path in a bundle."""


def prepare_text(prepared: Prepared) -> PreparedText | None:
    """Export the text encoders of a model, or read the files that an earlier command exported.

    Returns:
        The encoders, equal to the pipeline's on `PROBES`; None for a model that takes no prompts.

    Raises:
        ModelError: If an encoder is not supported.
        CompileError: If an encoder cannot be exported, or the exported one encodes otherwise.
        ArtifactError: If the cache cannot be written.
    """
    model = prepared.model
    versions = version("torch"), version("transformers"), version("tokenizers")
    key = hashlib.sha256(repr((model.reference.text_sha256, versions)).encode()).hexdigest()[:16]
    folder = prepared.work / f"text-{key}"
    try:
        with FileLock(prepared.work / "text.lock"):
            if (text := _read(folder)) is None:
                loaded = model.load_text()
                if loaded is None:
                    return None
                text = _export(loaded, model, folder)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error.strerror}. Choose another folder with --cache.") from error
    return PreparedText(text=text, files={path: folder / Path(path).name for path in files_of(text)})


def _read(folder: Path) -> BundleText | None:
    """Read what an earlier command exported; None if a file is missing or has changed."""
    if (exported := read_cached(folder / _RECORD, _Exported)) is None:
        return None
    try:
        same = all(sha256_of(folder / Path(path).name) == expected for path, expected in exported.sha256.items())
    except OSError:
        return None
    return exported.text if same else None


def files_of(text: BundleText) -> tuple[str, ...]:
    """List the files of text encoders by their path in a bundle."""
    return tuple(path for one in text.encoders for path in (one.graph, one.weights, one.tokenizer))


def _export(loaded: TextEncoders, model: Model, folder: Path) -> BundleText:
    """Export text encoders into a folder; the record is written last, after the check."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    encoders = []
    for i, part in enumerate(text_parts(loaded)):
        facts = BundleTextEncoder(
            graph=f"{FOLDER}encoder-{i}.onnx",
            weights=f"{FOLDER}encoder-{i}.safetensors",
            tokenizer=f"{FOLDER}tokenizer-{i}.json",
            length=part.length,
            padding=part.padding,
            width=part.width,
            pooled=part.pooled,
        )
        (folder / Path(facts.graph).name).write_bytes(export_text(part, folder / Path(facts.weights).name))
        (folder / Path(facts.tokenizer).name).write_text(part.tokenizer, encoding="utf-8")
        encoders.append(facts)
    text = BundleText(
        encoders=tuple(encoders),
        zero_negative=zero_negative(loaded),
        frequencies=guidance_frequencies(loaded),
    )
    files = {path: (folder / Path(path).name).read_bytes() for path in files_of(text)}
    check_text(text, files, loaded, model.prompts())
    hashes = {path: hashlib.sha256(data).hexdigest() for path, data in files.items()}
    write_atomically(folder / _RECORD, msgspec.json.encode(_Exported(text=text, sha256=hashes)))
    return text


def check_text(text: BundleText, files: Mapping[str, bytes], loaded: TextEncoders, prompts: tuple[str, ...]) -> float:
    """Compare exported text encoders with the pipeline.

    Args:
        text: The exported encoders.
        files: Their files by the path in a bundle.
        loaded: The pipeline's encoders.
        prompts: The model's own prompts.

    Returns:
        The largest difference between conditions, relative to the largest number.

    Raises:
        CompileError: If prompts are split into other tokens, or the difference exceeds `TOLERANCE`.
    """
    backend = open_backend(DEFAULT_TARGET if find_spec("onnxruntime") else "torch:cpu", threads=0)
    encoders = [
        OneEncoder(one, files[one.graph], files[one.weights], files[one.tokenizer], backend) for one in text.encoders
    ]
    scale = 4.0
    encoder = TextEncoder(text, encoders, calls=loaded.calls, size=loaded.size, guidance_scale=scale)
    added = added_tokens(loaded.pipeline)[:_ADDED]
    probes = [*PROBES, *prompts[:_OWN], *(f"a photo of {token}, twice {token}" for token in added)]
    made, expected = encoder.encode(probes), loaded.encode(probes, scale)
    if made.notes != expected.notes:
        raise CompileError(f"the bundle's tokenizer cuts prompts as {made.notes}, the pipeline's as {expected.notes}.")
    ours, theirs = made.to_arrays(), expected.to_arrays()
    if ours.keys() != theirs.keys():
        raise CompileError(f"the bundle's text encoders make {sorted(ours)}, the pipeline's {sorted(theirs)}.")
    worst = 0.0
    for name, wanted in theirs.items():
        difference = float(np.abs(ours[name] - wanted).max() / max(1.0, float(np.abs(wanted).max())))
        if not difference <= TOLERANCE:
            raise CompileError(
                f"the bundle's text encoders differ from the pipeline's by {difference:.1e} in {name}, more than "
                f"{TOLERANCE:.0e}."
            )
        worst = max(worst, difference)
    return worst

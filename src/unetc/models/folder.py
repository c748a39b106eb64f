"""The files of a diffusers pipeline folder: the same files that `from_pretrained` of diffusers loads, and no others.

A part of a pipeline lies in a folder of its name. If there is no such folder, it lies in the pipeline's folder itself,
as in the flat repositories of early models. The weights of a part are one file or several shards with an index, and
both exist in variants, such as `fp16`, whose name is part of the file's.

Source:
    diffusers 0.42.1: `load_sub_model` (layouts), `_fetch_index_file` and `_fetch_index_file_legacy` (shards),
    `_add_variant`, `_identify_model_variants` (variants). transformers 5: `_get_resolved_checkpoint_files`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from unetc.artifacts.reading import sha256_of
from unetc.errors import ModelError
from unetc.temporary import PrivateFolder, no_room

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""Names of weights, by the library that writes them."""

SUFFIX = ".safetensors"

CONFIG, SCHEDULER_CONFIG = "config.json", "scheduler_config.json"

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
"""Files of a CLIP tokenizer; the vocabulary is in `tokenizer.json`, or in `vocab.json` and `merges.txt`."""

UNSAFE = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")
"""Suffixes of weights that are not read."""

_CONVERT = (
    "if you trust them, convert them with diffusers' from_pretrained(..., use_safetensors=False) and save_pretrained."
)
_POINTER = b"version https://git-lfs"
"""First bytes of the file that git-lfs leaves in the place of one that was not downloaded."""
_SHARD = re.compile(r"[\w.\-]+\.safetensors")
_SHARD_NUMBER = r"-\d{5}-of-\d{5}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights of a part."""

    files: tuple[Path, ...]
    """One file, or the shards that the index names, in the order of their names."""
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes by the name of the tensor, as the headers of the files say."""
    homes: Mapping[str, str]
    """Names of the files by the name of the tensor."""
    variant: str | None = None

    @property
    def sharded(self) -> bool:
        """Whether an index names the files."""
        return len(self.files) > 1 or re.search(_SHARD_NUMBER, self.files[0].name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a pipeline with weights."""

    name: str
    """Name of the part in model_index.json."""
    kind: str
    """Name of its class."""
    folder: Path
    config: Mapping[str, Any]
    """Its configuration, without the values that diffusers would replace by defaults."""
    weights: Weights
    stem: str
    """`DIFFUSERS` or `TRANSFORMERS`."""

    def sha256(self) -> str:
        """Hash the configuration and the weights."""
        digest = hashlib.sha256(json.dumps(plain(self.config), sort_keys=True).encode())
        for path in self.weights.files:
            digest.update(hash_file(path))
        return digest.hexdigest()


def read_json(path: Path, expected: str = "a diffusers pipeline folder") -> dict[str, Any]:
    """Read a JSON object of a pipeline folder.

    Args:
        path: The file.
        expected: Kind of folder that the file belongs to, for messages.

    Raises:
        ModelError: If the file cannot be read, or holds anything but an object.
    """
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}. Expected {expected}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object. Expected {expected}.")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of a part, without the values that diffusers ignores: those listed as defaults.

    Raises:
        ModelError: If the file cannot be read.
    """
    config = read_json(path)
    replaced = config.pop("_use_default_values", None)
    return {key: value for key, value in config.items() if not isinstance(replaced, list) or key not in replaced}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the versions and paths that libraries write into configurations."""
    return {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}


def refuse_pointer(path: Path) -> None:
    """Refuse a file that git-lfs has not downloaded; a file that cannot be read is left to its reader.

    Raises:
        ModelError: If it is such a file. The message names all of its folder.
    """
    if not _is_pointer(path):
        return
    names = [file.name for file in sorted(path.parent.iterdir()) if file != path and _is_pointer(file)]
    others = f" ({', '.join(names[:3])} too)" if names else ""
    raise ModelError(
        f"{path} is a pointer of git-lfs{others}: the file itself was not downloaded. Run git lfs pull in its "
        "repository, or download the file again."
    )


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def hash_file(path: Path, *, expected: str = "a file of a pipeline folder") -> bytes:
    """Hash a file.

    Args:
        path: The file.
        expected: Description of it in the error message.

    Raises:
        ModelError: If it cannot be read.
    """
    refuse_pointer(path)
    try:
        return bytes.fromhex(sha256_of(path))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}. Expected {expected}.") from error


def part_folder(folder: Path, name: str) -> Path:
    """Return the folder of a part: the pipeline's own if there is none of the part's name."""
    own = folder / name
    return own if own.is_dir() else folder


def part_file(folder: Path, name: str, file: str) -> Path:
    """Find a file that a part must have.

    Args:
        folder: Folder of the pipeline.
        name: Name of the part.
        file: Name of the file.

    Raises:
        ModelError: If neither the part's folder nor the pipeline's own holds the file.
    """
    path = part_folder(folder, name) / file
    if not os.path.lexists(path):
        flat = "" if path.parent != folder else f", or {file} next to model_index.json"
        raise ModelError(f"{folder} has no {name}. Expected {name}/{file}{flat}, as in a diffusers pipeline folder.")
    return path


def variants(folder: Path, stem: str) -> tuple[str, ...]:
    """List the variants in which the weights of a part exist.

    Args:
        folder: Folder of the part.
        stem: `DIFFUSERS` or `TRANSFORMERS`.
    """
    name = re.compile(
        rf"{stem}\.([A-Za-z0-9_\-]+){re.escape(SUFFIX)}|"
        rf"{stem}{re.escape(SUFFIX)}\.index\.([A-Za-z0-9_\-]+)\.json|"
        rf"{stem}{re.escape(SUFFIX)}\.([A-Za-z0-9_\-]+)\.index\.json"
    )
    found = {next(filter(None, match.groups())) for file in _names(folder) if (match := name.fullmatch(file))}
    return tuple(sorted(one for one in found if not re.search(rf"{_SHARD_NUMBER}$", one)))


def has_weights(folder: Path, stem: str, variant: str | None) -> bool:
    """Check whether a part has weights in a variant or, if it is None, without one; shards must all be there."""
    entry = _entry(folder, stem, variant)
    if entry is None or entry.suffix != ".json":
        return entry is not None
    homes = read_json(entry).get("weight_map")
    return isinstance(homes, dict) and all((folder / str(name)).exists() for name in homes.values())


def find_weights(folder: Path, stem: str, variant: str | None = None) -> Weights:
    """Find the weights of a part and read their headers.

    Args:
        folder: Folder of the part.
        stem: `DIFFUSERS` or `TRANSFORMERS`.
        variant: The variant to read where it exists. All other parts, and all parts if it is None, are read without a
            variant, or in their only variant if they exist in no other form.

    Raises:
        ModelError: If there are no weights, or they exist in several variants alone, or a file is missing or damaged.
    """
    known = variants(folder, stem)
    if variant in known:
        chosen = variant
    elif _entry(folder, stem, None) is not None:
        chosen = None
    elif len(known) > 1:
        raise ModelError(
            f"{folder} has weights in the variants {', '.join(known)} alone. Choose one of them: --variant {known[0]}."
        )
    elif known:
        (chosen,) = known
    else:
        raise _no_weights(folder, stem)
    entry = _entry(folder, stem, chosen)
    if entry is None:  # a file was removed meanwhile
        raise _no_weights(folder, stem)
    if entry.suffix == ".json":
        return _shards(entry, chosen)
    shapes = _header(entry)
    return Weights(files=(entry,), shapes=shapes, homes=dict.fromkeys(shapes, entry.name), variant=chosen)


@contextmanager
def view(parts: Sequence[Part], files: Mapping[str, Path]) -> Iterator[Path]:
    """Make a temporary pipeline folder that holds exactly the files of some parts, under their usual names.

    Args:
        parts: Parts with weights.
        files: Further files by their path in the folder.

    Yields:
        The folder; its files are links.

    Raises:
        ArtifactError: If the folder cannot be written.
    """
    with ExitStack() as own:
        try:
            root = own.enter_context(PrivateFolder())
            _link_all(parts, files, root)
        except OSError as error:
            raise no_room("links to a model", error) from error
        yield root


def _link_all(parts: Sequence[Part], files: Mapping[str, Path], root: Path) -> None:
    for name, path in files.items():
        _link(path, root / name)
    for part in parts:
        own = root / part.name
        _link(part.folder / CONFIG, own / CONFIG)
        if not part.weights.sharded:
            _link(part.weights.files[0], own / f"{part.stem}{SUFFIX}")
            continue
        for path in part.weights.files:
            _link(path, own / path.name)
        index = {"metadata": {}, "weight_map": dict(part.weights.homes)}
        (own / f"{part.stem}{SUFFIX}.index.json").write_text(json.dumps(index))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ModelError(f"cannot read {folder}: {error.strerror}. Expected a diffusers pipeline folder.") from error


def _entry(folder: Path, stem: str, variant: str | None) -> Path | None:
    """Find the file with which the weights begin: an index or the only file; diffusers prefers the first of them."""
    infix = f".{variant}" if variant else ""
    single, index = f"{stem}{infix}{SUFFIX}", f"{stem}{SUFFIX}.index{infix}.json"
    names = [index, single] if stem == DIFFUSERS else [single, index]
    if variant:
        names.insert(1 if stem == DIFFUSERS else 2, f"{stem}{SUFFIX}{infix}.index.json")  # as older releases wrote it
    return next((folder / name for name in names if os.path.lexists(folder / name)), None)


def _no_weights(folder: Path, stem: str) -> ModelError:
    names = _names(folder)
    if shards := [name for name in names if name.startswith(stem) and re.search(_SHARD_NUMBER, name)]:
        return ModelError(
            f"{folder} has shards of weights ({shards[0]}), but not their index. Expected {stem}{SUFFIX}.index.json."
        )
    if unsafe := [name for name in names if name.endswith(UNSAFE)]:
        return ModelError(
            f"{folder} has no {SUFFIX} weights, only {', '.join(unsafe[:3])}. "
            f"Such files can run code and are not read: {_CONVERT}"
        )
    if others := [name for name in names if name.endswith(SUFFIX)]:
        return ModelError(
            f"{folder} has no weights under a name that diffusers reads, only {', '.join(others[:3])}. "
            f"Expected {stem}{SUFFIX}, or a variant such as {stem}.fp16{SUFFIX}."
        )
    return ModelError(
        f"{folder} has no weights. Expected {stem}{SUFFIX}. Other formats can run code and are not read: {_CONVERT}"
    )


def _shards(index: Path, variant: str | None) -> Weights:
    """Read the headers of the shards that an index names; other files are not touched."""
    homes = read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not homes or not all(isinstance(name, str) for name in homes.values()):
        raise ModelError(f"{index} has no weight_map. Expected the name of a file for every tensor.")
    if outside := sorted({name for name in homes.values() if not _SHARD.fullmatch(name)}):
        raise ModelError(f"{index} names {outside[0]!r}. Expected names of {SUFFIX} files in the same folder.")
    files = tuple(index.parent / name for name in sorted(set(homes.values())))
    shapes: dict[str, tuple[int, ...]] = {}
    found: dict[str, str] = {}
    for path in files:
        if not os.path.lexists(path):
            raise ModelError(f"{path} is missing. {index.name} names it: download or copy it too.")
        for name, shape in _header(path).items():
            if name in found:
                raise ModelError(f"{path} and {found[name]} both hold {name!r}. Expected every tensor in one shard.")
            shapes[name], found[name] = shape, path.name
    # Tensors that the index leaves out are read as well, as diffusers reads them.
    if strangers := sorted(name for name, home in homes.items() if home != found.get(name)):
        raise ModelError(
            f"{index} does not fit its shards: it says that {strangers[0]!r} is in {homes[strangers[0]]}, and it "
            f"is in {found.get(strangers[0])}. Download the weights again."
        )
    return Weights(files=files, shapes=shapes, homes=found, variant=variant)


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a file's tensors; a truncated file is refused."""
    refuse_pointer(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ModelError(f"cannot read {path}: {reason}. Expected {SUFFIX} weights; download them again.") from error


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it where the system allows no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.absolute())
    except OSError:
        shutil.copyfile(source, target)

"""Base classes of all artifacts: strict JSON and atomic writes."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import msgspec

from unetc.errors import ArtifactError, CorruptArtifactError, SchemaVersionError
from unetc.temporary import claim_file, prefix_for

from .reading import read_bounded, reason

T = TypeVar("T")

MAX_JSON_BYTES = 256 * 2**20
"""Larger files are refused before they are parsed."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen value with a JSON form; unknown or missing fields are errors."""


class Artifact(Record, frozen=True, kw_only=True):
    """A record that is saved as a separate file, with the version of its layout."""

    SCHEMA: ClassVar[int] = 3
    """Version of the layout; a subclass whose layout has changed overrides it."""
    schema: int = 3

    def to_json(self) -> bytes:
        """Encode as JSON; the same value always gives the same bytes."""
        return msgspec.json.format(msgspec.json.encode(self, order="deterministic"), indent=1) + b"\n"

    def sha256(self) -> str:
        """Hash the JSON form."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the JSON form in one atomic step.

        Raises:
            ArtifactError: If the folder cannot be written or the disk is full; no partial file remains.
        """
        write_atomically(path, self.to_json())

    @classmethod
    def from_json(cls, data: bytes, origin: str) -> Self:
        """Decode and validate.

        Args:
            data: The JSON text.
            origin: Name of the text in error messages, usually its path.

        Raises:
            CorruptArtifactError: If the text is not a valid artifact of this class.
            SchemaVersionError: If another version of unetc wrote it.
        """
        what = f"{origin} is not a valid {cls.__name__.lower()}"
        try:
            version = msgspec.json.decode(data, type=_Versioned).schema
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise CorruptArtifactError(f"{what}: {error}. Make it again with unetc.") from error
        if version != cls.SCHEMA:
            raise SchemaVersionError(
                f"{origin} has schema {version}, this unetc reads schema {cls.SCHEMA}. "
                "Make the file again, or install the version of unetc that wrote it."
            )
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise CorruptArtifactError(f"{what}: {error}. Make it again with unetc.") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and validate a file.

        Raises:
            ArtifactError: If the file cannot be read.
            CorruptArtifactError: If the file is not a valid artifact of this class.
            SchemaVersionError: If another version of unetc wrote it.
        """
        return cls.from_json(read_bounded(path, MAX_JSON_BYTES), str(path))


class _Versioned(msgspec.Struct):
    schema: int


def require(condition: bool, message: str, got: object = None) -> None:
    """Refuse a record whose fields contradict each other.

    Args:
        condition: Holds for a good record.
        message: Says the same in words.
        got: A bad record; it is written out only if it is refused, because an analysis reads many records.

    Raises:
        ValueError: If the condition does not hold. Decoding turns it into a `CorruptArtifactError`.
    """
    if not condition:
        raise ValueError(message if got is None else f"{message}, got {got}")


def finite(*values: float) -> bool:
    """Check whether all values are finite numbers."""
    return all(map(math.isfinite, values))


def read_cached(path: Path, kind: type[T], limit: int = 2**26) -> T | None:
    """Read an intermediate result; None if it is missing or damaged, so that it has to be made again.

    Args:
        path: JSON file of at most `limit` bytes.
        kind: Type of the result.
        limit: Larger files count as damaged.
    """
    try:
        return msgspec.json.decode(read_bounded(path, limit), type=kind)
    except (ArtifactError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be written, before any work is done.

    Raises:
        ArtifactError: If the folder cannot be created or written, or something other than a file has the name.
    """
    try:
        _check_kind(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, handle = claim_file(path.parent, prefix_for(path))  # the name that is written: it may be too long
        os.close(handle)
        temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"cannot write {path}: {reason(error)}. Choose another path, in a folder that can be written."
        ) from error


def _check_kind(path: Path) -> None:
    """Refuse folders, devices and pipes, whose place a file would take.

    Raises:
        ArtifactError: If one of these has the name.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise ArtifactError(f"cannot write {path}: it is {kind}. Give the path of a file.")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file in one atomic step: it gets all of `data` or stays unchanged.

    Raises:
        ArtifactError: If the folder cannot be written or the disk is full.
    """
    write_together({path: data})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write files, each in one atomic step, once there was room for all of them.

    Temporary files of killed processes that wrote the same files are deleted.

    Args:
        files: Content of each file.

    Raises:
        ArtifactError: If a folder cannot be written or a disk is full; then all files stay unchanged.
    """
    written: dict[Path, Path] = {}
    path = None
    try:
        with contextlib.ExitStack() as locks:
            for path, data in files.items():
                _check_kind(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                written[path], handle = claim_file(path.parent, prefix_for(path))
                file = locks.enter_context(os.fdopen(handle, "wb"))
                file.write(data)
                file.flush()
                os.fsync(handle)
                os.fchmod(handle, 0o644)
            for path, temporary in written.items():
                os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"cannot write {path}: {reason(error)}. Choose a folder that can be written and has room."
        ) from error
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


def to_builtins(value: object) -> Any:
    """Turn a record into plain dictionaries and lists, for `--json` output."""
    return msgspec.to_builtins(value)

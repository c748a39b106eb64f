"""Reading files that others may have put there: only plain files, only up to a size, and within a folder no links."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from unetc.errors import ArtifactError, CorruptArtifactError


def sha256_of(path: Path) -> str:
    """Hash a file without reading it into memory.

    Raises:
        OSError: If it is missing or unreadable.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes, perhaps through links: the user has named it.

    Raises:
        ArtifactError: If the file is missing, unreadable or larger, or is no plain file.
    """
    try:
        return _read(path, limit)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {reason(error)}. Check the path and its permissions.") from error


def read_plain(root: Path, name: str, limit: int, *, hard_links: bool = False) -> bytes:
    """Read a file in a folder, if nothing below the folder is a link.

    Args:
        root: The folder, which may be reached through links.
        name: Path in the folder, with forward slashes.
        limit: Largest size in bytes.
        hard_links: Whether the file may have another name.

    Raises:
        ArtifactError: If the file is unreadable.
        CorruptArtifactError: If it is missing or larger, is no plain file, or is reached through a link.
    """
    path = root
    try:
        for part in name.split("/"):
            path = path / part
            if stat.S_ISLNK(path.lstat().st_mode):
                raise CorruptArtifactError(f"{path} is a link, and only plain files are read here.")
        return _read(path, limit, getattr(os, "O_NOFOLLOW", 0), most_links=None if hard_links else 1)
    except FileNotFoundError as error:
        raise CorruptArtifactError(f"{path} is missing.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {reason(error)}. Check its permissions.") from error


def reason(error: OSError | ValueError) -> str:
    """Say why the system has refused a path; a path with a NUL is a `ValueError`."""
    return getattr(error, "strerror", None) or str(error)


def _read(path: Path, limit: int, flags: int = 0, *, most_links: int | None = None) -> bytes:
    """Read a plain file; no other kind of file is waited for, as opening a pipe would."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | flags)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise CorruptArtifactError(f"{path} is not a plain file.")
        if most_links is not None and status.st_nlink > most_links:
            raise CorruptArtifactError(f"{path} has a second hard link, and only files of one name are read here.")
        if status.st_size > limit:
            raise CorruptArtifactError(f"{path} has {status.st_size} bytes, above the limit of {limit}.")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(handle)

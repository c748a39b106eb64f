"""Folders that are there whole or not at all: files go into a temporary one, which then takes the place."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unetc.errors import ArtifactError
from unetc.temporary import claim_folder, prefix_for

_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux."""


def real_path(path: Path) -> Path:
    """Follow the links of a path, which need not exist.

    Raises:
        ArtifactError: If it is no path.
    """
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # it holds a NUL
        raise ArtifactError(f"{str(path)!r} is no path: {error}. Choose another one.") from error


@contextmanager
def checking(path: Path) -> Iterator[Path]:
    """Give the real path of a folder to write, so that the enclosed code can refuse it; then try to write next to it.

    Raises:
        ArtifactError: If it cannot be written.
    """
    path = real_path(path)
    try:
        yield path
        if os.path.ismount(path):
            raise ArtifactError(f"{path} is a mount point, whose place no folder can take. Choose a folder inside it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ArtifactError(f"cannot write to {path.parent}: {error.strerror}. Choose another folder.") from error


@contextmanager
def written_whole(path: Path, what: str) -> Iterator[Path]:
    """Give a temporary folder, which takes the place of `path` if the enclosed code succeeds.

    Temporary folders of killed processes that wrote the same folder are deleted.

    Args:
        path: The folder to write.
        what: Its content, as errors call it.

    Raises:
        ArtifactError: If it cannot be written or the disk is full; nothing is left behind.
    """
    path = real_path(path)
    temporary: Path | None = None
    with contextlib.ExitStack() as lock:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary, handle = claim_folder(path.parent, prefix_for(path))
            lock.callback(os.close, handle)
            yield temporary
            temporary.chmod(0o755)
            _replace(path, temporary)
        except OSError as error:
            raise ArtifactError(
                f"cannot write the {what} {path}: {error.strerror}. Choose a folder that can be written and has room."
            ) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and the folders above it.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, temporary: Path) -> None:
    """Put the new folder in the place of the old one, in one step if the file system can exchange names.

    If it cannot, a crash between two renames leaves both folders next to the place.
    """
    if not path.exists():
        os.replace(temporary, path)
        return
    if _exchanged(path, temporary):
        return  # the old folder has the temporary name, under which it is deleted
    old = path.with_name(f".unetc-old{temporary.name}")  # no prefix by which another writer deletes it
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return whether the system can.

    Raises:
        OSError: If it can, but fails.

    Source:
        https://man7.org/linux/man-pages/man2/rename.2.html
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))

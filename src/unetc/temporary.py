"""Temporary files and folders: on a disk that may be full or may not be written, made by processes that may be killed.

Each is locked by the process that made it, as long as that lives. So one that nobody has locked belongs to a process
that was killed, and can be deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import weakref
from pathlib import Path

from .errors import ArtifactError

_PREFIX = ".unetc-private."


class PrivateFolder:
    """A temporary folder that only this user can read and change.

    It is deleted with the object, at the latest when the process ends. If the process is killed, the next private
    folder of the same user deletes it: weights take gigabytes, and a killed server is started again and again.
    """

    path: Path

    def __init__(self) -> None:
        """Make the folder, and delete those of processes that were killed.

        Raises:
            OSError: If it cannot be made.
        """
        place = Path(tempfile.gettempdir())
        self.path, lock = claim_folder(place, _PREFIX)
        self._finalizer = weakref.finalize(self, _delete, self.path, lock)

    def close(self) -> None:
        """Delete it."""
        self._finalizer()

    def __enter__(self) -> Path:
        """Return its path."""
        return self.path

    def __exit__(self, *_: object) -> None:
        """Delete it."""
        self.close()


def prefix_for(path: Path) -> str:
    """Return how the names of temporary files and folders begin that will take the place of a path."""
    return f".{path.name}.unetc-"


def claim_file(place: Path, prefix: str) -> tuple[Path, int]:
    """Make a file in a folder and lock it; return its path, and the handle to write it and to end the lock.

    Those of killed processes with the same prefix are deleted.

    Raises:
        OSError: If it cannot be made.
    """
    delete_abandoned(place, prefix)
    while True:
        handle, name = tempfile.mkstemp(prefix=prefix, dir=place)
        _lock(handle)
        if os.path.exists(name):
            return Path(name), handle
        os.close(handle)  # another process found it before it was locked


def claim_folder(place: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder in another one and lock it; return its path, and the handle to end the lock.

    Those of killed processes with the same prefix are deleted.

    Raises:
        OSError: If it cannot be made.
    """
    delete_abandoned(place, prefix)
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        with contextlib.suppress(FileNotFoundError):  # another process found it before it was locked
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            _lock(handle)
            if path.exists():
                return path, handle
            os.close(handle)


def delete_abandoned(place: Path, prefix: str) -> None:
    """Delete the files and folders of killed processes of this user whose names begin with a prefix."""
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        for path in [Path(entry) for entry in entries if entry.name.startswith(prefix)]:
            with contextlib.suppress(OSError):  # it belongs to another user, or is deleted meanwhile
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    _delete_unlocked(path, handle)
                finally:
                    os.close(handle)


def _delete_unlocked(path: Path, handle: int) -> None:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    found = os.fstat(handle)
    if found.st_uid != os.getuid():
        return
    if stat.S_ISDIR(found.st_mode):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _lock(handle: int) -> None:
    with contextlib.suppress(OSError):  # a file system without locks; there nothing is taken for abandoned
        fcntl.flock(handle, fcntl.LOCK_EX)


def _delete(path: Path, handle: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(handle)


def no_room(files: str, error: OSError) -> ArtifactError:
    """Describe that something cannot be written to the folder of temporary files.

    Args:
        files: Their description.
        error: The system's error; when no folder can be written, it lists those that were tried.
    """
    place = tempfile.tempdir or "a temporary folder"  # `gettempdir` would raise the same error again
    return ArtifactError(f"cannot write {files} to {place}: {error.strerror}. Set TMPDIR to a folder with room.")

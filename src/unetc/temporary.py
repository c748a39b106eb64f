"""Temporary files on a disk that may be full, or that may not be written."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
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
        _delete_abandoned(place)
        self.path, lock = _made(place)
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


def _made(place: Path) -> tuple[Path, int]:
    """Make a folder and lock it as long as this process lives; return its path and the handle of the lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        with contextlib.suppress(FileNotFoundError):  # another process found it before it was locked
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # a file system without locks; there nothing is taken for abandoned
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _delete(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _delete_abandoned(place: Path) -> None:
    """Delete the private folders of this user that no living process has locked."""
    for path in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it belongs to another user, or is deleted meanwhile
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.getuid():
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def no_room(files: str, error: OSError) -> ArtifactError:
    """Describe that something cannot be written to the folder of temporary files.

    Args:
        files: Their description.
        error: The system's error; when no folder can be written, it lists those that were tried.
    """
    place = tempfile.tempdir or "a temporary folder"  # `gettempdir` would raise the same error again
    return ArtifactError(f"cannot write {files} to {place}: {error.strerror}. Set TMPDIR to a folder with room.")

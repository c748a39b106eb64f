"""Temporary files on a disk that may be full, or that may not be written."""

from __future__ import annotations

import tempfile

from .errors import ArtifactError


def no_room(files: str, error: OSError) -> ArtifactError:
    """Describe that something cannot be written to the folder of temporary files.

    Args:
        files: Their description.
        error: The system's error; when no folder can be written, it lists those that were tried.
    """
    place = tempfile.tempdir or "a temporary folder"  # `gettempdir` would raise the same error again
    return ArtifactError(f"cannot write {files} to {place}: {error.strerror}. Set TMPDIR to a folder with room.")

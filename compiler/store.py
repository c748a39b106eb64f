"""Write a bundle: the manifest comes last, and the folder is there whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from unetc.artifacts.manifest import DIGEST, MANIFEST, FileRecord, Manifest, digest_of
from unetc.errors import ArtifactError

from .whole_folder import checking, write_file, written_whole


def check_destination(path: Path) -> None:
    """Refuse a bad destination before any work is done.

    Raises:
        ArtifactError: If the folder cannot be written, or something that is not a bundle is there.
    """
    with checking(path) as real:
        bundle = all((real / name).is_file() for name in (MANIFEST, DIGEST))
        empty = real.is_dir() and not any(real.iterdir())
        if real.exists() and not bundle and not empty:
            raise ArtifactError(f"{real} exists and is not a bundle; it is not overwritten. Choose another folder.")


def write_bundle(
    path: Path, contents: Mapping[str, bytes | Path], manifest: Callable[[tuple[FileRecord, ...]], Manifest]
) -> Manifest:
    """Write a bundle so that it is there whole or not at all; an older bundle at the path is replaced.

    Args:
        path: Folder of the bundle.
        contents: Files by their path in the bundle, as bytes or as a file to copy.
        manifest: Makes the manifest, given the records of all files.

    Raises:
        ArtifactError: If the folder cannot be written or the disk is full; nothing is left behind.
    """
    check_destination(path)
    with written_whole(path, "bundle") as temporary:
        records = tuple(_write(temporary, name, content) for name, content in sorted(contents.items()))
        finished = manifest(records)
        data = finished.to_json()
        write_file(temporary / DIGEST, digest_of(data))
        write_file(temporary / MANIFEST, data)
    return finished


def _write(root: Path, name: str, content: bytes | Path) -> FileRecord:
    data = content.read_bytes() if isinstance(content, Path) else content
    write_file(root / name, data)
    return FileRecord(path=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

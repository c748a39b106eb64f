"""Write a bundle: everything into a temporary folder, the manifest last, then one rename."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from unetc.artifacts.manifest import DIGEST, MANIFEST, FileRecord, Manifest, digest_of
from unetc.errors import ArtifactError


def check_destination(path: Path) -> None:
    """Refuse a bad destination before any work is done.

    Raises:
        ArtifactError: If the folder cannot be written, or something that is not a bundle is there.
    """
    path = Path(os.path.realpath(path))
    try:
        bundle = all((path / name).is_file() for name in (MANIFEST, DIGEST))
        empty = path.is_dir() and not any(path.iterdir())
        if path.exists() and not bundle and not empty:
            raise ArtifactError(f"{path} exists and is not a bundle; it is not overwritten. Choose another folder.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ArtifactError(f"cannot write to {path.parent}: {error.strerror}. Choose another folder.") from error


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
    path = Path(os.path.realpath(path))
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        records = tuple(_write(temporary, name, content) for name, content in sorted(contents.items()))
        finished = manifest(records)
        data = finished.to_json()
        _write(temporary, DIGEST, digest_of(data))
        _write(temporary, MANIFEST, data)
        temporary.chmod(0o755)
        replace_folder(path, temporary)
    except OSError as error:
        raise ArtifactError(
            f"cannot write the bundle {path}: {error.strerror}. Choose a folder that can be written and has room."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return finished


def _write(root: Path, name: str, content: bytes | Path) -> FileRecord:
    data = content.read_bytes() if isinstance(content, Path) else content
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path=name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def replace_folder(path: Path, temporary: Path) -> None:
    """Put the new folder in the place of the old one; a crash between the two renames leaves both next to it."""
    if not path.exists():
        os.replace(temporary, path)
        return
    old = temporary.with_name(f"{temporary.name}.old")
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)

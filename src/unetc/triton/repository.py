"""The folder of a repository: it is there whole or not at all, and holds nothing that an export did not write."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unetc.artifacts.record import Artifact, Record
from unetc.compiler.store import replace_folder
from unetc.errors import ArtifactError

EXPORT = "unetc-export.json"
"""File that marks a repository as an export."""


class ExportedModel(Record, frozen=True, kw_only=True):
    """One model of a repository."""

    name: str
    graph: str | None
    """Path of its graph in the bundle; None for the model that samples."""
    most_rows: int | None
    """Largest batch; None where Triton does not batch."""


class Export(Artifact, frozen=True, kw_only=True):
    """An exported repository."""

    unetc: str
    bundle_sha256: str
    """Hash of the bundle's manifest."""
    target: str
    model: str
    """Name of the model that samples."""
    models: tuple[ExportedModel, ...]
    bytes_on_disk: int
    """Bytes of all files besides this one; files that share their content count once."""
    bytes_apart: int
    """The same where every file counts, as in a copy without hard links."""


def check_repository(path: Path) -> None:
    """Refuse a bad destination before any work is done.

    Raises:
        ArtifactError: If the folder cannot be written, or holds something else than an earlier export.
    """
    path = Path(os.path.realpath(path))
    try:
        if path.exists() and not path.is_dir():
            raise ArtifactError(f"{path} is a file; a repository is a folder. Choose another path.")
        if path.is_dir() and any(path.iterdir()) and not _is_export(path):
            raise ArtifactError(
                f"{path} is not empty, and no export of unetc; it is not overwritten. Choose another folder."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ArtifactError(f"cannot write to {path.parent}: {error.strerror}. Choose another folder.") from error


def _is_export(path: Path) -> bool:
    try:
        export = Export.load(path / EXPORT)
    except ArtifactError:
        return False
    return {one.name for one in path.iterdir()} <= {EXPORT, *(model.name for model in export.models)}


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary folder, which takes the place of `path` if the enclosed code succeeds.

    Raises:
        ArtifactError: If it cannot be written or the disk is full; nothing is left behind.
    """
    check_repository(path)
    path = Path(os.path.realpath(path))
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        yield temporary
        temporary.chmod(0o755)
        replace_folder(path, temporary)
    except OSError as error:
        raise ArtifactError(
            f"cannot write the repository {path}: {error.strerror}. Choose a folder that can be written and has room."
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a file and the folders above it.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def share_file(first: Path, path: Path) -> None:
    """Put a file that exists elsewhere at a second place: as a hard link, or as a copy where there are none.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(first, path)
    except OSError:
        shutil.copyfile(first, path)


def sizes_of(root: Path) -> tuple[int, int]:
    """Add up the bytes of all files: on the disk, and in a copy without hard links."""
    found = [path.stat() for path in root.rglob("*") if path.is_file()]
    once = {(one.st_dev, one.st_ino): one.st_size for one in found}
    return sum(once.values()), sum(one.st_size for one in found)

"""The folder of a repository: it holds nothing that an export did not write."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from unetc.artifacts.record import Artifact, Record
from unetc.compiler.whole_folder import checking
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
    with checking(path) as real:
        if real.exists() and not real.is_dir():
            raise ArtifactError(f"{real} is a file; a repository is a folder. Choose another path.")
        if real.is_dir() and any(real.iterdir()) and not _is_export(real):
            raise ArtifactError(
                f"{real} is not empty, and no export of unetc; it is not overwritten. Choose another folder."
            )


def _is_export(path: Path) -> bool:
    try:
        export = Export.load(path / EXPORT)
    except ArtifactError:
        return False
    return {one.name for one in path.iterdir()} <= {EXPORT, *(model.name for model in export.models)}


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

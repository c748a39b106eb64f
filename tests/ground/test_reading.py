"""Only plain files are read, up to a size; within a folder, no link leads out of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.disguises import DISGUISES, make_folder, make_hard_link, make_symlink, within
from unetc.artifacts.reading import read_bounded, read_plain
from unetc.artifacts.record import read_cached
from unetc.errors import ArtifactError, CorruptArtifactError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"12345")
    return path


def test_reading_is_bounded(file: Path) -> None:
    assert read_bounded(file, 5) == read_plain(file.parents[1], "folder/file", 5) == b"12345"
    with pytest.raises(ArtifactError, match="5 bytes, above the limit of 4"):
        read_bounded(file, 4)
    with pytest.raises(CorruptArtifactError, match="5 bytes, above the limit of 4"):
        read_plain(file.parent, "file", 4)


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
def test_in_a_folder_only_plain_files_are_read(file: Path, disguise: Callable[[Path], None]) -> None:
    disguise(file)
    opened = os.listdir("/proc/self/fd")
    with within(20), pytest.raises(ArtifactError, match="file"):
        read_plain(file.parent, "file", 9)
    assert os.listdir("/proc/self/fd") == opened


def test_in_a_folder_no_folder_may_be_a_link(file: Path) -> None:
    root = file.parents[1]
    file.parent.rename(root / "real")
    (root / "folder").symlink_to(root / "real")
    with pytest.raises(CorruptArtifactError, match="folder is a link"):
        read_plain(root, "folder/file", 9)
    assert read_plain(root / "folder", "file", 9) == b"12345"


def test_a_second_name_can_be_allowed(file: Path) -> None:
    make_hard_link(file)
    assert read_plain(file.parent, "file", 9, hard_links=True) == b"12345"


def test_a_file_that_the_user_names_may_be_reached_through_links(file: Path) -> None:
    make_hard_link(file)
    make_symlink(file)
    assert read_bounded(file, 9) == b"12345"


@pytest.mark.parametrize("name", ["pipe", "socket", "device", "folder"])
def test_nobody_waits_for_a_file_that_is_not_plain(file: Path, name: str) -> None:
    DISGUISES[name](file)
    with within(20), pytest.raises(ArtifactError, match="file"):
        read_bounded(file, 9)


@pytest.mark.parametrize("name", ["missing", "file/below", "a" * 300, "a\0b"])
def test_a_file_that_is_not_there_is_refused(file: Path, name: str) -> None:
    for read in (lambda: read_bounded(file.parent / name, 9), lambda: read_plain(file.parent, name, 9)):
        with pytest.raises(ArtifactError, match=name[:7]):
            read()


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 10**5, b"7", b'{"a": 1}'])
def test_an_intermediate_result_that_is_damaged_is_made_again(file: Path, text: bytes) -> None:
    file.write_bytes(text)
    assert read_cached(file, list[int]) is None
    make_folder(file)
    assert read_cached(file, list[int]) is None

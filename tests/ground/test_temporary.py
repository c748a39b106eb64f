"""Private folders are deleted with their process, or after it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from unetc.temporary import PrivateFolder

MAKE = """
import sys
from unetc.temporary import PrivateFolder
folder = PrivateFolder()
(folder.path / "weights").write_bytes(bytes(1000))
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@contextmanager
def another_process() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start a process that makes a private folder and waits."""
    command = [sys.executable, "-c", MAKE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())


def test_it_is_for_this_user_alone_and_is_deleted() -> None:
    with PrivateFolder() as path:
        (path / "file").touch()
        assert path.stat().st_mode & 0o777 == 0o700
    assert not path.exists()


def test_it_is_deleted_with_the_object() -> None:
    folder = PrivateFolder()
    path = folder.path
    del folder
    assert not path.exists()


def test_it_ends_with_its_process() -> None:
    with another_process() as (_, path):
        assert path.exists()
    assert not path.exists()


def test_the_next_one_deletes_that_of_a_killed_process_and_no_other(place: Path) -> None:
    with another_process() as (killed, left), another_process() as (_, used), PrivateFolder() as own:
        killed.kill()
        killed.wait()
        kept = place / "unetc-demo"
        kept.mkdir()
        assert (left / "weights").exists()
        with PrivateFolder() as path:
            assert {*place.iterdir()} == {used, own, kept, path}
        assert (used / "weights").exists()


def test_a_link_is_not_followed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file").touch()
    (place / ".unetc-private.a1b2c3d4").symlink_to(elsewhere)
    with PrivateFolder():
        assert (elsewhere / "file").exists()


def test_many_processes_that_find_each_other_keep_their_own(place: Path) -> None:
    code = """
from unetc.temporary import PrivateFolder
for _ in range(200):
    with PrivateFolder() as path:
        (path / "file").write_bytes(b"own")
        assert (path / "file").read_bytes() == b"own"
"""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    assert not [*place.iterdir()]

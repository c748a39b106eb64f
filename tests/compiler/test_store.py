"""A bundle is written whole or not at all: under kills, full disks and unwritable places, and never over other data."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

import unetc
from tests.every_day import every_nth
from tests.tree import tree
from unetc.artifacts.manifest import DIGEST, MANIFEST, Manifest
from unetc.compiler import whole_folder
from unetc.compiler.build import BuildOptions, build
from unetc.compiler.planner.planner import PlanOptions
from unetc.compiler.store import check_destination, write_bundle
from unetc.errors import ArtifactError
from unetc.runtime.bundle import Bundle


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk hundreds of times; no test here cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@dataclass(frozen=True)
class Source:
    """A bundle without its controls, in memory but for its larger files."""

    manifest: Manifest
    contents: dict[str, bytes | Path]

    def write(self, path: Path, note: str) -> Manifest:
        """Write it as another one, which differs in its notes and has one more file."""
        return write_bundle(
            path,
            self.contents | {f"notes/{note}": b""},
            lambda files: msgspec.structs.replace(self.manifest, notes=(note,), files=files),
        )


@pytest.fixture
def source(tiny_bundle: Path) -> Source:
    manifest = msgspec.structs.replace(Bundle.open(tiny_bundle).manifest, controls=())
    return Source(
        manifest,
        {
            record.path: tiny_bundle / record.path if record.bytes > 10**5 else (tiny_bundle / record.path).read_bytes()
            for record in manifest.files
            if not record.path.startswith("controls/")
        },
    )


def fail_at(call: int, patch: pytest.MonkeyPatch, owner: Any, function: str, number: int) -> list[object]:
    """Let a function of the operating system fail at one of its calls, and return the list of its calls to come."""
    original = getattr(owner, function)
    calls: list[object] = []

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == call:
            raise OSError(number, os.strerror(number))
        return original(*arguments, **options)

    patch.setattr(owner, function, fail)
    return calls


def test_what_was_written_is_what_opens(source: Source, tmp_path: Path) -> None:
    written = source.write(tmp_path / "deep" / "down" / "bundle", "new")
    opened = Bundle.open(tmp_path / "deep" / "down" / "bundle")
    assert opened.manifest == written
    assert opened.manifest.notes == ("new",)
    assert len(opened.graphs) == 3
    for path, graph in opened.graphs.items():
        assert graph == source.contents[path]
    assert os.listdir(tmp_path / "deep" / "down") == ["bundle"]
    assert os.listdir(tmp_path / "deep") == ["down"]
    unetc.load(tmp_path / "deep" / "down" / "bundle").sample()


def test_others_may_read_a_bundle(source: Source, tmp_path: Path) -> None:
    source.write(tmp_path / "bundle", "new")
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o755


def test_an_older_bundle_is_replaced_with_all_its_files(source: Source, tmp_path: Path) -> None:
    source.write(tmp_path / "bundle", "old")
    source.write(tmp_path / "bundle", "new")
    assert Bundle.open(tmp_path / "bundle").manifest.notes == ("new",)
    assert os.listdir(tmp_path / "bundle" / "notes") == ["new"]
    assert os.listdir(tmp_path) == ["bundle"]


def test_the_same_contents_give_the_same_bytes(source: Source, tmp_path: Path) -> None:
    for name in ("a", "b"):
        source.write(tmp_path / name, "note")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_an_empty_folder_is_filled(source: Source, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    source.write(tmp_path / "bundle", "new")
    assert Bundle.open(tmp_path / "bundle").manifest.notes == ("new",)
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_link_to_a_bundle_stays_a_link(source: Source, tmp_path: Path) -> None:
    source.write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    source.write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(tmp_path / "real").manifest.notes == ("new",)
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_the_current_folder_is_a_place_too(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    source.write(Path(), "new")
    assert Bundle.open(tmp_path / "here").manifest.notes == ("new",)
    assert os.listdir(tmp_path) == ["here"]


@pytest.mark.parametrize(
    "files",
    [["thesis.tex"], [MANIFEST], [MANIFEST, "icon.png"], [DIGEST], ["sub/file"], [".hidden"], [f"bundle/{MANIFEST}"]],
    ids=str,
)
def test_a_folder_of_something_else_is_not_touched(source: Source, tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(ArtifactError, match="not overwritten"):
        check_destination(tmp_path / "work")
    with pytest.raises(ArtifactError, match="not overwritten"):
        source.write(tmp_path / "work", "new")
    assert tree(tmp_path) == before


def test_a_file_in_the_place_is_not_touched(source: Source, tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("mine")
    with pytest.raises(ArtifactError, match="not overwritten"):
        source.write(tmp_path / "bundle", "new")
    assert tree(tmp_path) == {"bundle": b"mine"}


@pytest.mark.parametrize("path", ["file/bundle", "file/deep/bundle", "a" * 300, "b" * 250, f"{'c' * 300}/bundle"])
def test_an_unwritable_place_is_an_error(source: Source, tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="cannot write"):
        source.write(tmp_path / path, "new")
    assert tree(tmp_path) == {"file": b"mine"}


def test_an_unwritable_place_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    options = BuildOptions(plan=PlanOptions(budget=0.1))
    nothing: Any = None
    with pytest.raises(ArtifactError, match="cannot write"):
        build(nothing, nothing, tmp_path / "file" / "bundle", options, cache=tmp_path)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("owner", "function", "number"),
    [
        (os, "fsync", errno.EIO),
        (os, "replace", errno.EXDEV),
        (whole_folder, "_exchanged", errno.EIO),
        (Path, "open", errno.ENOSPC),
        (Path, "mkdir", errno.ENOSPC),
        (tempfile, "mkdtemp", errno.EROFS),
    ],
)
def test_a_failure_leaves_what_was_there_before(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    function: str,
    number: int,
    older: bool,
) -> None:
    if older:
        source.write(tmp_path / "bundle", "old")
    before = tree(tmp_path)
    if function == "replace":
        monkeypatch.setattr(whole_folder, "_exchanged", lambda *_: False)
    for call in itertools.count(1):
        with monkeypatch.context() as patch:
            calls = fail_at(call, patch, owner, function, number)
            with contextlib.suppress(ArtifactError):
                source.write(tmp_path / "bundle", "new")
        if len(calls) < call:
            break
        assert tree(tmp_path) == before
    assert call > 1 or (function == "_exchanged" and not older)
    assert os.listdir(tmp_path) == ["bundle"]
    assert Bundle.open(tmp_path / "bundle").manifest.notes == ("new",)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_the_error_says_what_the_system_said(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fail_at(3, monkeypatch, os, "fsync", number)
    with pytest.raises(ArtifactError, match=f"cannot write .*{os.strerror(number)}.*has room"):
        source.write(tmp_path / "bundle", "new")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_interrupt_leaves_what_was_there_before(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], function: str
) -> None:
    source.write(tmp_path / "bundle", "old")
    before = tree(tmp_path)
    monkeypatch.setattr(whole_folder, "_exchanged", lambda *_: False)
    original, calls = getattr(os, function), 0

    def interrupt(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise stop
        return original(*arguments)

    monkeypatch.setattr(os, function, interrupt)
    with pytest.raises(stop):
        source.write(tmp_path / "bundle", "new")
    assert tree(tmp_path) == before


def set_aside(source: Source, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a bundle twice; return where the older one lies after the second write failed between its two renames."""
    source.write(path, "old")
    monkeypatch.setattr(whole_folder, "_exchanged", lambda *_: False)
    original, calls = os.replace, itertools.count()

    def fail(*arguments: Any) -> None:
        if next(calls):  # the way back fails too
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(ArtifactError):
            source.write(path, "new")
    (left,) = path.parent.iterdir()
    return left


def test_an_older_bundle_survives_when_even_the_way_back_fails(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "twin").mkdir()
    (tmp_path / "place").mkdir()
    source.write(tmp_path / "twin" / "bundle", "old")
    left = set_aside(source, tmp_path / "place" / "bundle", monkeypatch)
    assert tree(left) == tree(tmp_path / "twin" / "bundle")


def test_the_next_bundle_keeps_the_only_whole_copy_of_another(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bundle.old` would take the place of the older bundle that lost its own."""
    left = set_aside(source, tmp_path / "bundle", monkeypatch)
    source.write(tmp_path / "bundle.old", "other")
    assert Bundle.open(left).manifest.notes == ("old",)


def test_the_next_bundle_deletes_the_folder_of_a_killed_process(source: Source, tmp_path: Path) -> None:
    (tmp_path / ".bundle.unetc-a1b2c3d4").mkdir()
    (tmp_path / ".bundle.unetc-a1b2c3d4" / "weights").touch()
    (tmp_path / ".bundle.mine").mkdir()
    source.write(tmp_path / "bundle", "new")
    assert {*os.listdir(tmp_path)} == {"bundle", ".bundle.mine"}


KILLS = """
# Writes a bundle again and again, in children that each die at one point, and lists the files that they leave.
import json, os, resource, shutil, signal, sys
from pathlib import Path

import msgspec

from unetc.compiler import whole_folder
from unetc.compiler.store import write_bundle
from unetc.errors import ArtifactError
from unetc.runtime.bundle import Bundle

source, root = Path(sys.argv[1]), Path(sys.argv[2])
if sys.argv[4] == "by renames":
    whole_folder._exchanged = lambda one, other: False
manifest = msgspec.structs.replace(Bundle.open(source).manifest, controls=())
contents = {
    record.path: (source / record.path).read_bytes()
    for record in manifest.files
    if not record.path.startswith("controls/")
}
SYSTEM_CALLS = {"open", "os.mkdir", "os.rename", "os.chmod", "os.rmdir", "os.remove", "os.scandir", "os.listdir"}


def write(path, note):
    write_bundle(path, contents, lambda files: msgspec.structs.replace(manifest, notes=(note,), files=files))


def die_at_call(count):
    # before the count-th call that touches the file system
    left = count

    def call(event, arguments):
        nonlocal left
        if event in SYSTEM_CALLS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda handle: call("open", ())
    sys.addaudithook(call)


def die_at_byte(count):
    # in the middle of writing the first file that is longer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def full_at_byte(count):
    # the same, but the write fails and the process lives
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))


def state(path):
    try:
        (note,) = Bundle.open(path).manifest.notes
        return note
    except ArtifactError:
        return "none"


def attempt(folder, older, limit, count):
    folder.mkdir(parents=True)
    if older:
        shutil.copytree(root / "old", folder / "bundle")
    child = os.fork()
    if child == 0:
        limit(count)
        try:
            write(folder / "bundle", "new")
        except ArtifactError:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = sorted(os.listdir(folder))
    result = {
        "code": code,
        "bundle": state(folder / "bundle"),
        "hidden": sorted(state(folder / name) for name in left if name != "bundle"),
    }
    write(folder / "bundle", "again")
    result["again"] = state(folder / "bundle")
    result["left"] = sorted(state(folder / name) for name in os.listdir(folder) if name != "bundle")
    shutil.rmtree(folder)
    return result


os.fsync = lambda handle: None  # no child loses power
write(root / "old", "old")
older = sys.argv[3] == "older"
calls = []
while not calls or calls[-1]["code"]:
    calls.append(attempt(root / "work", older, die_at_call, len(calls) + 1))
sizes = sorted({len(data) for data in contents.values()})
places = [0, 1, sizes[0] - 1, *(size // 2 for size in sizes), *(size - 1 for size in sizes)]
bytes_ = [attempt(root / "work", older, die_at_byte, place) for place in places]
full = [attempt(root / "work", older, full_at_byte, place) for place in places]
print(json.dumps({"calls": calls, "bytes": bytes_, "full": full}))
"""


@pytest.mark.parametrize(
    ("older", "how"),
    every_nth(3, [(True, "at once"), (False, "at once"), (True, "by renames")]),
)
def test_a_killed_writer_leaves_the_old_or_the_new(tiny_bundle: Path, tmp_path: Path, older: bool, how: str) -> None:
    arguments = [str(tiny_bundle), str(tmp_path), "older" if older else "nothing", how]
    done = subprocess.run(
        [sys.executable, "-c", KILLS, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    before = "old" if older else "none"

    *killed, finished = results["calls"]
    assert len(killed) >= 30
    assert {row["code"] for row in killed} == {-signal.SIGKILL}
    assert finished == {"code": 0, "bundle": "new", "hidden": [], "again": "again", "left": []}
    states = [row["bundle"] for row in killed]
    assert states[0] == before
    assert {*states} <= {before, "new", *(["none"] if how == "by renames" else [])}
    if how == "by renames":  # between the two renames the place is empty, and both bundles lie next to it, whole
        assert [row["hidden"] for row in killed if row["bundle"] == "none"] == [["new", "old"]]
    assert {row["again"] for row in killed} == {"again"}
    if how == "at once":  # by renames, an older bundle that lost its place stays, or what was not yet deleted of it
        assert [row["left"] for row in killed] == [[]] * len(killed)

    assert len(results["bytes"]) >= 12
    for row in results["bytes"]:  # in the middle of a write
        assert row["code"] == -signal.SIGXFSZ
        assert row["bundle"] == before
        assert (row["again"], row["left"]) == ("again", [])
    for row in results["full"]:  # a write that fails without a kill leaves nothing behind
        assert row == {"code": 1, "bundle": before, "hidden": [], "again": "again", "left": []}


def test_writers_at_the_same_time_leave_one_whole_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys, msgspec; from pathlib import Path; from unetc.runtime.bundle import Bundle\n"
        "from unetc.compiler.store import write_bundle\n"
        "source, path, note = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]\n"
        "m = Bundle.open(source).manifest\n"
        "c = {r.path: source / r.path for r in m.files}\n"
        "for _ in range(10):\n"
        "    try: write_bundle(path, c, lambda files: msgspec.structs.replace(m, notes=(note,), files=files))\n"
        "    except Exception as error: print(type(error).__name__)\n"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tiny_bundle), str(tmp_path / "bundle"), note],
            stdout=subprocess.PIPE,
            text=True,
        )
        for note in ("a", "b")
    ]
    errors = " ".join(writer.communicate(timeout=120)[0] for writer in writers).split()
    assert {*errors} <= {"ArtifactError"}
    assert Bundle.open(tmp_path / "bundle").manifest.notes[0] in ("a", "b")
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_bundle_can_be_moved(source: Source, tmp_path: Path) -> None:
    source.write(tmp_path / "bundle", "new")
    shutil.move(tmp_path / "bundle", tmp_path / "elsewhere")
    unetc.load(tmp_path / "elsewhere").sample()

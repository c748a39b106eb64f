"""A file with one line per trial, so that a run that was killed goes on where it was."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import msgspec

import unetc
from tests.house.test_layout import imports
from tests.promises.promise import Outcome, Promise

ROOT = Path(unetc.__file__).parent
TESTS = Path(__file__).parents[1]


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A trial that ended."""

    code: str
    """Digest of the code that was tried."""
    trial: int
    outcome: Outcome
    seconds: float


def code_digest(promise: Promise) -> str:
    """Hash the sources of unetc, of a promise and of the tests that it imports: outcomes of other code do not count."""
    own = sorted(modules_of_tests(promise))
    return hashlib.sha256(b"".join(map(Path.read_bytes, own)) + _sources_digest()).hexdigest()


def modules_of_tests(promise: Promise) -> set[Path]:
    """List the module of a promise, and the modules of the tests that it imports, directly or not."""
    found: set[Path] = set()
    waiting = [Path(inspect.getfile(inspect.unwrap(promise.prepare)))]
    while waiting:
        if (path := waiting.pop()).is_file() and path not in found:
            found.add(path)
            waiting += _imported(path)
    return found


def _imported(path: Path) -> Iterator[Path]:
    """List where the modules of the tests may be that a module imports."""
    name = ".".join(path.relative_to(TESTS.parent).with_suffix("").parts)
    for _, found in imports(name, path):
        if found.startswith(f"{TESTS.name}."):
            place = TESTS.parent.joinpath(*found.split("."))
            yield from (place.with_suffix(".py"), place.parent.with_suffix(".py"))


@functools.cache
def _sources_digest() -> bytes:
    digest = hashlib.sha256()
    for folder in (ROOT, ROOT / "analyzer", ROOT / "compiler", ROOT / "runtime"):
        for path in sorted(folder.resolve().rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.digest()


class Journal:
    """Trials of one promise."""

    def __init__(self, promise: Promise, folder: Path) -> None:
        """Read what a folder has of a promise."""
        self._path = folder / f"{promise.name}.jsonl"
        self._code = code_digest(promise)
        self.lines = {line.trial: line for line in self._read()}

    def _read(self) -> Iterator[Line]:
        if not self._path.exists():
            return
        for text in self._path.read_bytes().splitlines():
            try:
                line = msgspec.json.decode(text, type=Line)
            except msgspec.DecodeError:
                continue  # the run was killed while it wrote the line
            if line.code == self._code:
                yield line

    def add(self, trial: int, outcome: Outcome, seconds: float) -> None:
        """Write down a trial."""
        line = Line(code=self._code, trial=trial, outcome=outcome, seconds=round(seconds, 3))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(b"\n" + msgspec.json.encode(line) + b"\n")
        self.lines[trial] = line

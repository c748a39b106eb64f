"""A file with one line per trial, so that a run that was killed goes on where it was."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import msgspec

import unetc
from tests.promises.promise import Outcome, Promise

ROOT = Path(unetc.__file__).parent


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A trial that ended."""

    code: str
    """Digest of the code that was tried."""
    trial: int
    outcome: Outcome
    seconds: float


def code_digest(promise: Promise) -> str:
    """Hash the sources of unetc and of a promise: outcomes of other code do not count."""
    own = Path(inspect.getfile(inspect.unwrap(promise.prepare))).read_bytes()
    return hashlib.sha256(own + _sources_digest()).hexdigest()


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

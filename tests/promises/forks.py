"""Commands in separate processes, which can be killed at any moment."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tests.promises.changes import changes_in
from tests.promises.forked import READY, Asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A command that has ended."""

    code: int
    """Exit code, or minus the signal that has killed it."""
    changes: int
    """Changes to files that it has made."""
    words: str
    """Last line of stderr."""

    @property
    def killed(self) -> bool:
        """Whether it was killed."""
        return self.code in (-signal.SIGKILL, -signal.SIGXFSZ)


_LONGEST_OUTPUT = 2**20
"""Bytes of output that wait to be read; the command would wait for room."""


class Pipe:
    """A named pipe that takes the output of a command: limits for files do not hold for it."""

    def __init__(self, path: Path) -> None:
        """Make the pipe."""
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        self.path = path
        self._handle = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        fcntl.fcntl(self._handle, fcntl.F_SETPIPE_SZ, _LONGEST_OUTPUT)
        self._read = b""

    @property
    def text(self) -> str:
        """All that was written so far."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._handle, _LONGEST_OUTPUT):
                self._read += part
        return self._read.decode()

    def close(self) -> None:
        """Give the pipe up."""
        os.close(self._handle)


@dataclass(frozen=True, slots=True)
class Process:
    """A process as long as it lives; its number may then belong to another one."""

    _handle: int
    _out: Pipe

    @property
    def said(self) -> str:
        """Its output so far."""
        return self._out.text

    def ends_within(self, seconds: float) -> bool:
        """Wait for its end; tell whether it has come."""
        return bool(select.select([self._handle], [], [], seconds)[0])

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if not self.ends_within(0.0):
            signal.pidfd_send_signal(self._handle, number)


Meanwhile = Callable[[Process], None]
"""Called with the process of a command, which runs on."""


class Desk:
    """A folder that commands run in, one after the other."""

    def __init__(self, folder: Path) -> None:
        """Start the process that forks, so that its start is not taken for a part of the first command.

        Args:
            folder: The folder; clocks and output are kept next to it.
        """
        self.folder = folder
        self._counter = folder.with_name("changes")
        _forking()

    @property
    def changes(self) -> int:
        """Changes to files of the command that runs, so far."""
        return changes_in(self._counter)

    def forget(self, clock: str) -> None:
        """Forget the readings of a clock, so that the next command takes new ones."""
        self._clock(clock).unlink()

    def _clock(self, name: str) -> Path:
        return self.folder.with_name(f"{name}.json")

    def run(
        self,
        arguments: tuple[object, ...],
        clock: str,
        *,
        meanwhile: Meanwhile | None = None,
        last: int | None = None,
        longest: int | None = None,
    ) -> Ended:
        """Run a command to its end.

        Args:
            arguments: The command line; paths may be relative to the folder.
            clock: Name of the clock; see `tests.promises.clock`.
            meanwhile: Is given the process.
            last: Number of changes after which the next one kills it.
            longest: Bytes of the longest file; it dies while it writes a longer one.
        """
        forking = _forking()
        with (
            contextlib.closing(Pipe(self.folder.with_name("stdout"))) as out,
            contextlib.closing(Pipe(self.folder.with_name("stderr"))) as err,
        ):
            asked = Asked(
                arguments=tuple(map(str, arguments)),
                folder=str(self.folder),
                out=str(out.path),
                err=str(err.path),
                clock=str(self._clock(clock)),
                changes=str(self._counter),
                last=last,
                longest=longest,
            )
            _tell(forking, msgspec.json.encode(asked))
            with _held(int(_answer(forking)), out) as process:
                _tell(forking, b"")
                if meanwhile is not None:
                    meanwhile(process)
            code = int(_answer(forking))
            return Ended(code=code, changes=self.changes, words=(err.text.splitlines() or [""])[-1])


@functools.cache
def _forking() -> subprocess.Popen[bytes]:
    """Start the process that forks, which all promises share; it ends with this one, as its stdin does."""
    command = [sys.executable, "-m", "tests.promises.forked"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert _answer(process) == READY
    return process


def _tell(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(line + b"\n")
    process.stdin.flush()


def _answer(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


@contextmanager
def _held(number: int, out: Pipe) -> Iterator[Process]:
    """Hold a process by its number."""
    handle = os.pidfd_open(number)
    try:
        yield Process(handle, out)
    finally:
        os.close(handle)

"""Commands in separate processes, which can be killed at any moment or lack something."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec

from tests.promises.changes import changes_in
from tests.promises.forking import READY, Asked
from tests.promises.limits import obey_rights


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A command that has ended."""

    code: int
    """Exit code, or minus the signal that has killed it."""
    err: str
    """All that it wrote to stderr."""
    left: tuple[str, ...]
    """Processes that it left behind."""

    @property
    def words(self) -> str:
        """Its last line."""
        return self.err.splitlines()[-1] if self.err else ""

    @property
    def killed(self) -> bool:
        """Whether it was killed."""
        return self.code in (-signal.SIGKILL, -signal.SIGXFSZ)


_LONGEST_S = 300.0
"""A command that takes longer hangs, and is killed; the longest takes a minute."""
_LONGEST_OUTPUT = 2**20
"""Bytes of output that wait to be read; the command would wait for room."""


class Pipe:
    """A named pipe that takes the output of a command: neither limits for files nor a full disk hold for it."""

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
    """A folder that commands run in, one after the other, each in a process that is forked for it."""

    def __init__(self, folder: Path, *, heavy: bool = True) -> None:
        """Start the process that forks, so that its start is not taken for a part of the first command.

        Args:
            folder: The folder; clocks and output are kept next to it.
            heavy: Whether commands need torch.
        """
        self.folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._counter = folder.with_name("changes")
        self._forking = subprocess.Popen(
            [sys.executable, "-m", "tests.promises.forking", "heavy" if heavy else "light"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=obey_rights,
        )
        assert self._answer() == READY

    def close(self) -> None:
        """End it."""
        self._forking.communicate()

    def __enter__(self) -> Self:
        """Return the desk."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process that forks."""
        self.close()

    @property
    def changes(self) -> int:
        """Changes to files of the command that runs, or ran last; only with a clock."""
        return changes_in(self._counter)

    def forget(self, clock: str) -> None:
        """Forget the readings of a clock, so that the next command takes new ones."""
        self._clock(clock).unlink()

    def _clock(self, name: str) -> Path:
        return self.folder.with_name(f"{name}.json")

    def run(
        self,
        arguments: tuple[object, ...],
        *,
        meanwhile: Meanwhile | None = None,
        clock: str = "",
        last: int | None = None,
        **limits: Any,
    ) -> Ended:
        """Run a command to its end.

        Args:
            arguments: The command line; paths may be relative to the folder.
            meanwhile: Is given the process.
            clock: Name of its clock, see `tests.promises.clock`. With one, its changes to files are counted.
            last: Number of changes after which the next one kills it.
            limits: Arguments of `limit`.
        """
        with (
            contextlib.closing(Pipe(self.folder.with_name("stdout"))) as out,
            contextlib.closing(Pipe(self.folder.with_name("stderr"))) as err,
        ):
            asked = Asked(
                arguments=tuple(map(str, arguments)),
                folder=str(self.folder),
                out=str(out.path),
                err=str(err.path),
                limits=limits,
                clock=str(self._clock(clock)) if clock else None,
                changes=str(self._counter) if clock else None,
                last=last,
            )
            self._tell(msgspec.json.encode(asked))
            number = int(self._answer())
            with _held(number, out) as process:
                self._tell(b"")
                if meanwhile is not None:
                    meanwhile(process)
                if not process.ends_within(_LONGEST_S):
                    process.send(signal.SIGKILL)
            code = int(self._answer())
            return Ended(code=code, err=err.text, left=tuple(_session(number)))

    def _tell(self, line: bytes) -> None:
        assert self._forking.stdin is not None
        self._forking.stdin.write(line + b"\n")
        self._forking.stdin.flush()

    def _answer(self) -> str:
        assert self._forking.stdout is not None
        return self._forking.stdout.readline().decode().strip()


@contextmanager
def _held(number: int, out: Pipe) -> Iterator[Process]:
    """Hold a process by its number."""
    handle = os.pidfd_open(number)
    try:
        yield Process(handle, out)
    finally:
        os.close(handle)


def _session(leader: int) -> Iterator[str]:
    """List the processes of a session that still run."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = entry.read_text().rpartition(") ")
        except OSError:
            continue
        state, _, _, session = rest.split()[:4]
        if int(session) == leader and state != "Z":
            yield name

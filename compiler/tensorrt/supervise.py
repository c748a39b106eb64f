"""Run each build in a separate process, with a time limit; a build that crashes is tried again with less effort."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from unetc.errors import EngineBuildError
from unetc.nvidia.driver import showing
from unetc.nvidia.key import Effort

from .messages import STEPS, Advance, BuildRequest, Built, Refused, decode, encode

CHILD = (sys.executable, "-P", "-m", "unetc.compiler.tensorrt.child")
"""Command of the process; with -P it imports nothing from the folder that it is started in."""
TRIES = 3
_TAIL = 400
"""Bytes of the end of a process's stderr that are shown."""


class Running:
    """The processes that are building; all of them can be stopped at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def add(self, process: subprocess.Popen[bytes]) -> None:
        """Add a process that was started."""
        with self._lock:
            self._processes.add(process)
            if self.stopped:
                process.kill()

    def remove(self, process: subprocess.Popen[bytes]) -> None:
        """Remove a process that has ended."""
        with self._lock:
            self._processes.discard(process)

    def check(self) -> None:
        """Refuse to continue after `stop`.

        Raises:
            EngineBuildError: If the processes were stopped.
        """
        if self.stopped:
            raise EngineBuildError("cancelled, because another engine failed or you stopped it.")

    def stop(self) -> None:
        """Kill all processes, and each that is added from now on."""
        with self._lock:
            self.stopped = True
            for process in self._processes:
                process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """An engine that was built."""

    engine: Path
    built: Built
    effort: Effort
    """Effort of the try that succeeded."""
    tries: int
    seconds: float
    """Time of all tries together."""


def build_engine(
    request: BuildRequest,
    folder: Path,
    *,
    time_limit_s: float,
    on_advance: Callable[[int], None],
    command: Sequence[str] = CHILD,
    running: Running | None = None,
) -> Outcome:
    """Build an engine in another process; try again with less effort when that crashes or runs out of memory.

    Args:
        request: The engine to build.
        folder: A private folder with the graph and its weights; the engine is written there.
        time_limit_s: Limit for all tries together.
        on_advance: Called with the number of `STEPS` that are done, and with 0 at the start of every try. If it raises,
            the process is stopped.
        command: Command of the process, which reads the request and answers with messages.
        running: Lets another thread stop the build.

    Raises:
        EngineBuildError: If the library refuses the graph, the time is over, the last try has crashed too, another
            thread has stopped the build, or the process cannot be given the GPU.
    """
    running = running or Running()
    began = time.monotonic()
    deaths: list[str] = []
    for effort in _ladder(request.effort):
        left = time_limit_s - (time.monotonic() - began)
        (folder / request.engine).unlink(missing_ok=True)
        on_advance(0)
        one = msgspec.structs.replace(request, effort=effort)
        answer = _run(one, folder, command, max(left, 0.0), on_advance, running)
        if isinstance(answer, Built):
            return Outcome(
                engine=folder / request.engine,
                built=answer,
                effort=effort,
                tries=len(deaths) + 1,
                seconds=time.monotonic() - began,
            )
        running.check()
        if isinstance(answer, Refused) and not answer.memory:
            raise EngineBuildError(answer.message)
        deaths.append(answer.message if isinstance(answer, Refused) else answer)
        if time.monotonic() - began >= time_limit_s:
            raise EngineBuildError(
                f"no engine within {time_limit_s:g} s ({_once(deaths)}). "
                "Give it more with --time-limit, or build for fewer sizes."
            )
    raise EngineBuildError(
        f"building failed {len(deaths)} times, with less effort each time: {_once(deaths)}. " + _advice(request)
    )


def _once(deaths: Sequence[str]) -> str:
    """Join the messages, each once."""
    return "; ".join(dict.fromkeys(deaths))


def _advice(request: BuildRequest) -> str:
    if request.target == "tensorrt-rtx" and request.sizes.one_side_varies():
        return "Make both height and width a range, or neither: tensorrt_rtx 1.7 fails on some graphs otherwise."
    return "Build for smaller sizes, or where there is more memory."


def _ladder(first: Effort) -> list[Effort]:
    """List the effort of each try: one level less and half the scratch memory each time."""
    return [
        Effort(optimization_level=max(0, first.optimization_level - i), workspace_share=first.workspace_share / 2**i)
        for i in range(TRIES)
    ]


def _run(
    request: BuildRequest,
    folder: Path,
    command: Sequence[str],
    time_limit_s: float,
    on_advance: Callable[[int], None],
    running: Running,
) -> Built | Refused | str:
    """Run one process to its end; return its answer, or a text that describes its crash."""
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | showing(request.gpu),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            start_new_session=True,  # Ctrl-C reaches only unetc, which stops the process
        )
        clock = threading.Timer(min(time_limit_s, threading.TIMEOUT_MAX), process.kill)
        clock.start()
        running.add(process)
        last: Built | Refused | None = None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            try:
                with process.stdin as stdin:
                    stdin.write(encode(request))
            except BrokenPipeError:
                pass  # it has crashed already; its exit code is read below
            for line in process.stdout:
                try:
                    message = decode(line)
                except msgspec.MsgspecError:
                    continue  # output of the library, or a line cut off when the process was killed
                if isinstance(message, Advance):
                    on_advance(min(message.done, STEPS))
                else:
                    last = message
            process.wait()
        finally:
            process.kill()  # does nothing to one that has ended
            process.wait()
            running.remove(process)
            clock.cancel()
            process.stdout.close()
        if last is not None and process.returncode == 0:
            return last
        return _death(process.returncode, words)


def _death(code: int, words: BinaryIO) -> str:
    how = f"exit code {code}" if code >= 0 else f"ended by signal {signal.Signals(-code).name}"
    words.seek(max(0, words.seek(0, os.SEEK_END) - _TAIL))
    tail = " ".join(words.read().decode(errors="replace").split())
    return f"{how} ({tail})" if tail else how

"""One process or thread at a time builds an engine; a process that dies releases its lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from unetc.lock import locked, locked_with_note
from unetc.progress import Progress

TAKES_TURNS = """
import os, sys, threading, time
from pathlib import Path
from unetc import lock

lock._EVERY_S = 0.01
folder, path = Path(sys.argv[1]), Path(sys.argv[2])

def take_turns():
    for _ in range(20):
        with lock.locked(path, lambda: None):
            with (folder / "log").open("a") as log:
                log.write(f"{os.getpid()} {threading.get_ident()}\\n")
                log.flush()
                time.sleep(0.001)
                log.write(f"{os.getpid()} {threading.get_ident()}\\n")

threads = [threading.Thread(target=take_turns) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
HOLDS = """
import sys, time
from pathlib import Path
from unetc.lock import locked

with locked(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    time.sleep(300)
"""


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Hold a lock in another process."""
    with subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def test_threads_of_several_processes_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "key.lock"
    command = [sys.executable, "-c", TAKES_TURNS, str(tmp_path), str(path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    log = (tmp_path / "log").read_text().splitlines()
    assert len(log) == 3 * 3 * 20 * 2
    assert log[::2] == log[1::2], "somebody came in before the one before was out"
    assert len(set(log)) == 9


def test_the_lock_of_a_process_that_dies_is_let_go(tmp_path: Path) -> None:
    path, waits = tmp_path / "key.lock", []
    with held(path) as process:

        def kill() -> None:
            if not waits:
                os.kill(process.pid, signal.SIGKILL)
            waits.append(time.monotonic())

        with locked(path, kill):
            assert waits
            assert waits[-1] - waits[0] < 20


def test_who_waits_can_give_up_and_other_locks_are_free(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    path = tmp_path / "key.lock"
    with held(path):
        with locked(tmp_path / "other.lock", stop):
            pass
        with pytest.raises(KeyboardInterrupt), locked(path, stop):
            pytest.fail("two hold it")


def test_who_waits_is_told_why_once(tmp_path: Path) -> None:
    path, told = tmp_path / "key.lock", list[Progress]()
    with held(path) as process:

        def tell(progress: Progress) -> None:
            told.append(progress)
            threading.Timer(1.0, process.kill).start()  # several looks later

        with locked_with_note(path, "analyses this model", tell):
            pass
    assert [one.note for one in told] == ["another process analyses this model; waiting for its results"]
    with locked_with_note(path, "analyses this model", lambda _: pytest.fail("waits for nobody")):
        pass


def test_what_is_raised_inside_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "key.lock"
    with pytest.raises(ZeroDivisionError), locked(path, lambda: pytest.fail("waits for nobody")):
        _ = 1 / 0
    with locked(path, lambda: pytest.fail("waits for nobody")):
        pass


@pytest.mark.parametrize("why", ["no folder", "no locks"])
def test_where_files_cannot_be_locked_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    path = tmp_path / "key.lock"
    if why == "no folder":
        (tmp_path / "file").write_text("mine")
        path = tmp_path / "file" / "key.lock"
    if why == "no locks":

        def refuse(handle: int, operation: int) -> None:
            raise OSError(37, "No locks available")

        monkeypatch.setattr("fcntl.flock", refuse)
    inside = threading.Barrier(2, timeout=20)

    def enter() -> None:
        with locked(path, lambda: pytest.fail("waits for nobody")):
            inside.wait()

    thread = threading.Thread(target=enter)
    thread.start()
    enter()
    thread.join()
    assert not inside.broken

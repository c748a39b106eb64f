"""Files in the place of a plain one, which nobody may follow, wait for or read without end."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class Hang(BaseException):
    """Something has taken too long. Not an `Exception`, so that nothing under test handles it."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Turn a hang, such as on a pipe without a writer, into a failure."""

    def ring(*_: object) -> None:
        raise Hang(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_symlink(path: Path) -> None:
    """Move a file or a folder out of its folder, and leave a link."""
    path.symlink_to(path.rename(path.parents[1] / "real"))


def make_hard_link(path: Path) -> None:
    """Give a file a second name outside of its folder."""
    os.link(path, path.parents[1] / "second")


def make_fifo(path: Path) -> None:
    """Put a pipe without a writer in the place of a file."""
    path.unlink()
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    """Put a folder in the place of a file."""
    path.unlink()
    path.mkdir()


def make_socket(path: Path) -> None:
    """Put a socket in the place of a file."""
    path.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")  # the path itself may be too long for a socket
    os.close(folder)


def make_device(path: Path) -> None:
    """Put a link to a device without end in the place of a file."""
    path.unlink()
    path.symlink_to("/dev/zero")


DISGUISES: Mapping[str, Callable[[Path], None]] = {
    "symbolic link": make_symlink,
    "hard link": make_hard_link,
    "pipe": make_fifo,
    "folder": make_folder,
    "socket": make_socket,
    "device": make_device,
}
"""Ways to replace a file."""

"""A command that finds a disk full or a folder read-only says so and loses nothing; with room, it completes."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from tests.promises.commands import CACHE, OUT, TEMPORARY, commands_of, desks
from tests.promises.limits import Limits
from tests.promises.promise import Outcome, Place, Promise, Trial
from tests.promises.shortage import tried

LEAST_BYTES = 2**12
"""Least size of a file or a disk; the error itself needs some room."""
LARGE_BYTES = 2**30
REASONS = ("No space left on device", "File too large", "Permission denied")
"""Reasons, as the system words them."""


@contextmanager
def full(folder: Path, room: int) -> Iterator[Limits]:
    """Let a folder take only some more files and folders."""
    yield Limits(full=str(folder), after=room)


@contextmanager
def short_files(folder: Path, room: int) -> Iterator[Limits]:
    """Let every file, in whatever folder, take only some kibibytes."""
    yield Limits(file=LEAST_BYTES + 2**10 * room)


@contextmanager
def read_only(folder: Path, room: int) -> Iterator[Limits]:
    """Take the right to change anything in a folder; it takes nothing at all."""
    folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    try:
        yield Limits()
    finally:
        for path in folders:
            path.chmod(0o755)


@contextmanager
def small(folder: Path, room: int) -> Iterator[Limits]:
    """Leave some kibibytes on the file system of a folder."""
    resize(folder, used(folder) + LEAST_BYTES + 2**10 * room)
    try:
        yield Limits()
    finally:
        resize(folder, LARGE_BYTES)


def used(folder: Path) -> int:
    """Count the bytes that are used on the file system of a folder."""
    facts = os.statvfs(folder)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


def resize(folder: Path, size: int) -> None:
    """Change the size of a file system in memory."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


@contextmanager
def own_disk(folder: Path) -> Iterator[bool]:
    """Put a file system in memory into an empty folder, if the system allows it."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={LARGE_BYTES}", "tmpfs", str(folder)]
    made = subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    try:
        yield made.returncode == 0
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


KINDS = (full, short_files, read_only, small)
PLACES = {"sample": (OUT,), "export": (OUT,), "sample low": (OUT, TEMPORARY), "serve": (TEMPORARY,)}
"""Folders in which a command writes; the commands that need torch write in all of them."""


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """List the commands."""
    light, heavy = commands_of(place)
    with desks(place.own) as both:

        def trial(number: int) -> Outcome:
            """Run one command on one kind of disk that takes no more."""
            dice = random.Random(number)
            turn, kind = number // len(light), KINDS[(number + number // len(KINDS)) % len(KINDS)]
            command = heavy[turn // 4 % len(heavy)] if turn % 4 == 3 else light[number % len(light)]
            desk = both.desk(heavy=command.heavy)
            place_of = desk.folder / dice.choice(PLACES.get(command.name, (OUT, CACHE, TEMPORARY)))
            warm = place.cache if dice.random() < 0.75 else None
            with own_disk(place_of) if kind is small else nullcontext(True) as allowed:
                shortage = partial(kind if allowed else full, place_of)
                older, room = dice.random() < 0.5, int(2 ** dice.uniform(0, 3 if command.heavy else 6)) - 1
                named = str(desk.folder)
                return tried(desk, command, shortage, room, REASONS, named=named, older=older, cache=warm)

        yield trial


PROMISE = Promise(
    name="disk",
    promised="A full disk or a read-only folder is an error that names the file; nothing is lost or half-written, and "
    "with room the same command completes.",
    tried="A small file system, files or folders that take no more, and read-only folders, for results, cache or "
    "temporary files, under sample, export, build, analyze and pareto.",
    prepare=prepare,
    trials=160,
    short=3,
    seconds=4.7,
)

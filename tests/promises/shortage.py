"""A command that lacks something says so, and loses nothing; when nothing is missing, it completes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from tests.promises.commands import CACHE, OUT, TEMPORARY, Command, clear, run
from tests.promises.desk import Desk, Ended
from tests.promises.limits import Limits
from tests.promises.promise import Outcome
from tests.tree import tree

Shortage = Callable[[int], AbstractContextManager[Limits]]
"""Takes away all but an amount, for the time of a command; the unit is the shortage's own."""


def tried(
    desk: Desk,
    command: Command,
    shortage: Shortage,
    room: int,
    words: tuple[str, ...],
    *,
    named: str = "",
    older: bool,
    cache: Path | None,
) -> Outcome:
    """Run a command with too little until it fails, and then with enough.

    A native library may end the process, which does not count as a try; no result may be lost then either.

    Args:
        desk: Where to run it.
        command: The command.
        shortage: What is missing.
        room: How much is left; it is halved until the command fails.
        words: Texts of which the error must hold one.
        named: Text that the error must hold too.
        older: Whether there is a result of an earlier command.
        cache: A cache to begin with.
    """
    problems: list[str] = []
    while True:
        clear(desk.folder, cache)
        if older and command.output:
            _put_older(desk, command)
        before = tree(desk.folder / OUT)
        with shortage(room) as limits:
            ended = run(desk, command, limits)
            if ended.code:
                problems += _changed(desk, before)
            if ended.killed:
                problems.append("hangs")  # nobody else kills it
            if ended.code > 0:
                problems += [*_silent(ended, words, named), *_left(desk, ended)]
        if ended.code > 0 or room == 0:
            break
        problems += [] if ended.code == 0 else _unfinished(desk, command, run(desk, command, Limits()))
        room //= 2
    problems += _unfinished(desk, command, run(desk, command, Limits()))
    return Outcome(
        tries=int(ended.code > 0), broken=tuple(f"{command.name}, room for {room}: {one}" for one in problems)
    )


def _put_older(desk: Desk, command: Command) -> None:
    place = desk.folder / OUT / command.output
    if command.older is None:
        place.write_bytes(b"an older one")
    else:
        shutil.copytree(command.older, place)


def _silent(ended: Ended, words: tuple[str, ...], named: str) -> list[str]:
    """Check the error."""
    if ended.code != 1 or not ended.words.startswith("unetc: ") or "Traceback" in ended.err:
        return [f"ended with {ended.code} and said {ended.err[-600:]!r}"]
    if named in ended.words and any(word in ended.words for word in words):
        return []
    return [f"does not name the lack: {ended.words}"]


def _changed(desk: Desk, before: Mapping[str, bytes | None]) -> list[str]:
    """List changed results."""
    after = tree(desk.folder / OUT)
    return [f"changed {name}" for name in sorted(after | before) if after.get(name) != before.get(name)]


def _left(desk: Desk, ended: Ended) -> list[str]:
    """List processes and temporary files that were left behind."""
    own = desk.folder / TEMPORARY
    temporary = [*(desk.folder / CACHE).rglob(".*"), *(desk.folder / OUT).glob(".*"), *own.iterdir()]
    return [f"left {one}" for one in (*ended.left, *(path.relative_to(desk.folder) for path in temporary))]


def _unfinished(desk: Desk, command: Command, ended: Ended) -> list[str]:
    """Say why a command that lacks nothing did not finish, or is not whole."""
    if ended.code:
        return [f"ended with {ended.code} although nothing is missing: {ended.err[-600:]}"]
    try:
        command.read(desk.folder / OUT / command.output)
    except Exception as error:
        return [f"wrote a result that cannot be read: {error}"]
    return _left(desk, ended)

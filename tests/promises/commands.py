"""Commands that write, with short work, and the folders that they write in."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import unetc
from tests.promises.desk import Desk, Ended, Process
from tests.promises.limits import Limits
from tests.promises.promise import Place
from tests.tiny_build import once
from unetc.artifacts import Profile
from unetc.artifacts.pareto import Pareto
from unetc.models.images import read_image
from unetc.runtime.bundle import Bundle
from unetc.triton.repository import EXPORT, Export

_READY_WITHIN_S = 60.0
OUT, CACHE, TEMPORARY = "out", "cache", "tmp"
"""Folders of a desk: for the result, for captures and partial results, and for temporary files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command of unetc that writes."""

    name: str
    arguments: tuple[str, ...]
    output: str
    """Name of its result; empty if it writes none."""
    read: Callable[[Path], object]
    """Reads the result whole, or raises."""
    older: Path | None = None
    """A result of an earlier command, if the kind of the older one matters."""
    heavy: bool = False
    """Whether it needs torch."""
    endless: bool = False
    """Whether it runs until it is told to end, after it has written a line."""


def commands_of(place: Place) -> tuple[list[Command], list[Command]]:
    """List the commands that need no torch, and those that do, with short work on the tiny model and its bundle."""
    model, build = str(place.tiny_model), place.tiny_build
    bundle, profile = str(build / "bundle"), str(build / "profile.json")
    exported = once(place.shared / "tiny-repository", partial(_export, build / "bundle"))
    given = (model, "--profile", profile, "--steps", "4")
    plain = ("--plan", str(build / "plan.json"), "--no-controls", "--no-tune", "--repair", "0")
    short = ("--steps", "4", "--samples", "2", "--bins", "2", "--batch", "2", "--threads", "1", "--screen-only")
    low = ("--memory", "low")
    commands = (
        Command(name="sample", arguments=("sample", bundle), output="samples.png", read=_read_picture),
        Command(
            name="export",
            arguments=("export", "triton", bundle),
            output="repository",
            read=_read_export,
            older=exported,
        ),
        Command(name="sample low", arguments=("sample", bundle, *low), output="low.png", read=_read_picture),
        Command(
            name="serve",
            arguments=("serve", bundle, "--port", "0", *low),
            output="",
            read=lambda folder: None,
            endless=True,
        ),
        Command(
            name="build",
            arguments=("build", *given, *plain),
            output="bundle",
            read=Bundle.open,
            older=build / "bundle",
            heavy=True,
        ),
        Command(
            name="analyze", arguments=("analyze", model, *short), output="profile.json", read=Profile.load, heavy=True
        ),
        Command(
            name="pareto",
            arguments=("pareto", *given, "--budgets", "1"),
            output="pareto.json",
            read=Pareto.load,
            heavy=True,
        ),
    )
    return [one for one in commands if not one.heavy], [one for one in commands if one.heavy]


def _export(bundle: Path, folder: Path) -> None:
    unetc.export_triton(bundle, folder)


def _read_picture(path: Path) -> None:
    read_image(path, 16, 16, channels=1)


def _read_export(path: Path) -> None:
    export = Export.load(path / EXPORT)
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file() and file.name != EXPORT]
    if sum(sizes) != export.bytes_apart:
        raise AssertionError(f"{path} has {sum(sizes)} bytes; its record says {export.bytes_apart}")


def clear(folder: Path, cache: Path | None) -> None:
    """Make the folders of a desk empty, but for a cache."""
    for name in (OUT, CACHE, TEMPORARY):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in (folder / name).iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if cache is not None:
        shutil.copytree(cache, folder / CACHE, dirs_exist_ok=True)


def run(desk: Desk, command: Command, limits: Limits) -> Ended:
    """Run a command under limits."""
    place = ("-o", desk.folder / OUT / command.output) if command.output else ()
    return desk.run((*command.arguments, *place), meanwhile=_end_when_ready if command.endless else None, **limits)


def _end_when_ready(process: Process) -> None:
    """Tell a process to end once it has written something, unless it ends before."""
    latest = time.monotonic() + _READY_WITHIN_S
    while not process.said and not process.ends_within(0.05) and time.monotonic() < latest:
        pass
    process.send(signal.SIGTERM)


class Desks:
    """A desk with torch and one without, each set up when it is first needed."""

    def __init__(self, folder: Path) -> None:
        """Take a folder for both."""
        self._folder = folder
        self._there: dict[bool, Desk] = {}

    def desk(self, *, heavy: bool) -> Desk:
        """Return a desk."""
        if heavy not in self._there:
            folder = self._folder / ("heavy" if heavy else "light")
            clear(folder, None)
            self._there[heavy] = Desk(folder, heavy=heavy)
        return self._there[heavy]

    def close(self) -> None:
        """End both."""
        for desk in self._there.values():
            desk.close()


@contextmanager
def desks(folder: Path) -> Iterator[Desks]:
    """Set up desks, and end them."""
    made = Desks(folder)
    try:
        yield made
    finally:
        made.close()

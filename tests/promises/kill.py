"""A command that is killed at any moment leaves nothing half-written, and the same command then completes.

Times never repeat, and decide which plans are chosen. So every run gets the times of the one that nobody kills.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import httpx2

from tests.promises.desk import Desk, Ended, Process
from tests.promises.limits import Limits
from tests.promises.promise import Outcome, Place, Promise, Trial
from unetc.artifacts.manifest import MANIFEST
from unetc.errors import ArtifactError, StaleEngineError
from unetc.nvidia.cache import ENGINE, RECORD, EngineCache, EngineRecord
from unetc.runtime.bundle import Bundle

_READY_WITHIN_S = 600.0
_GONE_WITHIN_S = 60.0
"""Time for processes of a killed command to notice that it is gone."""
_TIMINGS = 5
"""Runs until one has times with which there is a plan: on a busy machine no part of so small a model may save any."""
_TEMPORARY = "tmp"
RTX = find_spec("tensorrt_rtx") is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A command, in a folder that it begins with."""

    name: str
    arguments: tuple[object, ...]
    """Paths are relative to the folder."""
    given: Mapping[str, Path] = field(default_factory=dict)
    """Files and folders that are there before."""
    older: Mapping[str, Path] = field(default_factory=dict)
    """Earlier results in their place, which half of the trials begin with."""
    serves: bool = False
    """Whether it is a server, which is ready at some time and never completes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The run that nobody kills."""

    files: Mapping[str, str]
    written: tuple[int, ...]
    """Bytes of each file that it writes."""
    changes: int
    answer: str
    """The image that a server made."""
    seconds: float
    """Time until the end, or until the server was ready."""


@dataclass(slots=True)
class Folder:
    """The folder that every run of every case has to itself."""

    path: Path

    def begin(self, case: Case, *, older: bool = False) -> None:
        """Set up the folder of a case."""
        shutil.rmtree(self.path, ignore_errors=True)
        (self.path / _TEMPORARY).mkdir(parents=True)
        for name, source in {**case.given, **(case.older if older else {})}.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, self.path / name)

    def files(self) -> dict[str, str]:
        """Describe the content of all files, except for locks and hidden ones, which no command reads."""
        return {name: _content(path) for name, path in self._all() if not _hidden(name)}

    def written(self, case: Case) -> tuple[int, ...]:
        """List the bytes of files that a command writes; a server writes given ones again, to map them."""
        kept = () if case.serves else tuple(case.given)
        files = [path for name, path in self._all() if not any(Path(name).is_relative_to(one) for one in kept)]
        return tuple(size for path in files if (size := path.stat().st_size))

    def hidden_bytes(self) -> int:
        """Add up files that no command reads."""
        temporary = [path for path in (self.path / _TEMPORARY).rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in [*temporary, *(p for name, p in self._all() if _hidden(name))])

    def leftovers(self) -> list[str]:
        """List temporary files next to results."""
        return [name for name, _ in self._all() if _hidden(name) and ".unetc-" in name]

    def bundles(self) -> Iterator[tuple[Path, str]]:
        """List all folders that load as bundles, hidden ones too, with the hash of their manifests."""
        for manifest in sorted(self.path.rglob(MANIFEST)):
            with contextlib.suppress(ArtifactError):
                Bundle.open(manifest.parent)
                yield manifest.parent, _content(manifest)

    def _all(self) -> Iterator[tuple[str, Path]]:
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path)
            if path.is_file() and name.parts[0] != _TEMPORARY and path.suffix != ".lock":
                yield str(name), path


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def _content(path: Path) -> str:
    """Hash a file. The cache of engines draws its secret, and no engine is built in the same time twice."""
    if path.parent.name == "engines":
        return str(path.stat().st_size)
    if path.name in (ENGINE, RECORD):
        if not (path.parent / RECORD).exists():
            return "whole"  # nothing reads it
        try:
            record, _ = EngineCache(path.parents[1]).open(EngineRecord.load(path.parent / RECORD).key)
        except (ArtifactError, StaleEngineError) as error:
            return str(error)
        return "whole" if path.name == ENGINE else repr((record.key, record.layers, record.shapes, record.tries))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(slots=True)
class Killer:
    """Kills commands, and runs them again."""

    folder: Folder
    desk: Desk
    whole: dict[str, Whole] = field(default_factory=dict)
    """By the name of the case."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of the last run from beginning to end, by the name of the case: other work on the machine changes it."""

    def complete(self, case: Case) -> tuple[Ended, Whole]:
        """Run a command to its end, or a server until it has made an image."""
        begun, answer, changes = time.monotonic(), "", 0
        ended = begun

        def ask(server: Process) -> None:
            nonlocal answer, changes, ended
            address = _address_of(server)
            ended, changes = time.monotonic(), self.desk.changes
            if address:
                answer = _image_of(address)
                server.send(signal.SIGTERM)

        done = self.desk.run(case.arguments, clock=case.name, meanwhile=ask if case.serves else None)
        if not case.serves:
            ended, changes = time.monotonic(), self.desk.changes
        files, written = self.folder.files(), self.folder.written(case)
        return done, Whole(files=files, written=written, changes=changes, answer=answer, seconds=ended - begun)

    def expected(self, case: Case) -> Whole:
        """Return the run that nobody kills; it is made once."""
        if case.name not in self.whole:
            self.whole[case.name] = self._first(case)
        return self.whole[case.name]

    def _first(self, case: Case) -> Whole:
        words = ""
        for _ in range(_TIMINGS):
            self.folder.begin(case)
            done, whole = self.complete(case)
            if done.code == 0:
                self.seconds[case.name] = whole.seconds
                return whole
            words = done.words
            self.desk.forget(case.name)
        raise AssertionError(words)

    def kill(self, case: Case, dice: random.Random) -> str:
        """Begin a command and kill it; return where, or nothing if it had ended before."""
        whole, moment, last, limits = self.whole[case.name], None, None, Limits()
        match dice.choice(("moment", "moment", "change", "byte")):
            case "moment":
                moment = dice.uniform(0.0, self.seconds[case.name])
                where = f"after {moment:.2f} of {self.seconds[case.name]:.2f} s"
            case "change":
                last = dice.randrange(whole.changes)
                where = f"before change {last + 1} of {whole.changes}"
            case _:
                limits = Limits(file=dice.randrange(dice.choice(whole.written)), deadly=True)
                where = f"at byte {limits['file'] + 1} of a file"

        def wait(process: Process) -> None:
            if moment is not None:
                process.ends_within(moment)
                process.send(signal.SIGKILL)
            elif case.serves and _address_of(process):
                process.send(signal.SIGKILL)  # its start is over

        begun = time.monotonic()
        if self.desk.run(case.arguments, clock=case.name, meanwhile=wait, last=last, **limits).killed:
            return where
        if moment is not None:
            self.seconds[case.name] = time.monotonic() - begun
        return ""


def _address_of(server: Process) -> str:
    """Wait until a server says where it listens; nothing if it ends before."""
    latest = time.monotonic() + _READY_WITHIN_S
    while not server.ends_within(0.02) and time.monotonic() < latest:
        with contextlib.suppress(json.JSONDecodeError):
            address: str = json.loads(server.said)["address"]
            return address
    return ""


def _image_of(address: str) -> str:
    body = {"seed": 1, "num_inference_steps": 4, "response_format": "b64_json"}
    answer = httpx2.post(f"{address}/v1/images/generations", json=body, timeout=60)
    image: str = answer.json()["data"][0]["b64_json"]
    return image


def _left_in(folder: Path) -> list[str]:
    """List the processes that work in a folder, after some time for them to end."""
    latest = time.monotonic() + _GONE_WITHIN_S
    while found := list(_working_in(folder)):
        if time.monotonic() > latest:
            return found
        time.sleep(0.05)
    return []


def _working_in(folder: Path) -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(process / "cwd").removesuffix(" (deleted)")).is_relative_to(folder):
                yield (process / "comm").read_text().strip()


def broken(killer: Killer, case: Case, dice: random.Random) -> tuple[list[str], float]:
    """Kill a command once, look at the files that it leaves, and run it again; return problems and bytes left."""
    expected, folder = killer.expected(case), killer.folder
    older, where = dice.random() < 0.5, ""
    while not where:
        folder.begin(case, older=older)
        before = folder.files()
        where = killer.kill(case, dice)
    found = folder.files()
    problems = [
        f"{name} is half-written"
        for name, content in found.items()
        if content not in (expected.files.get(name), before.get(name))
    ]
    known = {content for files in (expected.files, before) for content in files.values()}
    problems += [f"{path.name} loads and is none" for path, content in folder.bundles() if content not in known]
    problems += [f"{name} is lost" for name in case.given if not (folder.path / name).exists()]
    again, whole = killer.complete(case)
    if again.code:
        problems.append(f"run again, it ends with {again.code}: {again.words}")
    problems += [f"{name} is missing in the end" for name in expected.files.keys() - whole.files.keys()]
    problems += [
        f"{name} differs in the end" for name, content in whole.files.items() if content != expected.files.get(name)
    ]
    if whole.answer != expected.answer:
        problems.append("the server makes another image")
    problems += [f"{name} is left in the end" for name in folder.leftovers()]
    problems += [f"process {name} is left" for name in _left_in(folder.path / _TEMPORARY)]
    return [f"{case.name}, killed {where}: {one}" for one in problems], folder.hidden_bytes()


def cases_of(place: Place) -> tuple[Case, ...]:
    """List the commands."""
    model, build = place.tiny_model, place.tiny_build
    profile, bundle = build / "profile.json", build / "bundle"
    cached = place.captured
    small = ("--steps", 4, "--cache", "cache")
    quick = ("--samples", 2, "--bins", 2, "--batch", 2, "--threads", 1, "--components", "mid_block.*")
    analysis = ("analyze", model, *small, *quick, "-o", "profile.json")
    serving = Case(
        name="serve",
        arguments=("serve", "plain=bundle", "--memory", "low", "--port", _free_port(), "--json"),
        given={"bundle": bundle},
        serves=True,
    )
    building = ("--profile", profile, "--budget", "0.3", "--repair", 3, "--no-controls", "-o", "bundle")
    cases = (
        Case(name="analyze", arguments=analysis, given=cached, older={"profile.json": profile}),
        serving,
        Case(name="build", arguments=("build", model, *small, *building), given=cached, older={"bundle": bundle}),
        Case(
            name="pareto",
            arguments=("pareto", model, *small, "--profile", profile, "--budgets", 2, "-o", "pareto.json"),
            given=cached,
            older={"pareto.json": profile, "pareto.svg": profile},
        ),
        Case(name="analyze from the capture on", arguments=analysis),
    )
    compiling = Case(name="compile", arguments=("compile", "bundle", "--cache", "cache"), given={"bundle": bundle})
    return (*cases, compiling) if RTX else cases


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """Set up the folder of all commands."""
    cases = cases_of(place)
    work = place.own / "work"
    with Desk(work) as desk:
        killer = Killer(folder=Folder(work), desk=desk)

        def trial(number: int) -> Outcome:
            """Kill a command once."""
            problems, left = broken(killer, cases[number % len(cases)], random.Random(number))
            return Outcome(broken=tuple(problems), figures={"kB that a killed command leaves behind": left / 1024})

        yield trial


PROMISE = Promise(
    name="kill",
    promised="A command that is killed leaves nothing half-written; the same command then completes, with the results "
    "of one that nobody killed, and deletes the temporary files next to them.",
    tried="SIGKILL at a random moment or before a random change to files, or an end within a file, of analyze, "
    f"build, pareto, {'compile ' if RTX else ''}and the start of serve, in turn; every other time over earlier results."
    + ("" if RTX else " compile was left out: tensorrt-rtx is not installed."),
    prepare=prepare,
    trials=200,
    short=1,
    seconds=12,
)

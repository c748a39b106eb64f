"""An artifact is data: nothing in it is imported or run, and none is too deep or too large to be refused."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import unetc
from tests.disguises import Hang, within
from tests.ground.records import CLASSES
from tests.house.test_layout import code_offences, modules
from tests.nvidia.cached_engine import KEY, cache_in
from tests.promises.mutation import holders
from tests.promises.paths import SECONDS, broken
from tests.promises.promise import Outcome, Place, Promise, Trial
from tests.promises.requests import BODIES, is_error
from tests.runtime.forgery import CONTAINERS, MALFORMED, Payload, edit, forge, packed, reseal
from tests.server.local import local
from unetc.artifacts.manifest import MANIFEST
from unetc.artifacts.record import MAX_JSON_BYTES, read_cached
from unetc.errors import UnetcError
from unetc.nvidia.cache import RECORD

CANARY = "canary_of_unetc"
"""Name of a module that leaves a trace when it is imported."""
NAMES_OF_CODE = (
    *(CANARY, f"{CANARY}:run", f"{CANARY}.run", f"{CANARY}.py", f"./{CANARY}.py", f"{CANARY}:cpu", f"torch:{CANARY}"),
    *(f"__import__('{CANARY}')", f"$(python -m {CANARY})", f"`{CANARY}`", f"!!python/module:{CANARY}"),
    *("{0.__class__}", "%(name)s", "{{ 7 * 7 }}", "os.system", "builtins.eval", "../../__init__", "file:///dev/null"),
)
"""Texts that some program would take for code, or for a name of code."""
_OBJECTS = {"no schema", "schema as text", "no fields", "byte order mark"}
"""Malformed artifacts that are good bodies, as every field of a request has a default."""
FIELDS = ("target", "name", "description", "denoiser", "pipeline", "prediction_type", "unetc", "table", "_class_name")
"""Fields whose texts become names of code; hashes and paths that differ are refused too early to tell anything."""


def name_code(manifest: dict[str, Any], field: str, dice: random.Random) -> None:
    """Write names of code in the place of the texts of a field, and as keys."""
    for holder, key in holders(manifest):
        if key == field and isinstance(holder[key], str):
            holder[key] = dice.choice(NAMES_OF_CODE)
    manifest["notes"] = [*NAMES_OF_CODE]
    for name in dice.sample(NAMES_OF_CODE, 3):
        manifest["denoiser_config"][name] = {"_class_name": CANARY, "__reduce__": [CANARY]}


def forgeries(original: Path, own: Path, dice: random.Random) -> list[Path]:
    """Forge bundles: with names of code, and with pickles in the place of files."""
    found = []
    for field in FIELDS:
        found.append(Path(shutil.copytree(original, own / f"named-{field}")))
        edit(found[-1], partial(name_code, field=field, dice=dice))
    files = [one["path"] for one in json.loads((original / MANIFEST).read_bytes())["files"]]
    for container in CONTAINERS:
        found.append(Path(shutil.copytree(original, own / container)))
        forge(found[-1], dice.choice(files), packed(Payload(own / "trace"), container))
    return found


def run_watched(known: list[Path], forged: list[Path], own: Path) -> Iterator[str]:
    """Load and sample bundles in another process, where the canary can be imported."""
    (own / f"{CANARY}.py").write_text(f"open({str(own / 'trace')!r}, 'w')\n")
    command = [sys.executable, "-m", "tests.promises.watched", *map(str, known), "--", *map(str, forged)]
    places = [str(own), *filter(None, sys.path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": ":".join(places)}
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or len(lines) != len(forged):
        yield f"the process ended with {done.returncode}: {done.stderr[-500:]}"
    for line in lines:
        yield from (f"{Path(line['bundle']).name}: {event}" for event in line["events"])
    if (own / "trace").exists():
        yield "code of an artifact has run"


# JSON


def json_tries(original: Path, own: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Read texts that are no artifact, through every reader."""
    bundle = Path(shutil.copytree(original, own / "malformed"))
    cache = cache_in(own)
    file = own / "artifact.json"

    def in_bundle(text: bytes) -> None:
        reseal(bundle, text)
        unetc.load(bundle)

    def in_cache(text: bytes) -> None:
        (cache.folder(KEY) / RECORD).write_bytes(text)
        cache.open(KEY)

    def intermediate(text: bytes) -> None:
        file.write_bytes(text)
        if read_cached(file, dict[str, list[int]]) is None:
            raise UnetcError("made again")

    def loaded(text: bytes, kind: Any) -> None:
        file.write_bytes(text)
        kind.load(file)

    readers: dict[str, Callable[[bytes], object]] = {
        "a bundle": in_bundle,
        "the engine cache": in_cache,
        "the cache": intermediate,
        **{name: partial(loaded, kind=kind) for name, kind in CLASSES.items()},
    }
    for reader, read in readers.items():
        for name, text in MALFORMED.items():
            if (reader, name) != ("the cache", "no schema"):  # an empty object is a dictionary
                yield f"JSON in {reader}: {name}", partial(read, text)
    for name, kind in CLASSES.items():
        yield f"JSON in {name}: too large", partial(_huge, file, kind.load)


def _huge(file: Path, read: Callable[[Path], object]) -> None:
    with file.open("wb") as hole:
        hole.truncate(100 * MAX_JSON_BYTES)  # a sparse file, which takes no space on the disk
    try:
        read(file)
    finally:
        file.unlink()


async def body_problems(bundle: Path) -> tuple[int, list[str]]:
    """Send texts that are no body to every address that takes one."""
    limit = 2**18
    texts = {name: text for name, text in MALFORMED.items() if name not in _OBJECTS}
    texts["too large"] = b" " * (limit + 1)
    problems, tries = [], 0
    async with local(bundle, body_bytes=limit) as (client, _):
        for path in BODIES:
            for name, text in texts.items():
                tries += 1
                try:
                    with within(SECONDS):
                        answer = await client.post(path, content=text, headers={"Content-Type": "application/json"})
                except (Exception, Hang) as error:
                    problems.append(f"body of {path}: {name}: {type(error).__name__}: {error}")
                    continue
                if not 400 <= answer.status_code < 500 or not is_error(path, answer):
                    problems.append(f"body of {path}: {name}: {answer.status_code} {answer.text[:100]}")
    return tries, problems


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """Build a bundle."""
    bundle = place.tiny_build / "bundle"

    def trial(number: int) -> Outcome:
        """Forge some bundles, and read every malformed text through every reader."""
        own = place.own / str(number)
        own.mkdir()
        try:
            damaged = Path(shutil.copytree(bundle, own / "damaged"))
            (damaged / MANIFEST).write_bytes(b"{}")
            forged = forgeries(bundle, own, random.Random(number))
            problems = [*run_watched([bundle, damaged], forged, own)]
            sources = {} if number else modules()  # they are the same in every trial
            problems += [one for name, path in sources.items() for one in code_offences(name, path)]
            tries = [*json_tries(bundle, own)]
            problems += [problem for name, one in tries for problem in broken(name, one)]
            requests, more = asyncio.run(body_problems(bundle))
        finally:
            shutil.rmtree(own)
        return Outcome(tries=len(sources) + len(forged) + len(tries) + requests, broken=(*problems, *more))

    yield trial


PROMISE = Promise(
    name="code",
    promised="Nothing in an artifact is imported or run, and none is read that is too deep or too large.",
    tried=(
        "Names of modules, code and templates in the place of texts of a bundle, and pickles in the place of its "
        "files, sampled in a watched process; malformed, deep and huge JSON through every reader."
    ),
    prepare=prepare,
    trials=40,
    short=1,
    seconds=2.7,
)

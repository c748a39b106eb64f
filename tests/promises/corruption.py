"""Damage to any file of a bundle, or of an engine in the cache, is noticed before anything reads the contents."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import unetc
from tests.nvidia.cached_engine import KEY, cache_in
from tests.promises.promise import Outcome, Place, Promise, Trial
from tests.runtime.parsers import PARSERS
from unetc.artifacts.manifest import DIGEST, MANIFEST, Manifest
from unetc.errors import CorruptArtifactError, StaleEngineError, UnetcError
from unetc.nvidia.cache import EngineCache


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Flip a bit, cut the end off, or insert a byte, at a random place."""
    place = dice.randrange(len(content))
    match dice.choice(("flip", "cut", "insert")):
        case "flip":
            return content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1 :]
        case "cut":
            return content[:place]
        case _:
            return content[:place] + dice.randbytes(1) + content[place:]


def broken(file: Path, dice: random.Random, read: Callable[[], object], refusal: type[UnetcError]) -> tuple[str, ...]:
    """Damage a file, read what it belongs to, and put the file back."""
    content = file.read_bytes()
    file.write_bytes(changed := damaged(content, dice))
    what = f"{file.name}, {len(content)} → {len(changed)} bytes"
    try:
        read()
    except refusal as error:
        return () if file.name in str(error) or refusal is StaleEngineError else (f"{what}: not named in {error}",)
    except AssertionError as error:
        return (f"{what}: {error}",)
    finally:
        file.write_bytes(content)
    return (f"{what}: accepted",)


@contextmanager
def unread(parsers: tuple[tuple[object, str], ...]) -> Iterator[None]:
    """Raise AssertionError where something parses contents."""
    with ExitStack() as patches:
        for owner, name in parsers:
            error = AssertionError(f"{name} read contents that were not verified")
            patches.enter_context(mock.patch.object(owner, name, side_effect=error))
        yield


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """Copy a bundle, and put an engine into a cache."""
    bundle = shutil.copytree(place.tiny_build / "bundle", place.own / "bundle")
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    engines = cache_in(place.own)
    cached = sorted(path for path in engines.folder(KEY).iterdir())

    def trial(number: int) -> Outcome:
        """Damage every file of the bundle and of the engine once."""
        dice = random.Random(number)
        problems: list[str] = []
        for file in files:
            parsers = ((Manifest, "from_json"),) if file.name in (MANIFEST, DIGEST) else ()
            with unread(PARSERS + parsers):
                problems += broken(file, dice, lambda: unetc.load(bundle), CorruptArtifactError)
        for file in cached:
            problems += broken(file, dice, lambda: EngineCache(engines.root).open(KEY), StaleEngineError)
        return Outcome(tries=len(files) + len(cached), broken=tuple(problems))

    yield trial


PROMISE = Promise(
    name="corruption",
    promised="A damaged file of a bundle or of a cached engine is refused by name, before anything parses it.",
    tried="One bit flipped, the end cut off, or a byte inserted, at a random place of every file.",
    prepare=prepare,
    trials=60,
    short=2,
    seconds=0.14,
)

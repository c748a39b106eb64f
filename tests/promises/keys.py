"""An engine never runs where anything that it depends on differs: it is built again, or refused."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tests.nvidia.cached_engine import ENGINE_BYTES, KEY, record
from tests.promises.promise import Outcome, Place, Promise, Trial
from unetc.compiler.tensorrt.wanted import find_engines
from unetc.errors import StaleEngineError
from unetc.nvidia.cache import RECORD, EngineCache, EngineRecord
from unetc.nvidia.key import EngineKey, Gpu
from unetc.nvidia.sizes import MOST, Range, Sizes
from unetc.precision import Precision
from unetc.progress import Progress

WIDE = msgspec.structs.replace(
    KEY,
    sizes=Sizes(
        batch=Range(least=2, usual=4, most=8),
        height=Range(least=16, usual=64, most=128),
        width=Range(least=16, usual=64, most=128),
    ),
)
"""A key in which every number can fall and rise."""
Change = tuple[str, Any]
"""Place of a value in the key, and another value for it."""


def changes(value: Any, dice: random.Random, place: str = "") -> Iterator[Change]:
    """List another value for each value in a key: one that differs a little, and is valid."""
    match value:
        case Range():
            yield f"{place}.least", msgspec.structs.replace(value, least=dice.randint(1, value.least - 1))
            usual = dice.choice([size for size in range(value.least, value.most + 1) if size != value.usual])
            yield f"{place}.usual", msgspec.structs.replace(value, usual=usual)
            yield f"{place}.most", msgspec.structs.replace(value, most=dice.randint(value.most + 1, MOST))
        case msgspec.Struct():
            for field in value.__struct_fields__:
                for name, other in changes(getattr(value, field), dice, f"{place}.{field}"):
                    yield name, msgspec.structs.replace(value, **{field: other})
            if isinstance(value, Gpu):
                yield place, None
        case dict():
            name, shape = dice.choice(sorted(value.items()))
            number = dice.randrange(len(shape))
            yield f"{place} (a size)", {**value, name: (*shape[:number], shape[number] + 1, *shape[number + 1 :])}
            yield f"{place} (an axis)", {**value, name: shape[:-1]}
            yield f"{place} (a name)", {f"{name}_2": shape}
            yield f"{place} (one more)", {**value, "added": (1,)}
            yield f"{place} (none)", {}
        case Precision():
            yield place, dice.choice([one for one in Precision if one is not value])
        case str():
            at = dice.randrange(len(value))
            digits = "0123456789abcdef" if len(value) == 64 else "abcxyz.09 "
            yield place, value[:at] + dice.choice(digits.replace(value[at], "")) + value[at + 1 :]
        case float():
            yield place, value * dice.uniform(0.01, 0.99)
        case int():
            yield place, value + dice.choice((-1, 1))
        case _:
            raise AssertionError(f"{place} is of an unknown type: {value!r}")


def refused(use: Callable[[], object]) -> str:
    """Expect a refusal, and say so if there is none."""
    try:
        use()
    except StaleEngineError:
        return ""
    return "run"


def built_again(key: EngineKey, cache: EngineCache, *, trust: bool) -> str:
    """Expect that a compilation does not take the engine from the cache."""
    notes: list[Progress] = []
    found = find_engines({("engines/full.onnx", key.precision): key}, cache, trust=trust, on_progress=notes.append)
    return "taken by a compilation" if found else ""


def found(key: EngineKey, cache: EngineCache) -> str:
    """Expect that a session for a key does not find the engine, unless it was built for calls of other sizes."""
    asked = (key.graph_sha256, key.weights_sha256, key.precision, key.origin)
    if asked == (WIDE.graph_sha256, WIDE.weights_sha256, WIDE.precision, WIDE.origin):
        return ""  # sizes, rows and effort are not asked for: an engine says which calls it takes
    return refused(lambda: cache.find(*asked, {})) and "found by a session"


def problems_of(key: EngineKey, cache: EngineCache) -> Iterator[str]:
    """Ask for a key where the cache has the engine of another."""
    yield refused(lambda: cache.open(key, trust=True))
    yield built_again(key, cache, trust=True)
    yield found(key, cache)
    folder = cache.folder(key)
    shutil.copytree(cache.folder(WIDE), folder)  # as if two keys had one hash, or somebody moved it
    try:
        yield refused(lambda: cache.open(key, trust=True)) and "run from a folder that was moved"
        yield built_again(key, cache, trust=True)
        edited = msgspec.structs.replace(EngineRecord.load(folder / RECORD), key=key)
        edited.save(folder / RECORD)
        yield refused(lambda: cache.open(key)) and "run with an edited record"
        yield built_again(key, cache, trust=False)
    finally:
        shutil.rmtree(folder)


@contextmanager
def prepare(place: Place) -> Iterator[Trial]:
    """Put an engine into a cache."""
    cache = EngineCache(Path(place.own) / "engines")
    cache.put(record(WIDE), ENGINE_BYTES)
    cache.open(WIDE)

    def trial(number: int) -> Outcome:
        """Change every value of the key once."""
        tries, broken = 0, []
        for field, key in changes(WIDE, random.Random(number)):
            for problem in problems_of(key, cache):
                tries += 1
                if problem:
                    broken.append(f"an engine is {problem}, though {field[1:]} differs: {key}")
        return Outcome(tries=tries, broken=tuple(broken))

    yield trial


PROMISE = Promise(
    name="keys",
    promised="An engine that differs in anything that it depends on is built again or refused, and never run.",
    tried=(
        "Every value of an engine's key changed, in the request, with the engine moved to the other key's folder, and "
        "with its record edited."
    ),
    prepare=prepare,
    trials=50,
    short=1,
    seconds=0.06,
)

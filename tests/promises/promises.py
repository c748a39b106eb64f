"""All promises, in the order of docs/promises.md."""

from __future__ import annotations

from tests.promises import code, corruption, fuzz, keys, kill, paths, sweep
from tests.promises.promise import Promise

PROMISES: tuple[Promise, ...] = (
    kill.PROMISE,
    corruption.PROMISE,
    paths.PROMISE,
    code.PROMISE,
    keys.PROMISE,
    sweep.PROMISE,
    fuzz.PROMISE,
)

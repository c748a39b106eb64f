"""All promises, in the order of docs/promises.md."""

from __future__ import annotations

from tests.promises import code, concurrency, corruption, fuzz, keys, kill, leaks, non_finite, overload, paths, sweep
from tests.promises.promise import Promise

PROMISES: tuple[Promise, ...] = (
    kill.PROMISE,
    corruption.PROMISE,
    paths.PROMISE,
    code.PROMISE,
    keys.PROMISE,
    sweep.PROMISE,
    non_finite.PROMISE,
    concurrency.PROMISE,
    leaks.PROMISE,
    overload.PROMISE,
    fuzz.PROMISE,
)

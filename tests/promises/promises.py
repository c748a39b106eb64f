"""All promises, in the order of docs/promises.md."""

from __future__ import annotations

from tests.promises import (
    code,
    concurrency,
    corruption,
    determinism,
    disk,
    fuzz,
    keys,
    kill,
    leaks,
    memory,
    non_finite,
    numerics,
    overload,
    paths,
    sweep,
)
from tests.promises.promise import Promise

PROMISES: tuple[Promise, ...] = (
    kill.PROMISE,
    corruption.PROMISE,
    paths.PROMISE,
    code.PROMISE,
    keys.PROMISE,
    sweep.PROMISE,
    non_finite.PROMISE,
    memory.PROMISE,
    concurrency.PROMISE,
    leaks.PROMISE,
    overload.PROMISE,
    numerics.PROMISE,
    determinism.PROMISE,
    fuzz.PROMISE,
    disk.PROMISE,
)

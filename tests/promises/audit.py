"""Audit events of the interpreter while something under test runs, on any thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

Event = tuple[str, tuple[Any, ...]]
_listeners: list[tuple[frozenset[str], list[Event]]] = []


@contextmanager
def heard(*names: str) -> Iterator[list[Event]]:
    """Write down the events of these names."""
    _listen()
    listener = (frozenset(names), list[Event]())
    _listeners.append(listener)
    try:
        yield listener[1]
    finally:
        _listeners.remove(listener)


@cache
def _listen() -> None:
    """Add the hook, once: nobody can remove it."""
    sys.addaudithook(_hear)


def _hear(name: str, arguments: tuple[Any, ...]) -> None:
    for names, events in _listeners:
        if name in names:
            events.append((name, arguments))

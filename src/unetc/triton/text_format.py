"""Protocol buffers in their text format, which Triton reads its configurations in.

Source:
    https://protobuf.dev/reference/protobuf/textformat-spec/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

_PLAIN = frozenset(range(0x20, 0x7F)) - frozenset(b'"\\')
"""Bytes that stand for themselves in a string."""


def to_text(message: Mapping[str, Any]) -> str:
    """Write a message.

    Args:
        message: Fields by name. A mapping is a message, a sequence is a repeated field, a `StrEnum` is the name of an
            enumerated value. An empty mapping is written, an empty sequence is not.
    """
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            if value and not isinstance(value[0], Mapping):
                yield f"{name}: [{', '.join(map(_scalar, value))}]"
                continue
            for one in value:
                yield from _block(name, one)
        elif isinstance(value, Mapping):
            yield from _block(name, value)
        else:
            yield f"{name}: {_scalar(value)}"


def _block(name: str, message: Mapping[str, Any]) -> Iterator[str]:
    yield f"{name} {{"
    yield from (f"  {line}" for line in _lines(message))
    yield "}"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, StrEnum) or not isinstance(value, str):
        return str(value)
    return '"' + "".join(chr(byte) if byte in _PLAIN else f"\\{byte:03o}" for byte in value.encode()) + '"'

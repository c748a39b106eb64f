"""Documents that differ from a valid one in a few places: most of them reach the checks deep inside."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

DEEP: Any = json.loads("[" * 60 + "]" * 60)
ODD = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30),
    *(0.0, -0.0, 0.5, 1.0, -1.5, 5e-324, 1e-9, 1e308, -1e308, float("nan"), float("inf")),
    *("", " ", "a", "0", "auto", "full", "..", "/", "\0", "\n", "#0", "Ä", "\ud800", "\U0001f600", "a" * 5000, "1e999"),
    *([], {}, [[]], [{}], [None], [0] * 70, {"": None}, DEEP),
)
"""Values at the edges of what a field can take, and beyond."""
_odd = st.sampled_from(ODD) | st.integers(-10, 1100) | st.floats(-1e3, 1e3) | st.text(max_size=12)
_place = st.integers(0, 2**30)
_kind = st.sampled_from(("odd", "odd", "odd", "near", "near", "near", "copy", "delete", "add", "repeat"))
_few = st.sampled_from((1, 1, 1, 2, 3))
_byte_kind = st.sampled_from(("flip", "cut", "insert"))

Holder = tuple[Any, Any]
"""An object or a list, and a key or an index in it."""


def holders(value: Any) -> Iterator[Holder]:
    """List every place in a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield value, key
        yield from holders(inner)


@st.composite
def mutated(draw: st.DrawFn, texts: tuple[str, ...]) -> str:
    """Change one of several documents in one to three places."""
    whole = [json.loads(draw(st.sampled_from(texts)))]
    for _ in range(draw(_few)):
        if not (places := list(holders(whole))):
            break
        change(draw, *places[draw(_place) % len(places)], places)
    return json.dumps(whole[0] if whole else None)


def change(draw: st.DrawFn, holder: Any, key: Any, places: list[Holder]) -> None:
    """Change one place."""
    match draw(_kind):
        case "odd":
            holder[key] = deepcopy(draw(_odd))
        case "near":
            holder[key] = deepcopy(near(draw, holder[key]))
        case "copy":
            other, its_key = places[draw(_place) % len(places)]
            holder[key] = deepcopy(other[its_key])
        case "delete":
            del holder[key]
        case "add" if isinstance(holder, dict):
            holder[draw(st.text(max_size=4))] = deepcopy(draw(_odd))
        case _ if isinstance(holder, list):
            holder.insert(key, deepcopy(holder[key]))
        case _:
            holder[draw(st.sampled_from(("schema", "model", "seed", "name")))] = deepcopy(holder[key])


def near(draw: st.DrawFn, value: Any) -> Any:
    """Change a value and keep its type."""
    match value:
        case bool():
            return not value
        case int():
            return draw(st.sampled_from((value + 1, value - 1, -value, value * 1000, float(value), str(value))))
        case float():
            whole = int(value) if math.isfinite(value) else 0
            return draw(st.sampled_from((-value, value * 1e9, value / 1e9, value + 1, whole)))
        case str():
            at = draw(_place) % (len(value) + 1)
            return value[:at] + draw(st.text(max_size=3)) + value[at + draw(st.integers(0, 2)) :]
        case list():
            return draw(st.sampled_from((value[::-1], value[1:], value * 2, value[:-1])))
        case dict():
            return draw(st.sampled_from(([value], list(value), {**value, "": 0})))
    return draw(_odd)


@st.composite
def damaged(draw: st.DrawFn, texts: tuple[str, ...]) -> bytes:
    """Change the bytes of one of several documents."""
    text = draw(st.sampled_from(texts)).encode()
    for _ in range(draw(_few)):
        at = draw(_place) % (len(text) + 1)
        match draw(_byte_kind):
            case "flip" if at < len(text):
                text = text[:at] + bytes([text[at] ^ 1 << draw(st.integers(0, 7))]) + text[at + 1 :]
            case "cut":
                text = text[:at]
            case _:
                text = text[:at] + draw(st.binary(max_size=4)) + text[at:]
    return text


def documents(*texts: str) -> st.SearchStrategy[bytes]:
    """Make documents that differ from valid ones, most of them by their values, some by their bytes."""
    by_value = mutated(texts).map(lambda text: text.encode(errors="surrogatepass"))
    return st.integers(0, 9).flatmap(lambda share: damaged(texts) if share == 0 else by_value)

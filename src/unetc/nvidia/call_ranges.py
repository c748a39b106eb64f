"""Check calls against the call ranges of an engine: the least and the largest shape of every input."""

from __future__ import annotations

from collections.abc import Mapping

from unetc.errors import ShapeMismatch

from .cache import EngineRecord
from .key import compile_command
from .sizes import MOST, SAMPLE, Shape


def check_call(record: EngineRecord, shapes: Mapping[str, Shape]) -> None:
    """Refuse a call that an engine was not built for.

    Args:
        record: Record of the engine.
        shapes: Shape of every input of the call; inputs that the engine does not read are ignored.

    Raises:
        ShapeMismatch: If a shape is outside the engine's call ranges; the message names the command that builds an
            engine for it.
    """
    if (name := record.refused(shapes)) is None:
        return
    least, _, most = record.shapes[name]
    got = shapes[name]
    raise ShapeMismatch(
        f"the {record.key.origin.target} engine takes {name} of {_describe(least, most)}, got {list(got)}. "
        + _advice(record, name, got)
    )


def _describe(least: Shape, most: Shape) -> str:
    sizes = (str(low) if low == high else f"{low} to {high}" for low, high in zip(least, most, strict=True))
    return f"[{', '.join(sizes)}]"


def _advice(record: EngineRecord, name: str, got: Shape) -> str:
    key = record.key
    if name == SAMPLE:
        if len(got) != 4 or not all(1 <= size <= MOST for size in got):
            return f"No engine takes such a sample: it has four axes, each of 1 to {MOST}."
        batch, _, height, width = got
        sizes = key.sizes.including(batch, height, width)
        return f"Build one that does: `{compile_command(key.origin.target, key.precision, sizes)}`."
    return "It was built for the bundle's own conditions; give some of their shape, or build a bundle with others."

"""Compute the shapes of an engine's inputs from the batch, height and width that it is built for.

The call ranges of an engine are the least, the usual (for which the library optimizes) and the largest shape of every
input. The graph writes height and width of held branches as arithmetic over the sample's height and width, such as
`(height - 1)//2 + 1`. Only this arithmetic is computed here; any other expression is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unetc.compiler.graph.size_arithmetic import compute
from unetc.controlnet import ControlNetInput
from unetc.errors import EngineBuildError
from unetc.nvidia.sizes import MOST, SAMPLE, Shape, Sizes

Dimension = int | str
"""A size, or arithmetic over the names of sizes."""
Signature = Mapping[str, Sequence[Dimension]]


def resolve(
    signature: Signature, sizes: Sizes, rows: Mapping[str, Sequence[int]], controlnet: Sequence[ControlNetInput] = ()
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Compute the least, the usual and the largest shape of every input.

    Args:
        signature: Shape of every input as the graph declares it.
        sizes: Ranges of the sample's batch, height and width.
        rows: Shape of one row of each condition, for sizes that do not follow from the sample (the number of tokens).
        controlnet: ControlNet inputs of the graph; their sizes have separate names in it.

    Raises:
        EngineBuildError: If a shape does not follow from these, or the graph fixes a size to another value.
    """
    axes = zip(sizes.batch.corners(), sizes.height.corners(), sizes.width.corners(), strict=True)
    least, usual, most = (_corner(signature, batch, height, width, rows, controlnet) for batch, height, width in axes)
    return {name: (least[name], usual[name], most[name]) for name in signature}


def _corner(
    signature: Signature,
    batch: int,
    height: int,
    width: int,
    rows: Mapping[str, Sequence[int]],
    controlnet: Sequence[ControlNetInput],
) -> dict[str, Shape]:
    known: dict[str, int] = {}
    if SAMPLE not in signature or len(signature[SAMPLE]) != 4:
        raise EngineBuildError(f"the graph has no input {SAMPLE!r} of four axes. Build the bundle again.")
    channels = signature[SAMPLE][1]
    _bind(SAMPLE, signature[SAMPLE], (batch, channels, height, width), known)
    given = {name: (batch, *row) for name, row in rows.items()}
    given |= {one.name: one.shape(batch, height, width) for one in controlnet}
    for name, shape in given.items():
        if name in signature:
            _bind(name, signature[name], shape, known)
    return {name: tuple(_size(name, one, known) for one in shape) for name, shape in signature.items()}


def _bind(name: str, declared: Sequence[Dimension], sizes: Sequence[Dimension], known: dict[str, int]) -> None:
    """Learn the sizes of names from an input whose shape is known; names that the sample has set keep their size."""
    if len(declared) != len(sizes):
        raise EngineBuildError(f"input {name!r} has the axes {list(declared)}, expected sizes {list(sizes)}.")
    for one, size in zip(declared, sizes, strict=True):
        if isinstance(one, int) and one != size:
            raise EngineBuildError(
                f"the graph fixes a size of input {name!r} at {one}, but {size} was requested. Build for {one}."
            )
        if isinstance(one, str) and one.isidentifier():
            assert isinstance(size, int)
            known.setdefault(one, size)


def _size(name: str, one: Dimension, known: Mapping[str, int]) -> int:
    if isinstance(one, int):
        return one
    try:
        size = compute(one, known)
    except ValueError as error:
        raise EngineBuildError(
            f"cannot compute the size {one!r} of input {name!r} from the sizes {dict(known)}. Please report the model."
        ) from error
    if not 0 < size <= MOST:
        raise EngineBuildError(f"input {name!r} would have a size of {size}. Build for larger or smaller samples.")
    return size

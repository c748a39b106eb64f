"""Messages between unetc and the process that builds an engine: one JSON value a line, no code and no pickle."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from unetc.artifacts.record import Record
from unetc.controlnet import ControlNetInput
from unetc.nvidia.key import Effort
from unetc.nvidia.sizes import Sizes

STEPS = 1000
"""Number of steps in which progress is reported."""


class BuildRequest(Record, frozen=True, kw_only=True):
    """One engine to build; files are named within the folder that the process is started in."""

    target: str
    graph: str
    """ONNX file; its weights are in the same folder."""
    engine: str
    """File to write."""
    timing: str
    """File of the timing cache, for libraries that have one; read if it exists, and written again."""
    sizes: Sizes
    rows: Mapping[str, tuple[int, ...]]
    """Shape of one row of each condition, by the name of its input."""
    controlnet: tuple[ControlNetInput, ...] = ()
    """ControlNet inputs of the graph."""
    effort: Effort
    on_this_gpu: bool = False
    """Whether the engine may run on this GPU alone; always true of a library that builds for one GPU only."""
    gpu: int = 0
    """Index of the GPU among those that CUDA shows to unetc; the building process sees only this one."""


class Advance(Record, frozen=True, kw_only=True, tag="advance"):
    """Progress of a build."""

    done: int
    """Number of `STEPS` that are done."""


class Built(Record, frozen=True, kw_only=True, tag="built"):
    """An engine is written."""

    layers: int
    """Number of layers of the network that the parser made from the graph."""
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    """Least, usual and largest shape of every input."""
    peak_bytes: int
    """Peak memory of the process."""
    scratch_bytes: int | None
    """GPU memory that a call needs in addition to the engine; None if it was built without a GPU."""


class Refused(Record, frozen=True, kw_only=True, tag="refused"):
    """The library has refused to build."""

    message: str
    memory: bool
    """Whether memory ran out, so that less effort may help."""


Message = Advance | Built | Refused


def encode(message: Message | BuildRequest) -> bytes:
    """Encode a message as a line."""
    return msgspec.json.encode(message) + b"\n"


def decode(line: bytes) -> Message:
    """Decode a line that the building process has written.

    Raises:
        msgspec.MsgspecError: If it is not a message.
    """
    return msgspec.json.decode(line, type=Message)  # type: ignore[no-any-return]

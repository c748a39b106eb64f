"""What goes between unetc and the process that builds an engine: one JSON value a line, no code and no pickle."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from unetc.artifacts.record import Record
from unetc.controlnet import ControlNetInput
from unetc.nvidia.key import Effort
from unetc.nvidia.sizes import Sizes

STEPS = 1000
"""Progress is reported in so many parts."""


class BuildRequest(Record, frozen=True, kw_only=True):
    """One engine to build; paths are names in the folder that the process is started in."""

    target: str
    graph: str
    """ONNX file; its weights lie beside it."""
    engine: str
    """File to write."""
    timing: str
    """File of the timing cache, read if it is there and written again; used by libraries that have one."""
    sizes: Sizes
    rows: Mapping[str, tuple[int, ...]]
    """Shape of one row of each condition, by the name of its input."""
    controlnet: tuple[ControlNetInput, ...] = ()
    """What the graph takes of a ControlNet."""
    effort: Effort
    on_this_gpu: bool = False
    """Whether the engine need run on no other GPU; a library that builds for one alone always does so."""
    gpu: int = 0
    """Which of the GPUs that CUDA shows this process; it is all that the building process sees."""


class Advance(Record, frozen=True, kw_only=True, tag="advance"):
    """How far a build has come, of `STEPS`."""

    done: int


class Built(Record, frozen=True, kw_only=True, tag="built"):
    """An engine is written."""

    layers: int
    """Of the network that the parser made of the graph."""
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    """Least, usual and largest shape of every input."""
    peak_bytes: int
    """Most memory that the process has held."""
    scratch_bytes: int | None
    """What a call needs on the GPU beside the engine; None if no GPU was there to tell."""


class Refused(Record, frozen=True, kw_only=True, tag="refused"):
    """The library has refused to build."""

    message: str
    memory: bool
    """Whether less effort may help."""


Message = Advance | Built | Refused


def encode(message: Message | BuildRequest) -> bytes:
    """Write a message as a line."""
    return msgspec.json.encode(message) + b"\n"


def decode(line: bytes) -> Message:
    """Read what the building process has written.

    Raises:
        msgspec.MsgspecError: If it is no message.
    """
    return msgspec.json.decode(line, type=Message)  # type: ignore[no-any-return]

"""The one way to read and write numpy arrays as safetensors, and to find tensors in such a file.

safetensors 0.8.0 itself copies every array that it reads. Where memory runs out, the copy does not fail: it can wait
for ever. Arrays that are read here are views of the content.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "?",
}
"""Types of numpy by the names of the format. numpy has no bfloat16."""
_LENGTH_BYTES = 8
_METADATA = "__metadata__"


class _Place(msgspec.Struct, frozen=True):
    """Where the values of an array are."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]
    """Bytes from the end of the header."""


def save_tensors(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Encode arrays as safetensors, whatever their layout in memory.

    safetensors 0.8.0 itself writes the memory of an array under its shape. A transposed array would be scrambled.
    """
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def load_tensors(data: bytes) -> dict[str, NDArray[Any]]:
    """Read all arrays, without a copy.

    Args:
        data: The content of a safetensors file; it lives as long as one of the arrays.

    Returns:
        Arrays by name, which cannot be written to.

    Raises:
        ValueError: If the content is malformed, or has values of a type that numpy lacks.
    """
    begin, places = _read_header(io.BytesIO(data), len(data))
    return {name: _view(data, begin, name, place) for name, place in places.items()}


def tensor_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """Read the range of each tensor in a safetensors file, in bytes from the start of the file; read no values.

    Raises:
        ValueError: If the file is malformed.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        begin, places = _read_header(file, path.stat().st_size)
    return {name: (begin + place.data_offsets[0], begin + place.data_offsets[1]) for name, place in places.items()}


def _read_header(file: BinaryIO, size: int) -> tuple[int, dict[str, _Place]]:
    """Read the header of safetensors.

    Args:
        file: The content, from its start.
        size: Bytes of the whole content.

    Returns:
        Byte at which the values of all arrays begin, and the place of each array by name.

    Raises:
        ValueError: If the header is malformed, or the arrays do not fill the rest of the content.

    Source:
        https://huggingface.co/docs/safetensors/index#format
    """
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    begin = _LENGTH_BYTES + length
    if begin > size:
        raise ValueError(f"a header of {begin} bytes does not fit into {size} bytes of safetensors")
    try:
        entries = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        entries.pop(_METADATA, None)
        places = {name: msgspec.json.decode(entry, type=_Place) for name, entry in entries.items()}
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"the header of safetensors is malformed: {error}") from error
    values = size - begin
    ranges = [(0, 0), *sorted(place.data_offsets for place in places.values()), (values, values)]
    if any(first > last for first, last in ranges) or any(left[1] != right[0] for left, right in pairwise(ranges)):
        raise ValueError(f"the arrays of safetensors leave gaps in {values} bytes of values, or overlap")
    return begin, places


def _view(data: bytes, begin: int, name: str, place: _Place) -> NDArray[Any]:
    """View the values of an array.

    Args:
        data: The whole content.
        begin: Byte at which the values of all arrays begin.
        name: Name of the array.
        place: Its place.
    """
    if place.dtype not in _TYPES:
        raise ValueError(f"array {name!r} has values of type {place.dtype}; expected one of {', '.join(_TYPES)}")
    dtype, (first, last) = np.dtype(_TYPES[place.dtype]), place.data_offsets
    count = math.prod(place.shape)
    inside = 0 <= first <= last <= len(data) - begin
    if min(place.shape, default=0) < 0 or not inside or last - first != count * dtype.itemsize:
        raise ValueError(
            f"array {name!r} of shape {place.shape} and type {place.dtype} does not fit into bytes {first} to {last} "
            f"of {len(data) - begin}"
        )
    return np.frombuffer(data, dtype, count, begin + first).reshape(place.shape)

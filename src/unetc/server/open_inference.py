"""Bodies of the Open Inference Protocol v2: JSON, with tensors in the JSON or as bytes after it.

A binary tensor follows the JSON in the order of the tensors, little-endian and in row-major order. An element of type
`BYTES` is preceded by its length in four bytes.

Source:
    https://github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md;
    https://github.com/triton-inference-server/server, the page extension_binary_data of its protocol.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unetc.errors import RequestError, brief

from .limits import MOST_DIGITS

HEADER_LENGTH = "Inference-Header-Content-Length"
"""Header with the number of bytes of the JSON, if tensors follow it."""

BYTES, BFLOAT = "BYTES", "BF16"
NUMBERS: Mapping[str, str] = {
    "BOOL": "?",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
"""Element types of numpy by datatype of the protocol."""

_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""Escape of one half of a character."""
_MOST_TENSORS = 64
_MOST_AXES = 8


class BodyError(RequestError):
    """A body does not follow the protocol; `problems` describes each wrong field by its name."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        """Keep the problems."""
        text = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        super().__init__(f"{text}.", next(iter(problems)))
        self.problems = dict(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInput:
    """One tensor of a request."""

    datatype: str
    """Datatype in the request; BF16 arrives as float32."""
    array: NDArray[Any]
    """Values; Python bytes for `BYTES`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """A request to infer."""

    id: str | None = None
    """Chosen by the client, and repeated in the answer."""
    inputs: Mapping[str, TensorInput] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, bool] | None = None
    """Requested outputs, and whether each is sent as bytes; None for all."""
    binary: bool = False
    """Whether all outputs are sent as bytes if none is requested by name."""

    def is_binary(self, output: str) -> bool:
        """Check whether an output is sent as bytes after the JSON."""
        return self.binary if self.outputs is None else self.outputs[output]


def read_infer(body: bytes, header_length: str | None) -> InferRequest:
    """Read a request, in which every tensor must have exactly as many elements as its shape says.

    Args:
        body: JSON, with the bytes of binary tensors after it.
        header_length: Value of the header of that name; None if the body is JSON alone.

    Raises:
        BodyError: If the body does not follow the protocol. It names every wrong field.
    """
    text, rest = _split(body, header_length)
    request = _object(text)
    problems: dict[str, str] = {}
    if not isinstance(request.get("id", ""), str):
        problems["id"] = f"expected a string, got {_short(request['id'])}"
    parameters = request.get("parameters", {})
    if not isinstance(parameters, dict):
        problems["parameters"] = f"expected an object, got {_short(parameters)}"
        parameters = {}
    binary = parameters.get("binary_data_output", False)
    if not isinstance(binary, bool):
        problems["parameters.binary_data_output"] = f"expected true or false, got {_short(binary)}"
        binary = False
    inputs = _inputs(request.get("inputs"), rest, problems)
    outputs = _outputs(request.get("outputs"), binary, problems)
    if problems:
        raise BodyError(problems)
    return InferRequest(
        id=request.get("id") or None,
        inputs=inputs,
        parameters={name: value for name, value in parameters.items() if name != "binary_data_output"},
        outputs=outputs,
        binary=binary,
    )


def write_infer(
    request: InferRequest, model: str, outputs: Mapping[str, NDArray[Any]], parameters: Mapping[str, Any]
) -> tuple[bytes, int | None]:
    """Write an answer.

    Args:
        request: The request; it decides which outputs are sent, and how.
        model: Name of the model.
        outputs: Arrays by name; float16 arrays are sent as `FP16`.
        parameters: Facts about the answer.

    Returns:
        The body, and the length of its JSON if bytes follow it.
    """
    described, parts = [], []
    for name, array in outputs.items():
        if request.outputs is not None and name not in request.outputs:
            continue
        one: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": datatype_of(array)}
        if request.is_binary(name):
            data = array.astype(NUMBERS[one["datatype"]], copy=False).tobytes()
            one["parameters"] = {"binary_data_size": len(data)}
            parts.append(data)
        else:
            one["data"] = array.ravel().tolist()
        described.append(one)
    answer: dict[str, Any] = {"model_name": model, "model_version": "1"}
    if request.id is not None:
        answer["id"] = request.id
    text = json.dumps({**answer, "parameters": dict(parameters), "outputs": described}).encode()
    return b"".join([text, *parts]), len(text) if parts else None


def datatype_of(array: NDArray[Any]) -> str:
    """Return the protocol's name of an array's element type."""
    return next(name for name, kind in NUMBERS.items() if np.dtype(kind) == array.dtype)


def _split(body: bytes, header_length: str | None) -> tuple[bytes, memoryview]:
    """Separate the JSON from the bytes after it."""
    if header_length is None:
        return body, memoryview(b"")
    readable = len(header_length) <= MOST_DIGITS and header_length.isascii() and header_length.isdigit()
    length = int(header_length) if readable else -1
    if not 0 < length <= len(body):
        raise BodyError(
            {
                HEADER_LENGTH: f"expected the length of the JSON, from 1 to the {len(body)} bytes of the body, "
                f"got {_short(header_length)}"
            }
        )
    return body[:length], memoryview(body)[length:]


def _object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object; NaN and infinity are not JSON."""
    try:
        parsed = json.loads(text.decode(), parse_constant=_refuse_constant)
        if _HALF.search(text):
            json.dumps(parsed, ensure_ascii=False).encode()  # fails for half a character, which no answer can repeat
    except (ValueError, RecursionError) as error:
        raise BodyError({"body": f"expected JSON: {brief(error)}"}) from error
    if not isinstance(parsed, dict):
        raise BodyError({"body": f"expected a JSON object, got {_short(parsed)}"})
    return parsed


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _inputs(listed: Any, rest: memoryview, problems: dict[str, str]) -> dict[str, TensorInput]:
    """Read all tensors of a request; the bytes after the JSON belong to the binary ones, in order."""
    if listed is None:
        listed = []
    if not isinstance(listed, list) or len(listed) > _MOST_TENSORS:
        problems["inputs"] = f"expected a list of at most {_MOST_TENSORS} tensors"
        return {}
    found: dict[str, TensorInput] = {}
    offset = 0
    for index, item in enumerate(listed):
        name = item.get("name") if isinstance(item, dict) else None
        if not isinstance(name, str) or not name:
            problems[f"inputs[{index}].name"] = "expected an object with a name"
            return {}  # without its size, the places of the tensors after it are not known
        if name in found or name in problems:
            problems[name] = "is given twice"
            continue
        try:
            data = _bytes_of(item, rest[offset:])
            offset += 0 if data is None else len(data)
            found[name] = _from_json(item) if data is None else _from_bytes(item, data)
        except ValueError as error:
            problems[name] = str(error)
    if not problems and offset != len(rest):
        problems["body"] = f"{len(rest) - offset} bytes after the JSON belong to no tensor; check binary_data_size"
    return found


def _bytes_of(item: Mapping[str, Any], rest: memoryview) -> memoryview | None:
    """Return the bytes of a binary tensor; None if its data is in the JSON."""
    parameters = item.get("parameters", {})
    if not isinstance(parameters, dict):
        raise ValueError(f"expected an object as parameters, got {_short(parameters)}")  # noqa: TRY004
    if "shared_memory_region" in parameters:
        raise ValueError("shared memory is not supported; send the data in the body")
    if (size := parameters.get("binary_data_size")) is None:
        return None
    if type(size) is not int or not 0 <= size <= len(rest):
        raise ValueError(
            f"expected a binary_data_size from 0 to the {len(rest)} bytes that are left, got {_short(size)}"
        )
    return rest[:size]


def _described(item: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """Check the datatype and the shape of a tensor."""
    datatype, shape = item.get("datatype"), item.get("shape")
    if not isinstance(datatype, str) or datatype not in (*NUMBERS, BYTES, BFLOAT):
        raise ValueError(f"expected a datatype, one of {', '.join((*NUMBERS, BYTES, BFLOAT))}, got {_short(datatype)}")
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_AXES
        or not all(type(size) is int and 0 <= size < 2**31 for size in shape)
    ):
        raise ValueError(f"expected a shape, a list of at most {_MOST_AXES} whole numbers, got {_short(shape)}")
    return datatype, tuple(shape)


def _from_bytes(item: Mapping[str, Any], data: memoryview) -> TensorInput:
    datatype, shape = _described(item)
    if "data" in item:
        raise ValueError("has data and a binary_data_size; send one of them")
    count = math.prod(shape)
    if datatype == BYTES:
        return TensorInput(datatype=datatype, array=_bytes_array(list(_elements(data, count)), shape))
    kind = np.dtype("<u2" if datatype == BFLOAT else NUMBERS[datatype])
    if len(data) != count * kind.itemsize:
        raise ValueError(
            f"has {len(data)} bytes; expected {count * kind.itemsize} for {datatype} of shape {list(shape)}"
        )
    array: NDArray[Any] = np.frombuffer(data, kind)
    if datatype == BFLOAT:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    if datatype == "BOOL":
        array = np.frombuffer(data, np.uint8) != 0  # other bytes than 0 and 1 are not valid in numpy
    return TensorInput(datatype=datatype, array=array.reshape(shape))


def _elements(data: memoryview, count: int) -> Iterable[bytes]:
    """Read strings that are preceded by their lengths."""
    offset = 0
    for index in range(count):
        if len(data) - offset < 4:
            raise ValueError(f"ends in the middle of string {index} of {count}")
        (length,) = struct.unpack_from("<I", data, offset)
        offset += 4
        if length > len(data) - offset:
            raise ValueError(f"ends in the middle of string {index} of {count}")
        yield bytes(data[offset : offset + length])
        offset += length
    if offset != len(data):
        raise ValueError(f"has {len(data) - offset} bytes after its {count} string(s)")


def _from_json(item: Mapping[str, Any]) -> TensorInput:
    datatype, shape = _described(item)
    if not isinstance(item.get("data"), list):
        raise ValueError("expected a list as data, or a binary_data_size")  # noqa: TRY004
    flat = list(_flat(item["data"], 0))
    if len(flat) != math.prod(shape):
        raise ValueError(f"has {len(flat)} elements; expected {math.prod(shape)} for shape {list(shape)}")
    if datatype == BYTES:
        if (wrong := next((one for one in flat if not isinstance(one, str)), None)) is not None:
            raise ValueError(f"expected strings, got {_short(wrong)}")
        return TensorInput(datatype=datatype, array=_bytes_array([one.encode() for one in flat], shape))
    if datatype == BFLOAT:
        raise ValueError("BF16 has no form in JSON; send it as bytes")
    return TensorInput(datatype=datatype, array=_numbers(flat, datatype).reshape(shape))


def _numbers(flat: Sequence[Any], datatype: str) -> NDArray[Any]:
    """Convert JSON values to a datatype; a value that it cannot hold is refused."""
    kind = np.dtype(NUMBERS[datatype])
    if kind.kind == "b":
        allowed: tuple[type, ...] = (bool,)
        expected = "true or false"
    elif kind.kind in "iu":
        allowed, expected = (int,), "whole numbers"
    else:
        allowed, expected = (int, float), "numbers"
    for one in flat:
        if type(one) not in allowed:
            raise ValueError(f"expected {expected}, got {_short(one)}")
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, kind)
    except OverflowError as error:
        raise ValueError(f"has a number that {datatype} cannot hold") from error
    if kind.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"has a number that {datatype} cannot hold")
    return array


def _flat(data: Sequence[Any], depth: int) -> Iterable[Any]:
    """Flatten data, which may be nested as its shape says."""
    if depth > _MOST_AXES:
        raise ValueError(f"is nested more than {_MOST_AXES} deep")
    for one in data:
        if isinstance(one, list):
            yield from _flat(one, depth + 1)
        else:
            yield one


def _bytes_array(values: Sequence[bytes], shape: tuple[int, ...]) -> NDArray[Any]:
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(shape)


def _outputs(listed: Any, binary: bool, problems: dict[str, str]) -> dict[str, bool] | None:
    """Read which outputs are requested; an empty list requests all, as no list does."""
    if not listed:
        return None
    if not isinstance(listed, list) or len(listed) > _MOST_TENSORS:
        problems["outputs"] = f"expected a list of at most {_MOST_TENSORS} outputs"
        return None
    found = {}
    for index, item in enumerate(listed):
        name = item.get("name") if isinstance(item, dict) else None
        parameters = item.get("parameters", {}) if isinstance(item, dict) else {}
        if not isinstance(name, str) or not isinstance(parameters, dict):
            problems[f"outputs[{index}]"] = "expected an object with a name"
            continue
        wanted = parameters.get("binary_data", binary)
        if not isinstance(wanted, bool):
            problems[f"outputs[{index}].parameters.binary_data"] = f"expected true or false, got {_short(wanted)}"
            continue
        for unsupported in ("shared_memory_region", "classification"):
            if unsupported in parameters:
                problems[f"outputs[{index}].parameters.{unsupported}"] = "is not supported"
        found[name] = wanted
    return found


def _short(value: Any) -> str:
    """Show a value in a message, cut to 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = repr(text) if isinstance(value, str) else text
    return shown if len(shown) <= 60 else f"{shown[:57]}..."

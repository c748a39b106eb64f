"""Bodies of the Open Inference Protocol: every datatype both ways, and every wrong field named."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from unetc.server.open_inference import NUMBERS, BodyError, InferRequest, read_infer, write_infer

DATATYPES = st.sampled_from(sorted(NUMBERS))


def body_of(inputs: list[dict[str, Any]], tail: bytes = b"", **more: Any) -> tuple[bytes, str | None]:
    """Build a body, and the value of the header with the length of its JSON."""
    text = json.dumps({"inputs": inputs, **more}).encode()
    return text + tail, str(len(text)) if tail else None


def problems_of(body: bytes, header: str | None = None) -> dict[str, str]:
    """Return the problems of a body, which must have some."""
    with pytest.raises(BodyError) as caught:
        read_infer(body, header)
    return caught.value.problems


@given(data=st.data(), datatype=DATATYPES, binary=st.booleans())
def test_an_answer_can_be_read_as_a_request(data: st.DataObject, datatype: str, binary: bool) -> None:
    """Every datatype keeps its bits both ways, as JSON and as bytes."""
    finite = {"allow_nan": False, "allow_infinity": False} if "FP" in datatype else {}
    kind = np.dtype(NUMBERS[datatype])
    array = data.draw(arrays(kind, array_shapes(max_dims=3, min_side=0, max_side=4), elements=finite))
    request = InferRequest(id="7", binary=binary)
    body, length = write_infer(request, "model", {"x": array, "y": array[..., :1]}, {"seed": 3})
    assert (length is not None) == binary
    answer = json.loads(body[:length])
    assert (answer["id"], answer["parameters"]) == ("7", {"seed": 3})
    again = json.dumps({"inputs": answer["outputs"]}).encode()
    read = read_infer(again + body[length:] if binary else again, str(len(again)) if binary else None)
    for name, expected in (("x", array), ("y", array[..., :1])):
        assert read.inputs[name].datatype == datatype
        np.testing.assert_array_equal(read.inputs[name].array, expected)
        assert read.inputs[name].array.dtype == kind


def test_strings_arrive_as_json_and_as_bytes() -> None:
    """Strings keep every character; those sent as bytes may contain anything."""
    words = ["a lake", "Zürich", ""]
    text = read_infer(*body_of([{"name": "p", "shape": [3], "datatype": "BYTES", "data": words}])).inputs["p"]
    assert [one.decode() for one in text.array] == words
    tail = b"".join(struct.pack("<I", len(one.encode())) + one.encode() for one in words)
    item = {"name": "p", "shape": [3, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(tail)}}
    read = read_infer(*body_of([item], tail)).inputs["p"].array
    assert [one.decode() for one in read[:, 0]] == words


def test_bf16_becomes_float32() -> None:
    """A bfloat16 number is the upper half of a float32."""
    tail = (np.array([1.5, -2.0], np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    item = {"name": "x", "shape": [2], "datatype": "BF16", "parameters": {"binary_data_size": 4}}
    assert read_infer(*body_of([item], tail)).inputs["x"].array.tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"datatype": "FLOAT"}, "expected a datatype, one of BOOL"),
        ({"datatype": None}, "expected a datatype"),
        ({"shape": [2, -1]}, "expected a shape"),
        ({"shape": [True]}, "expected a shape"),
        ({"shape": [1] * 9}, "expected a shape"),
        ({"shape": [3]}, "has 2 elements; expected 3"),
        ({"data": [1, 2, 3]}, "has 3 elements; expected 2"),
        ({"data": [1, "2"]}, "expected whole numbers, got '2'"),
        ({"data": [1, 2.5]}, "expected whole numbers, got 2.5"),
        ({"data": [1, True]}, "expected whole numbers, got true"),
        ({"data": [1, 2**40]}, "that INT32 cannot hold"),
        ({"data": None}, "expected a list as data"),
        ({"datatype": "FP16", "data": [1, 1e9]}, "that FP16 cannot hold"),
        ({"datatype": "BYTES"}, "expected strings, got 1"),
        ({"datatype": "BF16"}, "send it as bytes"),
        ({"parameters": {"shared_memory_region": "r"}}, "shared memory is not supported"),
        ({"parameters": {"binary_data_size": 8}}, "expected a binary_data_size from 0 to the 0 bytes"),
        ({"parameters": {"binary_data_size": 0}}, "has data and a binary_data_size"),
    ],
)
def test_a_wrong_tensor_is_named(change: dict[str, Any], words: str) -> None:
    """A message names the input, the value and the expected value."""
    item = {"name": "steps", "shape": [2], "datatype": "INT32", "data": [1, 2]} | change
    assert words in problems_of(*body_of([item]))["steps"]


@pytest.mark.parametrize(
    ("tail", "size", "words"),
    [
        (b"\0" * 4, 4, "has 4 bytes; expected 8"),
        (b"\0" * 9, 8, "1 bytes after the JSON belong to no tensor"),
        (b"\0" * 8, -1, "expected a binary_data_size"),
        (b"\0" * 8, 9, "expected a binary_data_size"),
        (b"\0" * 8, True, "expected a binary_data_size"),
    ],
)
def test_bytes_must_fit_the_shape(tail: bytes, size: Any, words: str) -> None:
    """No byte may be missing or left."""
    item = {"name": "x", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    assert words in " ".join(problems_of(*body_of([item], tail)).values())


@pytest.mark.parametrize("tail", [b"\1\0", b"\5\0\0\0ab", b"\1\0\0\0abc", b"\xff\xff\xff\xffab"])
def test_lengths_of_strings_must_fit(tail: bytes) -> None:
    """A string cannot reach beyond its tensor, and its tensor has nothing after it."""
    item = {"name": "p", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(tail)}}
    assert "p" in problems_of(*body_of([item], tail))


def test_all_wrong_fields_are_named_at_once() -> None:
    """A client sees everything that it has to change."""
    body, _ = body_of(
        [{"name": "a", "shape": [1], "datatype": "FP32", "data": ["x"]}, {"name": "b", "shape": "?"}],
        id=4,
        outputs=[{"name": "o", "parameters": {"binary_data": 1}}],
        parameters={"binary_data_output": "yes"},
    )
    assert set(problems_of(body)) == {
        "a",
        "b",
        "id",
        "outputs[0].parameters.binary_data",
        "parameters.binary_data_output",
    }


@pytest.mark.parametrize(
    ("body", "header", "named"),
    [
        (b"", None, "body"),
        (b"{", None, "body"),
        (b"[]", None, "body"),
        (b'{"inputs": [], "x": NaN}', None, "body"),
        (b"[" * 100_000, None, "body"),
        (b"\xff\xfe{", None, "body"),
        (b'{"inputs": [{"name": "\\ud800"}]}', None, "body"),
        (b"{}", "3", "Inference-Header-Content-Length"),
        (b"{}", "9" * 5000, "Inference-Header-Content-Length"),
        (b"{}", "-1", "Inference-Header-Content-Length"),
        (b"{}", "٢", "Inference-Header-Content-Length"),
        (b'{"inputs": 3}', None, "inputs"),
        (b'{"inputs": [{}]}', None, "inputs[0].name"),
    ],
)
def test_a_body_that_is_no_request_is_refused(body: bytes, header: str | None, named: str) -> None:
    """Whatever arrives, the answer is about the body."""
    assert named in problems_of(body, header)


@given(body=st.binary(max_size=200), header=st.none() | st.integers(-1, 300).map(str))
def test_random_bodies_are_refused_without_a_crash(body: bytes, header: str | None) -> None:
    """Random bytes raise nothing but a `BodyError`."""
    with suppress(BodyError):
        read_infer(b'{"inputs": [{"name": "a", "shape": [1]}]}'[: len(body)] + body, header)

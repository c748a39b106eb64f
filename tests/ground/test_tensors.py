"""Arrays of every layout in memory are written under their own values, and read as views of the content."""

from __future__ import annotations

import ast
import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray
from safetensors.numpy import load, save

from tests.house.test_layout import modules, scripts
from tests.promises.mutation import documents
from unetc.conditions import Conditions
from unetc.tensors import load_tensors, save_tensors, tensor_ranges

TYPES = ("<f4", "<f8", "<f2", "<i4", "<i8", "|u1", "|b1", ">f4", ">i8")


@st.composite
def laid_out(draw: st.DrawFn) -> NDArray[Any]:
    """Draw an array that is transposed, sliced, reversed or repeated in memory."""
    shape = draw(arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    dtype = np.dtype(draw(st.sampled_from(TYPES)))
    array: NDArray[Any] = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    array = array[tuple(draw(st.sampled_from([slice(None), slice(None, None, -1), slice(1, None, 2)])) for _ in shape)]
    if draw(st.booleans()):
        array = np.broadcast_to(array, (3, *array.shape))
    return np.asfortranarray(array) if draw(st.booleans()) else array


@given(laid_out())
def test_an_array_of_any_layout_is_read_as_it_was(array: NDArray[Any]) -> None:
    content = save_tensors({"array": array, "other": np.zeros(3)})
    for read in (load(content)["array"], load_tensors(content)["array"]):
        assert read.shape == array.shape
        assert read.dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(read, array)


def test_an_array_is_a_view_of_the_content() -> None:
    content = save_tensors({"array": np.arange(6.0)})
    array = load_tensors(content)["array"]
    assert np.shares_memory(array, np.frombuffer(content, np.uint8))
    assert not array.flags.writeable


def encoded(header: object, values: bytes = bytes(8), length: int | None = None) -> bytes:
    """Encode a header of any form."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + values


def entry(**fields: object) -> dict[str, object]:
    """Describe an array of two numbers, with some fields changed."""
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}


MALFORMED = {
    "nothing": b"",
    "a header without its end": encoded(entry(), length=2**40),
    "a header that is no JSON": encoded(b"{"),
    "a header that is not UTF-8": encoded(b'{"\xff": 1}'),
    "a header that is a list": encoded([]),
    "an array that is a number": encoded({"a": 1}),
    "a deep header": encoded(b"[" * 10_000),
    "an unknown type": encoded(entry(dtype="F8_E5M2")),
    "bfloat16, which numpy lacks": encoded(entry(dtype="BF16", shape=[4])),
    "a size below zero": encoded(entry(shape=[-2])),
    "two sizes below zero": encoded(entry(shape=[-1, -2])),
    "values that no array has": encoded({}),
    "values after the last array": encoded(entry(), bytes(9)),
    "values between two arrays": encoded(entry() | {"b": entry(data_offsets=[9, 17])["a"]}, bytes(17)),
    "an array that ends before it begins": encoded(
        entry(data_offsets=[0, 5]) | {"b": entry(data_offsets=[5, 3])["a"]}, bytes(3)
    ),
    "arrays that overlap": encoded(entry() | {"b": entry(data_offsets=[4, 12])["a"]}, bytes(12)),
    "too few values": encoded(entry(), bytes(7)),
    "fewer bytes than values": encoded(entry(data_offsets=[0, 4])),
    "more bytes than values": encoded(entry(shape=[1])),
    "bytes before the first one": encoded(entry(data_offsets=[-8, 0])),
    "an end before its beginning": encoded(entry(data_offsets=[8, 0])),
    "a huge shape": encoded(entry(shape=[2**62, 2**62])),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_content_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"safetensors|array 'a'"):
        load_tensors(content)


HEADERS = (
    "nothing",
    "a header without its end",
    "a header that is no JSON",
    "a header that is a list",
    "an array that is a number",
    "a deep header",
    "values after the last array",
    "an array that ends before it begins",
    "arrays that overlap",
    "too few values",
    "bytes before the first one",
)


@pytest.mark.parametrize("name", HEADERS)
def test_ranges_in_a_malformed_file_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "weights").write_bytes(MALFORMED[name])
    with pytest.raises(ValueError, match="safetensors"):
        tensor_ranges(tmp_path / "weights")


def test_ranges_hold_the_values_of_a_file(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0), "b": np.zeros((0, 3)), "c": np.arange(3, dtype=np.int8)}
    content = save(arrays, metadata={"format": "np"})
    (tmp_path / "weights").write_bytes(content)
    ranges = tensor_ranges(tmp_path / "weights")
    assert {name: content[slice(*own)] for name, own in ranges.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }


@given(documents(json.dumps(entry())), st.binary(max_size=9))
def test_whatever_the_header_is_content_is_read_or_refused(header: bytes, values: bytes) -> None:
    with contextlib.suppress(ValueError):
        load_tensors(encoded(header, values))


def test_transposed_conditions_are_stored_as_they_are() -> None:
    states = np.arange(24, dtype=np.float32).reshape(2, 4, 3).transpose(0, 2, 1)
    read = load(save_tensors(Conditions(own={"states": states}).to_arrays()))["states"]
    assert np.array_equal(read, states)


def test_nothing_else_writes_arrays_as_safetensors() -> None:
    files = {name: path for name, path in modules().items() if name != "unetc.tensors"}
    files |= {name: path for name, path in scripts().items() if name.startswith("benchmarks")}
    offences = [
        f"{path}:{node.lineno}"
        for path in files.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.ImportFrom) and node.module == "safetensors.numpy" and "save" in ast.unparse(node))
        or (isinstance(node, ast.Attribute) and ast.unparse(node).startswith("safetensors.numpy.save"))
    ]
    assert offences == []


def test_the_runtime_reads_arrays_without_a_copy() -> None:
    offences = [
        name
        for name, path in modules().items()
        if name.startswith("unetc.runtime")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and "safetensors" in ast.unparse(node)
    ]
    assert offences == []

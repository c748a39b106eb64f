"""Arrays of every layout in memory are written under their own values."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray
from safetensors.numpy import load

from tests.house.test_layout import modules, scripts
from unetc.conditions import Conditions
from unetc.tensors import save_tensors

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
    read = load(save_tensors({"array": array, "other": np.zeros(3)}))["array"]
    assert read.shape == array.shape
    assert read.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(read, array)


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

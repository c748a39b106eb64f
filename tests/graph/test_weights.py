"""The safetensors library reads weights files, which are written without copying every tensor at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from unetc.compiler.graph.weights import write_tensors
from unetc.errors import CompileError
from unetc.tensors import tensor_ranges


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        "transposed": rng.standard_normal((3, 5)).astype(np.float32).T,
        "half": rng.standard_normal(7).astype(np.float16),  # 14 bytes, which would misalign a longer element after it
        "double": rng.standard_normal((2, 1, 3)),
        "naïve.0": rng.standard_normal((4, 4)).astype(np.float32),
    }
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {name: ir.Tensor(array) for name, array in arrays.items()})
    read = load_file(path)
    assert read.keys() == arrays.keys()
    content = path.read_bytes()
    for name, (begin, end) in tensor_ranges(path).items():
        np.testing.assert_array_equal(read[name], arrays[name])
        assert read[name].dtype == arrays[name].dtype
        assert content[begin:end] == arrays[name].tobytes()
        assert begin % arrays[name].itemsize == 0
    assert max(end for _, end in tensor_ranges(path).values()) == len(content)


def test_only_one_tensor_is_made_at_a_time(tmp_path: Path) -> None:
    alive: list[str] = []

    def lazy(name: str) -> ir.LazyTensor:
        def make() -> ir.TensorProtocol:
            alive.append(name)
            return ir.Tensor(np.full((2, 2), len(alive), np.float32))

        return ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape((2, 2)), name=name)

    write_tensors(tmp_path / "w.safetensors", {name: lazy(name) for name in "ba"})
    assert alive == ["a", "b"]  # in the order of the file, each made once
    assert {name: array[0, 0] for name, array in load_file(tmp_path / "w.safetensors").items()} == {"a": 1, "b": 2}


def test_a_type_that_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="cannot store 'scale' of type FLOAT8E5M2"):
        write_tensors(tmp_path / "w", {"scale": ir.Tensor(np.ones(2, ml_dtypes.float8_e5m2))})
    assert not (tmp_path / "w").exists()

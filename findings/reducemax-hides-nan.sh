#!/usr/bin/env bash
# ReduceMax of onnxruntime ignores a NaN unless it comes first.
#
# Guess: the maximum of numbers with a NaN among them is NaN, as in numpy and torch. One ReduceMax(Abs(x)) per value
# then shows whether any element overflowed.
#
# Fact: a NaN counts only in the first place; in every other place it is skipped. ReduceMin and MaxPool behave the same
# way, in float16 and in float32. Infinity is seen, so x / 0 is found, but 0 / 0 is not.
#
# Why it matters: such nodes are added to find the layer that ruins an image, or the values that float16 cannot hold,
# because copying every activation out would be too much. The layer that makes NaN then looks like the healthiest one.
# ReduceMean and ReduceSum keep a NaN in any place.
#
# Seen with onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6:
#   64 numbers, one NaN, place by place: ReduceMax NaN at [0], ReduceMin NaN at [0], ReduceMean NaN at all 64
#   numpy of the same: NaN at all 64
#   float16: ReduceMax NaN at [0]
#   MaxPool over 8 x 8 with a NaN in the middle: 1.0
#   ReduceMax(Abs(Sqrt(x))) of [4, -1, 9]: 3.0, of [4, inf, 9]: inf
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python - <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx.parser import parse_model

print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, numpy {np.__version__}")
HEAD = '<ir_version: 10, opset_import: ["": 21]> g '
SIZE = 64


def session(text):
    model = parse_model(HEAD + text)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def rows(dtype):
    """64 arrays of ones, the n-th with a NaN at place n."""
    everywhere = np.ones((SIZE, SIZE), dtype)
    np.fill_diagonal(everywhere, np.nan)
    return everywhere


def places(operator, dtype=np.float32, name="float"):
    reduce = session(f"({name}[{SIZE}] x) => ({name} y) {{ y = {operator} <keepdims = 0> (x) }}")
    return [place for place, row in enumerate(rows(dtype)) if np.isnan(reduce.run(None, {"x": row})[0])]


def brief(found):
    return f"all {SIZE}" if len(found) == SIZE else str(found)


found = {operator: places(operator) for operator in ("ReduceMax", "ReduceMin", "ReduceMean")}
print(f"{SIZE} numbers, one NaN, place by place: "
      + ", ".join(f"{operator} NaN at {brief(at)}" for operator, at in found.items()))
of_numpy = np.flatnonzero(np.isnan(rows(np.float32).max(axis=1))).tolist()
print(f"numpy of the same: NaN at {brief(of_numpy)}")
half = places("ReduceMax", np.float16, "float16")
print(f"float16: ReduceMax NaN at {brief(half)}")

image = np.ones((1, 1, 8, 8), np.float32)
image[0, 0, 4, 4] = np.nan
pool = session("(float[1, 1, 8, 8] x) => (float[1, 1, 1, 1] y) { y = MaxPool <kernel_shape = [8, 8]> (x) }")
pooled = pool.run(None, {"x": image})[0].item()
print(f"MaxPool over 8 x 8 with a NaN in the middle: {pooled}")

probe = session("(float[3] x) => (float y) { r = Sqrt(x) a = Abs(r) y = ReduceMax <keepdims = 0> (a) }")
largest, infinite = (probe.run(None, {"x": np.array([4, middle, 9], np.float32)})[0].item() for middle in (-1, np.inf))
print(f"ReduceMax(Abs(Sqrt(x))) of [4, -1, 9]: {largest}, of [4, inf, 9]: {infinite}")

as_stated = [
    found["ReduceMax"] == found["ReduceMin"] == half == [0],
    found["ReduceMean"] == of_numpy == list(range(SIZE)),
    pooled == 1.0,
    largest == 3.0 and np.isinf(infinite),
]
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY

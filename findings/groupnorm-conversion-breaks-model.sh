#!/usr/bin/env bash
# The version converter of onnx makes GroupNormalization of opset 18 into one of opset 21 that cannot be loaded.
#
# Guess: opset 18 takes one scale and bias per group, opset 21 one per channel. version_converter 18 -> 21 repeats the
# values, or refuses. And check_model(full_check=True) notices a scale of the wrong length.
#
# Fact: the converter only raises the number. Scale and bias keep one value per group, and the checker with full shape
# inference accepts the result. onnxruntime refuses to load it, with an error about a Mul that the graph does not have.
# The reference evaluator of onnx fails, too. With as many groups as channels the result is right, so a test with such
# a small model passes.
#
# Why it matters: a UNet has dozens of these norms, and opset 21 is what float8, int4 and newer runtimes ask for.
#
# Seen with onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6:
#   2 groups of 4 channels: opset 21, scale has 2 values, full_check passes, onnxruntime: Fail, reference: TypeError
#   4 groups of 4 channels: the same with 4 values; largest differences 1.4e-06 and 0
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
from onnx import version_converter
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator

print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, numpy {np.__version__}")
CHANNELS = 4
onnxruntime.set_default_logger_severity(4)


def model(groups):
    values = ", ".join(str(float(group + 1)) for group in range(groups))
    return parse_model(
        f'<ir_version: 9, opset_import: ["": 18]> g (float[1, {CHANNELS}, 2, 2] x) => (float[1, {CHANNELS}, 2, 2] y) '
        f"<float[{groups}] scale = {{{values}}}, float[{groups}] bias = {{{values}}}> "
        f"{{ y = GroupNormalization <num_groups = {groups}> (x, scale, bias) }}"
    )


def outcome(run):
    try:
        return run()
    except Exception as error:
        return type(error).__name__


def by_ort(converted, x):
    session = onnxruntime.InferenceSession(converted.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


x = np.random.default_rng(0).standard_normal((1, CHANNELS, 2, 2)).astype(np.float32)
found = {}
for groups in (2, CHANNELS):
    converted = version_converter.convert_version(model(groups), 21)
    onnx.checker.check_model(converted, full_check=True)
    length = converted.graph.initializer[0].dims[0]
    before = ReferenceEvaluator(model(groups)).run(None, {"x": x})[0]
    results = {"onnxruntime": outcome(lambda: by_ort(converted, x)),
               "reference": outcome(lambda: ReferenceEvaluator(converted).run(None, {"x": x})[0])}
    said = {name: value if isinstance(value, str) else f"largest difference {np.abs(value - before).max():.1e}"
            for name, value in results.items()}
    print(f"{groups} groups of {CHANNELS} channels: opset {converted.opset_import[0].version}, scale has {length} "
          f"values, full_check passes, " + ", ".join(f"{name}: {text}" for name, text in said.items()))
    found[groups] = length, said

as_stated = [
    found[2][0] == 2,
    all("difference" not in text for text in found[2][1].values()),
    found[CHANNELS][1]["onnxruntime"].startswith("largest"),
]
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY

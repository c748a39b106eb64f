#!/usr/bin/env bash
# onnx's shape inference ends at a GroupNormalization, and its strict mode refuses a valid graph that has one.
#
# Guess: the result of GroupNormalization has the type and shape of its input, as with all other norms. The operator has
# a function body besides, from which inference could learn it.
#
# Fact: nothing is inferred for the result, not even its type, nor for anything computed from it. Strict mode reports an
# error in the node after it, although the checker accepts the graph and onnxruntime runs it.
#
# Why it matters: converters to float16 and quantisers decide by inferred types. After the first norm of a UNet they
# know nothing, and what they do then depends on the tool.
#
# Seen with onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6 (what is known of the norm's result):
#   GroupNormalization: nothing; strict: error at Relu
#   InstanceNormalization, LayerNormalization, RMSNormalization: float, n x 4 x 8 x 8; strict: the same
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
ORT_DISABLE_TELEMETRY=1 venv/bin/python - <<'PY'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import shape_inference
from onnx.parser import parse_model

NORMS = {
    "GroupNormalization": "GroupNormalization <num_groups = 2> (x, each, each)",
    "InstanceNormalization": "InstanceNormalization (x, each, each)",
    "LayerNormalization": "LayerNormalization (x, last)",
    "RMSNormalization": "RMSNormalization (x, last)",
}


def graph(norm):
    return parse_model(f"""<ir_version: 10, opset_import: ["": 23]>
    g (float[n, 4, 8, 8] x, float[4] each, float[8] last) => (float[n, 4, 8, 8] z)
    {{ y = {norm}  z = Relu(y) }}""")


def known(model, strict):
    """Describe what is inferred for the result of the norm."""
    try:
        inferred = shape_inference.infer_shapes(model, strict_mode=strict)
    except shape_inference.InferenceError as error:
        return "error at Relu" if "Relu" in str(error) else str(error)
    for value in inferred.graph.value_info:
        if value.name == "y" and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            return "float, " + " x ".join(str(d.dim_param or d.dim_value) for d in value.type.tensor_type.shape.dim)
    return "nothing"


seen = {}
for name, norm in NORMS.items():
    model = graph(norm)
    onnx.checker.check_model(model)
    feeds = {"x": np.ones((1, 4, 8, 8), np.float32), "each": np.ones(4, np.float32), "last": np.ones(8, np.float32)}
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    shape = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0].shape
    assert shape == (1, 4, 8, 8)
    seen[name] = known(model, strict=False), known(model, strict=True)
    print(f"{name}: {seen[name][0]}; strict: {seen[name][1]}")
expected = {name: ("float, n x 4 x 8 x 8",) * 2 for name in NORMS} | {"GroupNormalization": ("nothing", "error at Relu")}
print("as stated" if seen == expected else "NOT as stated")
sys.exit(seen != expected)
PY

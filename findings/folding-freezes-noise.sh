#!/usr/bin/env bash
# Constant folding in onnx-graphsurgeon and onnxslim turns the noise inside a graph into one fixed array.
#
# Guess: folding computes nodes whose result is the same in every run. RandomNormal has no inputs but a new result in
# every run, so it stays, as it does in onnxruntime's optimiser.
#
# Fact: both tools only check whether the inputs of a node are constant. A node without inputs passes the check, is run
# once, and its result is stored as a weight. The graph still loads, and every run adds the same noise. The same happens
# to RandomNormalLike behind Shape and ConstantOfShape once the shape is known. RandomNormalLike of a graph input stays.
#
# Why it matters: a VAE encoder that draws its latents, or a sampler that adds noise at every step, is exported with
# such nodes. Both tools are usual steps before TensorRT. Afterwards all images share one noise, without any warning.
#
# Seen with onnx 1.23.2, onnx-graphsurgeon 0.6.1, onnxslim 0.1.98, onnxruntime 1.32.0, numpy 2.4.6:
#   as written:         nodes RandomNormal, Add; two runs are the same: False
#   onnxruntime:        nodes RandomNormal, Add; two runs are the same: False
#   onnx-graphsurgeon:  nodes Add; two runs are the same: True
#   onnxslim:           nodes Add; two runs are the same: True
#   with a known shape: onnx-graphsurgeon leaves Add, onnxslim leaves Add
#   of a graph input:   onnx-graphsurgeon leaves RandomNormalLike, Add, onnxslim leaves RandomNormalLike, Add
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q \
  onnx==1.23.2 onnx-graphsurgeon==0.6.1 onnxslim==0.1.98 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
OMP_NUM_THREADS=1 venv/bin/python - <<'PY'
import sys
from importlib.metadata import version

import numpy as np
import onnx
import onnx_graphsurgeon
import onnxruntime
import onnxslim
from onnx.parser import parse_model

PACKAGES = ("onnx", "onnx-graphsurgeon", "onnxslim", "onnxruntime", "numpy")
print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
HEAD = '<ir_version: 10, opset_import: ["": 21]> g (float[4] x) => (float[4] y) '
NOISE = "{ n = RandomNormal <shape = [4]> () y = Add(x, n) }"
SHAPED = "{ s = Shape(x) z = ConstantOfShape(s) n = RandomNormalLike(z) y = Add(x, n) }"
LIKE = "{ n = RandomNormalLike(x) y = Add(x, n) }"


def graphsurgeon(text):
    graph = onnx_graphsurgeon.import_onnx(parse_model(HEAD + text))
    return onnx_graphsurgeon.export_onnx(graph.fold_constants().cleanup())


def slim(text):
    return onnxslim.slim(parse_model(HEAD + text))


def of_onnxruntime(text):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "optimised.onnx"
    options.log_severity_level = 3  # it warns that what it saves may suit this processor only
    onnxruntime.InferenceSession(parse_model(HEAD + text).SerializeToString(), options)
    return onnx.load("optimised.onnx")


def nodes(model):
    return ", ".join(node.op_type for node in model.graph.node)


def is_fixed(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    one, other = (session.run(None, {"x": np.zeros(4, np.float32)})[0] for _ in range(2))
    return np.array_equal(one, other)


models = {
    "as written": parse_model(HEAD + NOISE),
    "onnxruntime": of_onnxruntime(NOISE),
    "onnx-graphsurgeon": graphsurgeon(NOISE),
    "onnxslim": slim(NOISE),
}
fixed = {}
for name, model in models.items():
    fixed[name] = is_fixed(model)
    print(f"{name + ':':19} nodes {nodes(model)}; two runs are the same: {fixed[name]}")
shaped, like = [[nodes(fold(text)) for fold in (graphsurgeon, slim)] for text in (SHAPED, LIKE)]
print(f"with a known shape: onnx-graphsurgeon leaves {shaped[0]}, onnxslim leaves {shaped[1]}")
print(f"of a graph input:   onnx-graphsurgeon leaves {like[0]}, onnxslim leaves {like[1]}")

as_stated = [
    fixed == {"as written": False, "onnxruntime": False, "onnx-graphsurgeon": True, "onnxslim": True},
    "RandomNormal" in nodes(models["onnxruntime"]),
    shaped == ["Add", "Add"],
    like == ["RandomNormalLike, Add"] * 2,
]
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY

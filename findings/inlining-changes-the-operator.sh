#!/usr/bin/env bash
# Inlining the functions of an ONNX model can change what it computes: runtimes and the inliner disagree on a name.
#
# Guess: inlining replaces calls by bodies, so a model computes the same before and after.
#
# Fact: a model may define a function under the name of an operator of ONNX, in its domain. onnx's checker accepts it.
# onnxruntime and onnx's reference evaluator ignore the definition and run their own operator. onnx.inliner puts the
# definition in place of the call. ONNX leaves the choice to each runtime (FunctionProto in onnx.proto). In a domain of
# its own, the same function runs everywhere.
#
# Why it matters: a team that gives a norm or an attention a better definition under its usual name sees no effect in
# onnxruntime, and another result from each tool that inlines first, such as importers without functions.
#
# Seen with onnx 1.23.2, onnxruntime 1.32.0, numpy 2.4.6, for Relu defined as Neg, at -1 and 2:
#   onnxruntime and the reference evaluator: 0, 2; after the inliner: 1, -2
#   the same function in a domain of its own: 1, -2 everywhere
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
from onnx import inliner
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator

x = np.array([-1, 2], np.float32)


def model_of(domain):
    """Define Relu as Neg in a domain, and call it there."""
    model = parse_model("""<ir_version: 10, opset_import: ["": 23, "own": 1]> g (float[2] x) => (float[2] y)
    { y = own.Relu(x) }
    <opset_import: ["": 23], domain: "own"> Relu (a) => (b) { b = Neg(a) }""")
    model.graph.node[0].domain = model.functions[0].domain = domain
    onnx.checker.check_model(model, full_check=True)
    return model


def results(model):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inlined = inliner.inline_local_functions(model)
    return [
        session.run(None, {"x": x})[0].tolist(),
        ReferenceEvaluator(model).run(None, {"x": x})[0].tolist(),
        ReferenceEvaluator(inlined).run(None, {"x": x})[0].tolist(),
    ]


usual, own = results(model_of("")), results(model_of("own"))
print("under the usual name: onnxruntime {}, evaluator {}, inlined {}".format(*usual))
print("in its own domain: onnxruntime {}, evaluator {}, inlined {}".format(*own))
as_stated = usual == [[0, 2], [0, 2], [1, -2]] and own == [[1, -2]] * 3
print("as stated" if as_stated else "NOT as stated")
sys.exit(not as_stated)
PY

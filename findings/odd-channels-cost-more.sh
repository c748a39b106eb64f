#!/usr/bin/env bash
# A convolution over fewer channels can take longer in onnxruntime, so pruned channels may save nothing, or cost time.
#
# Guess: the time of a convolution grows with its input channels. Removing a few of them saves a little, and never costs.
#
# Fact: on the CPU, onnxruntime stores images in blocks of channels. A convolution whose number of input channels is not
# a multiple of 4 cannot do so and takes a slower path. With 66 channels it takes longer than with 68, and about as long
# as with 96.
#
# Why it matters: pruners count channels or multiplications. A pruned width should be rounded up to a multiple of 4, or
# zero channels be appended, before time is measured.
#
# Seen with onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6 (3x3 to 64 channels, 8 images of 16x16, one thread, AVX-512):
#   64: 0.63 ms, 65: 0.93, 66: 0.95, 68: 0.79, 96: 0.94
#   The script checks that 65, 66 and 67 channels take at least 5 % longer than 68.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$folder"
ORT_DISABLE_TELEMETRY=1 venv/bin/python - <<'PY'
import sys
import time

import numpy as np
import onnx
import onnxruntime
from onnx.parser import parse_model

CHANNELS, ROUNDS = (64, 65, 66, 67, 68, 96), 60
rng = np.random.default_rng(0)


def session(channels):
    model = parse_model(f"""<ir_version: 10, opset_import: ["": 21]> g (float[n, {channels}, h, w] x)
    => (float[n, 64, h, w] y) {{ y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, weight) }}""")
    weight = rng.standard_normal((64, channels, 3, 3), dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


sessions = {channels: session(channels) for channels in CHANNELS}
images = {channels: rng.standard_normal((8, channels, 16, 16), dtype=np.float32) for channels in CHANNELS}
least = dict.fromkeys(CHANNELS, float("inf"))
for _ in range(ROUNDS):
    for channels in CHANNELS:
        start = time.perf_counter()
        sessions[channels].run(None, {"x": images[channels]})
        least[channels] = min(least[channels], time.perf_counter() - start)
print(", ".join(f"{channels}: {1e3 * seconds:.2f} ms" for channels, seconds in least.items()))
as_stated = all(least[channels] > 1.05 * least[68] for channels in (65, 66, 67)) and least[64] < least[68]
print("as stated" if as_stated else "NOT as stated")
sys.exit(not as_stated)
PY

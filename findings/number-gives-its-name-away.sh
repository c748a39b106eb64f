#!/usr/bin/env bash
# torch.onnx.export of a UNet called with the timestep as a number gives the name "timestep" to the next input.
#
# Guess: input_names goes along with args. A UNet of diffusers takes its timestep as a tensor or a number, so both give
# an input of that name. A number may be frozen into the file, or an argument may be None, but then its name falls away.
# A wrong number of names is an error.
#
# Fact: numbers are frozen, and None is left out. Only then are the names given out, in order. So every later input has
# the name of one before it, without a warning, though there are more names than inputs. In a UNet with classes the
# class labels are called "timestep", with the same type and shape as a timestep. In dynamic_shapes None does have a
# place, and leaving it out is an error. The older exporter (dynamo=False) keeps the number as an input, but shifts
# after None too.
#
# Why it matters: the file is valid. A program that feeds the inputs it finds, by name, draws the class whose number is
# the timestep, always with the noise level of the example. Elsewhere it fails far away: onnxruntime asks for class
# labels in a model without classes.
#
# Seen with torch 2.13.0, onnxscript 0.7.2, onnx 1.23.2, onnxruntime 1.32.0, diffusers 0.42.1:
#   UNet with classes, timestep 5 as a number: inputs sample and timestep [1]; fed with timestep 700 and class 3, it
#     returns what torch returns for timestep 5 and class 700
#   UNet with prompts, timestep 5 as a number: timestep [1, 3, 8] is the prompt; dynamo=False: right
#   UNet with timestep_cond [1, 16] and class_labels None: an input class_labels [1, 16], also with dynamo=False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
PIP_NO_COMPILE=1 "$folder/venv/bin/pip" install -q \
  torch==2.13.0 numpy==2.4.6 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0 diffusers==0.42.1 transformers==5.23.0
cd "$folder"
ORT_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import logging
import sys
import warnings

import diffusers
import numpy as np
import onnx
import onnxruntime
import onnxscript
import torch

logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells that torchvision is missing
print(f"torch {torch.__version__}, onnxscript {onnxscript.__version__}, onnx {onnx.__version__}")
print(f"onnxruntime {onnxruntime.__version__}, diffusers {diffusers.__version__}")
FILE = "model.onnx"
SMALL = {"sample_size": 8, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4}
BLOCKS = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
torch.manual_seed(0)
SAMPLE, PROMPT, GUIDANCE = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8), torch.randn(1, 16)


def with_prompts(**settings):
    heads = {"cross_attention_dim": 8, "attention_head_dim": 2}
    return diffusers.UNet2DConditionModel(**SMALL, **BLOCKS, **heads, **settings).eval()


def inputs_of(unet, example, names, **options):
    """Export a UNet, and return the shape of each input of the file, by name. A warning about names is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*input.names")
        torch.onnx.export(unet, example, FILE, input_names=names, verbose=False, **options)
    inputs = onnx.load(FILE).graph.input
    return {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in inputs}


def run(values):
    """Run the file on those of the values that it has inputs for."""
    session = onnxruntime.InferenceSession(FILE, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: values[value.name] for value in session.get_inputs()})[0]


as_stated = []
classes = diffusers.UNet2DModel(
    **SMALL, **BLOCKS, in_channels=4, out_channels=4, num_class_embeds=1000, add_attention=False
).eval()
names = ["sample", "timestep", "class_labels"]
inputs = inputs_of(classes, (SAMPLE, 5, torch.tensor([3])), names, dynamo=True)
found = run({"sample": SAMPLE.numpy(), "timestep": np.array([700]), "class_labels": np.array([3])})
print(f"UNet with classes, timestep 5 as a number: {inputs}")
as_stated.append(inputs == {"sample": [1, 4, 8, 8], "timestep": [1]})
for timestep, label in ((700, 3), (5, 700)):
    with torch.no_grad():
        expected = classes(SAMPLE, timestep, torch.tensor([label])).sample.numpy()
    same = bool(np.allclose(found, expected, atol=1e-5))
    print(f"  fed with timestep 700 and class 3, it is torch's result for timestep {timestep}, class {label}: {same}")
    as_stated.append(same == (timestep == 5))

names = ["sample", "timestep", "encoder_hidden_states"]
for dynamo in (True, False):
    inputs = inputs_of(with_prompts(), (SAMPLE, 5, PROMPT), names, dynamo=dynamo)
    print(f"UNet with prompts, timestep 5 as a number, dynamo={dynamo}: {inputs}")
    as_stated.append((inputs["timestep"] == [1, 3, 8]) == dynamo and ("encoder_hidden_states" in inputs) != dynamo)

names = ["sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond"]
guided = with_prompts(time_cond_proj_dim=16)
example = (SAMPLE, torch.tensor([5]), PROMPT, None, GUIDANCE)
for dynamo in (True, False):
    inputs = inputs_of(guided, example, names, dynamo=dynamo)
    print(f"UNet with timestep_cond, class_labels None, dynamo={dynamo}: {inputs}")
    as_stated.append(inputs["class_labels"] == [1, 16] and "timestep_cond" not in inputs)
given = {name: value.numpy() for name, value in zip(names, example, strict=True) if value is not None}
try:
    onnxruntime.InferenceSession(FILE, providers=["CPUExecutionProvider"]).run(None, given)
    refused = ""
except ValueError as error:
    refused = str(error)
print(f"  onnxruntime: {refused}")
as_stated.append("class_labels" in refused)
accepted = {}
for shapes in (({}, {}, {}, None, {0: 1}), ({}, {}, {}, {0: 1})):
    try:
        inputs_of(guided, example, names, dynamo=True, dynamic_shapes=shapes)
        accepted[len(shapes)] = True
    except torch.onnx.errors.OnnxExporterError:
        accepted[len(shapes)] = False
print(f"  dynamic_shapes is accepted, by its length: {accepted}")
as_stated.append(accepted == {5: True, 4: False})
print("as stated" if all(as_stated) else f"NOT as stated: {as_stated}")
sys.exit(not all(as_stated))
PY

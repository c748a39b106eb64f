"""Makes a diffusers pipeline from the terrain model inside a package on PyPI.

    python benchmarks/terrain.py terrain/        # downloads the package
    unetc analyze terrain/

Nothing of the package is in this repository. Its network is a UNet of guided-diffusion, distilled to a consistency
model of heights, [1, 128, 128]. It lies in an ONNX file, whose initializers kept OpenAI's names. It becomes a
`UNet2DModel` that predicts v in a process that preserves the variance:

- Samples are divided by the deviation of the data, 0.5. Scaled by alpha, they are the network's input in both
  processes. Its output is then minus v.
- The network embeds 250 ln(sigma), which is a timestep plus a constant if sigma is 0.01 exp(t / 250). The constant
  rotates the sines and cosines, so it goes into the first layer behind them.
- The difficulty is fixed. Its embedding goes into the bias of the second layer.

Source:
    Song et al. 2023, arXiv:2303.01469, section 3 (preconditioning); Salimans and Ho 2022, arXiv:2202.00512 (v).
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - makes unetc importable
import diffusers as untyped_diffusers
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from unetc.models.adm_checkpoint import Heads, convert, fit, read_network
from unetc.models.openai_unet import load_unet

diffusers: Any = untyped_diffusers

PACKAGE = "adaptive-terrain-diffusion==0.4.1"
SIDE = 128
HEADS = Heads(channels=32, by_part=True)
DEVIATION = 0.5
"""Deviation of the data for which the network was preconditioned."""
LEAST_SIGMA, PER_E = 0.01, 250
"""Noise level of timestep 0, and timesteps from a noise level to e times it."""
TIMESTEPS = 2247
"""So many timesteps reach the largest noise level of the training, 80."""
DIFFICULTY = 0.5

_MEMBER = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
_WHEEL_SHA256 = "ae45819f1be906e67839"
_FILE_SHA256 = "230f0ec1fae9"
"""Beginnings of the hashes of the wheel of version 0.4.1 and of its file."""


def download(folder: Path) -> Path:
    """Download the wheel of the package.

    Raises:
        SystemExit: If it cannot be downloaded.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"{PACKAGE} cannot be downloaded.")
    (wheel,) = folder.glob("*.whl")
    return wheel


def read_file(wheel: Path) -> bytes:
    """Read the ONNX file in the wheel.

    Raises:
        SystemExit: If it is another wheel.
    """
    data = wheel.read_bytes()
    if not hashlib.sha256(data).hexdigest().startswith(_WHEEL_SHA256):
        raise SystemExit(f"{wheel} is not the wheel of adaptive-terrain-diffusion 0.4.1. Download that version.")
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(_MEMBER)
    assert hashlib.sha256(content).hexdigest().startswith(_FILE_SHA256)
    return content


def weights_of(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """Read the weights under OpenAI's names; the norms' stand in the nodes behind InstanceNormalization."""
    arrays = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    weights = {name.removeprefix("model."): value for name, value in arrays.items() if name.startswith("model.")}
    readers = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type == "InstanceNormalization":
            shaped = readers[node.output[0]]
            scaled = readers[shaped.output[0]]
            shifted = readers[scaled.output[0]]
            layer = _layer(node.name)
            weights[f"{layer}.weight"] = arrays[scaled.input[1]].flatten()
            weights[f"{layer}.bias"] = arrays[shifted.input[1]].flatten()
    return weights


def _layer(path: str) -> str:
    """Name a layer by its path, such as /model/input_blocks.1/input_blocks.1.0/in_layers/in_layers.0/Reshape."""
    *parts, layer, _ = path.strip("/").split("/")
    blocks = [part for part in parts if re.fullmatch(r"(input_blocks|middle_block|output_blocks)(\.\d+)+", part)]
    return f"{blocks[-1]}.{layer}" if blocks else layer


def preserve_variance(weights: dict[str, Tensor]) -> None:
    """Change a network of noise levels into one of timesteps that predicts v, in place."""
    for kind in ("weight", "bias"):
        weights[f"out.2.{kind}"] = -weights[f"out.2.{kind}"]
    first = weights["time_embed.0.weight"].double()
    of_cosines, of_sines = first.chunk(2, dim=1)
    half = of_cosines.shape[1]
    angle = PER_E * math.log(LEAST_SIGMA) * torch.exp(-math.log(10_000) * torch.arange(half).double() / half)
    rotated = [of_cosines * angle.cos() + of_sines * angle.sin(), of_sines * angle.cos() - of_cosines * angle.sin()]
    weights["time_embed.0.weight"] = torch.cat(rotated, 1).float()
    label = {name: weights.pop(f"label_emb.{name}") for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    hidden = torch.nn.functional.silu(label["0.weight"][:, 0] * DIFFICULTY + label["0.bias"])
    weights["time_embed.2.bias"] += label["2.weight"] @ hidden + label["2.bias"]


def betas() -> NDArray[np.float64]:
    """Compute the noise schedule: the timesteps' noise levels, in a process that preserves the variance."""
    sigmas = LEAST_SIGMA * np.exp(np.arange(TIMESTEPS) / PER_E) / DEVIATION
    kept = 1 / (1 + sigmas**2)
    schedule: NDArray[np.float64] = 1 - kept / np.concatenate([[1.0], kept[:-1]])
    return schedule


def make_pipeline(wheel: Path) -> Any:
    """Make the pipeline.

    Raises:
        SystemExit: If the wheel is another one.
    """
    weights = weights_of(onnx.load_model_from_string(read_file(wheel)).graph)
    preserve_variance(weights)
    network = read_network(weights)
    unet = load_unet("UNet2DModel", network.config(SIDE, HEADS), convert(weights, network, HEADS))
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=TIMESTEPS,
        trained_betas=betas().tolist(),
        prediction_type="v_prediction",
        clip_sample_range=1 / DEVIATION,
        timestep_spacing="linspace",
    )
    return diffusers.DDPMPipeline(unet=fit(unet, HEADS, 1.0), scheduler=scheduler)


def main() -> None:
    """Make the pipeline folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_pipeline(download(Path(folder))).save_pretrained(options.folder)


if __name__ == "__main__":
    main()

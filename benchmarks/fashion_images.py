"""The images that the reference model `fashion` is trained on: Fashion-MNIST, as Debian packages it.

    apt-get install dataset-fashion-mnist

60,000 images for training and 10,000 to judge by, 28x28, in ten classes; H. Xiao, K. Rasul and R. Vollgraf,
arXiv:1708.07747, MIT licence. A border of two pixels makes them 32x32.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

FOLDER = Path("/usr/share/datasets/fashion-mnist")
NAMES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
"""Name of each class, by label."""
TRAINING, UNSEEN = "train", "t10k"


def read(part: str, folder: Path = FOLDER) -> tuple[Tensor, Tensor]:
    """Read images as bytes [count, 1, 28, 28], and labels [count].

    Args:
        part: `TRAINING` or `UNSEEN`.
        folder: Folder of the four files.
    """
    return _read_idx(folder / f"{part}-images-idx3-ubyte.gz").unsqueeze(1), _read_idx(
        folder / f"{part}-labels-idx1-ubyte.gz"
    ).long()


def as_samples(images: Tensor) -> Tensor:
    """Turn bytes [count, 1, 28, 28] into images [count, 1, 32, 32] in [-1, 1] with a black border."""
    return functional.pad(images.float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)


def _read_idx(path: Path) -> Tensor:
    """Read a file in the IDX format: two zero bytes, a type, the number of axes, their sizes, the values."""
    if not path.exists():
        raise SystemExit(f"{path} is missing. Install it: apt-get install dataset-fashion-mnist")
    content = gzip.decompress(path.read_bytes())
    zeros, kind, axes = struct.unpack_from(">HBB", content)
    if (zeros, kind) != (0, 0x08):
        raise SystemExit(f"{path} is not an IDX file of bytes.")
    shape = struct.unpack_from(f">{axes}I", content, 4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy())

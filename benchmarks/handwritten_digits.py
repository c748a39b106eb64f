"""The handwritten digits that reference models are trained on.

The data are the 1,797 digits inside scikit-learn (8x8 scans, UCI "Optical Recognition of Handwritten Digits",
E. Alpaydin and C. Kaynak, CC BY 4.0). Nothing is downloaded.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional


def scans() -> tuple[Tensor, Tensor]:
    """Load the digits as ink [1797, 1, 8, 8] in [0, 1] and labels [1797]."""
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(digits.target)


def real_digits() -> tuple[Tensor, Tensor]:
    """Load the digits as images [1797, 1, 32, 32] in [-1, 1] and labels [1797]."""
    ink, labels = scans()
    large = functional.interpolate(ink * 2 - 1, size=(32, 32), mode="bicubic", align_corners=False)
    return large.clamp(-1, 1), labels


def divided(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split indices at random into four fifths for training and one fifth to hold out."""
    order = torch.randperm(count, generator=generator)
    return order[: count * 4 // 5], order[count * 4 // 5 :]

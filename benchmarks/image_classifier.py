"""A small classifier of images, the task metric of the reference models.

Every reference model ships with its own weights. It answers two questions about a batch of images: is it sure of their
classes (confidence), and are they distributed like the real ones (Fréchet distance of its features)? The distance is
*not* FID, which is defined on the features of one particular Inception network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

FEATURES = 64
"""Width of the feature layer."""


class ImageClassifier(nn.Module):
    """Classify 32x32 grey images in [-1, 1] as one of ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, FEATURES, 3, 2, 1), nn.BatchNorm2d(FEATURES), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * FEATURES, FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [batch, 64] and logits [batch, 10] of images [batch, 1, 32, 32]."""
        features = self.trunk(images)
        return features, self.head(features)

    @classmethod
    def load(cls, path: Path) -> ImageClassifier:
        """Load the weights from a safetensors file and switch to evaluation mode."""
        classifier = cls()
        classifier.load_state_dict(load_file(path))
        return classifier.eval()

    @torch.inference_mode()
    def describe(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Compute features [batch, 64] and class probabilities [batch, 10] of images [batch, 1, 32, 32] in [-1, 1]."""
        features, logits = self(torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)))
        return features.double().numpy(), logits.double().softmax(dim=1).numpy()


def frechet_distance(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Measure the Fréchet distance between Gaussians fitted to two sets of features, each [count, feature].

    Source:
        Dowson and Landau 1982, eq. (4); used on image features by Heusel et al. 2017, arXiv:1706.08500.
    """
    mean_gap = left.mean(axis=0) - right.mean(axis=0)
    covariances = np.cov(left, rowvar=False), np.cov(right, rowvar=False)
    # the trace of the product's square root, by eigenvalues: a feature that is never active makes a covariance singular
    values, vectors = np.linalg.eigh(covariances[0])
    half = vectors * np.sqrt(values.clip(0))
    cross = np.sqrt(np.linalg.eigvalsh(half.T @ covariances[1] @ half).clip(0)).sum()
    return float(mean_gap @ mean_gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * cross)

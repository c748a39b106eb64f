"""The handwritten digits that the reference models are trained on, and the training of a classifier for them.

The data are the 1,797 digits inside scikit-learn (8x8 scans, UCI "Optical Recognition of Handwritten Digits",
E. Alpaydin and C. Kaynak, CC BY 4.0). Nothing is downloaded.
"""

from __future__ import annotations

import torch
from digit_classifier import DigitClassifier
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


def shifted(images: Tensor, generator: torch.Generator, pixels: int = 2) -> Tensor:
    """Shift each image [batch, 1, 32, 32] by up to `pixels` in both directions, repeating the border."""
    padded = functional.pad(images, (pixels,) * 4, mode="replicate")
    corners = torch.randint(0, 2 * pixels + 1, (len(images), 2), generator=generator)
    return torch.stack([p[:, y : y + 32, x : x + 32] for p, (y, x) in zip(padded, corners.tolist(), strict=True)])


def divided(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split indices at random into four fifths for training and one fifth to hold out."""
    order = torch.randperm(count, generator=generator)
    return order[: count * 4 // 5], order[count * 4 // 5 :]


def fit_classifier(images: Tensor, labels: Tensor, generator: torch.Generator, epochs: int) -> DigitClassifier:
    """Train a classifier of digits on images [count, 1, 32, 32], shifted differently in every epoch."""
    classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(images), generator=generator), 64):
            _, logits = classifier(shifted(images[batch], generator))
            optimizer.zero_grad()
            functional.cross_entropy(logits, labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return classifier.eval()


def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Compute the share of images `[count, 1, 32, 32]` whose most probable class is their label."""
    _, probabilities = classifier.describe(images.numpy())
    return float((probabilities.argmax(1) == labels.numpy()).mean())

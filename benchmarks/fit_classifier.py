"""Train the classifier of a reference model, and judge it."""

from __future__ import annotations

import torch
from image_classifier import ImageClassifier
from torch import Tensor
from torch.nn import functional


def shifted(images: Tensor, generator: torch.Generator, pixels: int = 2) -> Tensor:
    """Shift each image [batch, 1, 32, 32] by up to `pixels` in both directions, repeating the border."""
    padded = functional.pad(images, (pixels,) * 4, mode="replicate")
    corners = torch.randint(0, 2 * pixels + 1, (len(images), 2), generator=generator)
    return torch.stack([p[:, y : y + 32, x : x + 32] for p, (y, x) in zip(padded, corners.tolist(), strict=True)])


def fit_classifier(images: Tensor, labels: Tensor, generator: torch.Generator, epochs: int) -> ImageClassifier:
    """Train a classifier on images [count, 1, 32, 32], shifted differently in every epoch."""
    classifier = ImageClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(images), generator=generator), 64):
            _, logits = classifier(shifted(images[batch], generator))
            optimizer.zero_grad()
            functional.cross_entropy(logits, labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return classifier.eval()


def accuracy(classifier: ImageClassifier, images: Tensor, labels: Tensor) -> float:
    """Compute the share of images `[count, 1, 32, 32]` whose most probable class is their label."""
    _, probabilities = classifier.describe(images.numpy())
    return float((probabilities.argmax(1) == labels.numpy()).mean())

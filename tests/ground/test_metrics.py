"""Distances match their definitions, intervals are Student's, and the digit classifier recognises digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_classifier import FEATURES, ImageClassifier, frechet_distance
from scipy import stats
from sklearn.datasets import load_digits
from torch.nn import functional
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

import unetc.models
from unetc.backend import Array
from unetc.errors import ShapeMismatch
from unetc.metrics.damage import measure_damage
from unetc.metrics.distances import PSNR_CAP_DB, psnr, relative_l2
from unetc.metrics.interval import estimate
from unetc.metrics.ssim import ssim

CLASSIFIER = Path(unetc.models.__file__).parent / "digits/classifier/model.safetensors"


def images(seed: int, *, batch: int = 3, channels: int = 2, size: int = 16) -> Array:
    """Draw smooth images in [-1, 1], so that they have a structure to compare."""
    noise = torch.randn(batch, channels, size + 4, size + 4, generator=torch.Generator().manual_seed(seed))
    smooth = functional.avg_pool2d(noise, 5, stride=1)
    return torch.tanh(4 * smooth).numpy()


def noisy(reference: Array, amount: float, seed: int = 9) -> Array:
    noise = np.random.default_rng(seed).standard_normal(reference.shape).astype(np.float32)
    return np.clip(reference + np.float32(amount) * noise, -1, 1)


def test_relative_l2_by_hand() -> None:
    reference = np.array([[[[3.0, 4.0]]], [[[0.0, 2.0]]]], dtype=np.float32)
    candidate = np.array([[[[3.0, 4.5]]], [[[2.0, 2.0]]]], dtype=np.float32)
    assert relative_l2(reference, candidate).tolist() == [0.1, 1.0]
    # the denominator is the norm of the reference
    assert relative_l2(candidate, reference)[1] == pytest.approx(2 / np.hypot(2, 2))


def test_psnr_by_hand() -> None:
    reference = np.zeros((2, 1, 2, 2), dtype=np.float32)
    candidate = reference.copy()
    candidate[0] = 0.5  # mean squared error 1/4, range 2: 10 log10(4 / (1/4)) = 12.04 dB
    candidate[1, 0, 0, 0] = 2.0  # mean squared error 1: 6.02 dB
    assert psnr(reference, candidate) == pytest.approx([10 * np.log10(16), 10 * np.log10(4)])


def test_ssim_by_hand() -> None:
    # constant images have no variance: (2 a b + c1) / (a^2 + b^2 + c1) with c1 = (0.01 * 2)^2
    reference, candidate = np.full((1, 1, 16, 16), 0.5, np.float32), np.full((1, 1, 16, 16), 0.25, np.float32)
    assert ssim(reference, candidate) == pytest.approx([(0.25 + 4e-4) / (0.3125 + 4e-4)], rel=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_psnr_and_ssim_follow_torchmetrics(batch: int) -> None:
    reference = images(0, batch=batch)
    candidate = noisy(reference, 0.2)
    pairs = [(torch.from_numpy(c)[None], torch.from_numpy(r)[None]) for c, r in zip(candidate, reference, strict=True)]
    # float32 inside torchmetrics
    assert psnr(reference, candidate) == pytest.approx(
        [float(PeakSignalNoiseRatio(data_range=2.0)(*pair)) for pair in pairs], rel=1e-5
    )
    assert ssim(reference, candidate) == pytest.approx(
        [float(StructuralSimilarityIndexMeasure(data_range=2.0)(*pair)) for pair in pairs], abs=1e-5
    )


def test_identical_images_have_no_damage() -> None:
    reference = images(1)
    damage = measure_damage(reference, reference.copy())
    assert damage.relative_l2.mean == damage.relative_l2.high == 0
    assert damage.psnr.mean == PSNR_CAP_DB
    assert damage.ssim.mean == pytest.approx(1, abs=1e-6)


def test_an_empty_reference_gives_a_finite_distance() -> None:
    zero = np.zeros((1, 1, 16, 16), np.float32)
    assert relative_l2(zero, zero).tolist() == [0]
    assert np.isfinite(relative_l2(zero, zero + 1)).all()


def test_more_noise_is_more_damage() -> None:
    reference = images(2)
    damages = [measure_damage(reference, noisy(reference, amount)) for amount in (0.01, 0.1, 0.5)]
    assert [d.relative_l2.mean for d in damages] == sorted(d.relative_l2.mean for d in damages)
    assert [d.psnr.mean for d in damages] == sorted((d.psnr.mean for d in damages), reverse=True)
    assert [d.ssim.mean for d in damages] == sorted((d.ssim.mean for d in damages), reverse=True)


def test_every_sample_is_compared_with_its_own_reference() -> None:
    reference = images(3)
    candidate = reference.copy()
    candidate[1] = noisy(reference[1:2], 0.3)[0]
    changed = np.array([0, 1, 0], dtype=bool)
    assert (relative_l2(reference, candidate) > 0).tolist() == changed.tolist()
    assert (psnr(reference, candidate) < PSNR_CAP_DB).tolist() == changed.tolist()
    assert (ssim(reference, candidate) < 0.99).tolist() == changed.tolist()


@pytest.mark.parametrize("metric", [relative_l2, psnr, ssim, measure_damage])
@pytest.mark.parametrize("shape", [(2, 2, 16, 16), (3, 1, 16, 16), (3, 2, 16, 12), (3, 2, 32, 8)])
def test_other_shapes_are_refused(metric: object, shape: tuple[int, ...]) -> None:
    assert callable(metric)
    with pytest.raises(ShapeMismatch, match=r"Expected equal shapes"):
        metric(images(0), np.zeros(shape, np.float32))


def ssim_by_definition(x: Array, y: Array, radius: int) -> float:
    """Average the similarity over the window around every pixel of one channel, in plain loops."""
    offsets = range(-radius, radius + 1)
    weights = np.array([[np.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in offsets] for i in offsets])
    weights /= weights.sum()
    padded = [np.pad(image.astype(np.float64), radius, mode="reflect") for image in (x, y)]
    found = []
    for row, column in np.ndindex(x.shape):
        a, b = (own[row : row + 2 * radius + 1, column : column + 2 * radius + 1] for own in padded)
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        variances = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
        covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
        luminance = (2 * mean_a * mean_b + 4e-4) / (mean_a**2 + mean_b**2 + 4e-4)
        found.append(luminance * (2 * covariance + 3.6e-3) / (variances + 3.6e-3))
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("height", "width", "radius"), [(1, 1, 0), (2, 9, 0), (3, 3, 1), (8, 8, 3), (9, 16, 4), (10, 10, 4), (11, 12, 5)]
)
def test_the_window_of_ssim_shrinks_to_small_images(height: int, width: int, radius: int) -> None:
    reference = images(0)[..., :height, :width]
    candidate = noisy(reference, 0.2)
    expected = [
        np.mean([ssim_by_definition(x, y, radius) for x, y in zip(*pair, strict=True)])
        for pair in zip(reference, candidate, strict=True)
    ]
    assert ssim(reference, candidate) == pytest.approx(expected, abs=1e-9)
    assert ssim(reference, reference) == pytest.approx(np.ones(3))


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_estimate_is_students_interval(values: list[float]) -> None:
    result = estimate(values)
    sem = stats.sem(values)
    assert result.mean == pytest.approx(np.mean(values), abs=1e-9)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=sem) if sem else (result.mean,) * 2
    assert (result.low, result.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def test_estimate_by_hand() -> None:
    # the 97.5 % quantile of Student's t with 3 degrees of freedom is 3.1824; the standard error of 1 2 3 4 is 0.6455
    result = estimate([1.0, 2.0, 3.0, 4.0])
    assert (result.mean, result.high - result.mean) == (2.5, pytest.approx(3.1824 * 0.6455, rel=1e-4))


def test_a_single_sample_has_no_interval() -> None:
    result = estimate([0.25])
    assert (result.low, result.mean, result.high) == (0.25, 0.25, 0.25)


def features_with(mean: list[float], deviation: list[float], count: int = 400) -> np.ndarray:
    """Make features with exactly this sample mean and this diagonal sample covariance."""
    generator = np.random.default_rng(len(mean))
    white = generator.standard_normal((count, len(mean)))
    white -= white.mean(axis=0)
    white @= np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    return white * np.array(deviation) + np.array(mean)


def test_frechet_distance_of_diagonal_gaussians() -> None:
    left = features_with([0.0, 1.0, 2.0], [1.0, 2.0, 0.5])
    right = features_with([1.0, 1.0, -1.0], [3.0, 2.0, 1.5])
    # |difference of means|^2 + sum of (difference of standard deviations)^2
    assert frechet_distance(left, right) == pytest.approx((1 + 9) + (4 + 0 + 1), rel=1e-9)
    assert frechet_distance(right, left) == pytest.approx(frechet_distance(left, right), rel=1e-9)


def test_frechet_distance_of_equal_sets_is_zero() -> None:
    features = np.random.default_rng(0).standard_normal((300, 8))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_fewer_samples_than_features_is_finite() -> None:
    # the covariances are singular, and some implementations fail at the square root of a singular product
    generator = np.random.default_rng(1)
    left, right = generator.standard_normal((2, 20, FEATURES))
    assert frechet_distance(left, left) == pytest.approx(0, abs=1e-3)
    assert np.isfinite(frechet_distance(left, right))
    dead = left * (np.arange(FEATURES) % 2)  # every second feature is never active
    assert np.isfinite(frechet_distance(dead, right))
    assert frechet_distance(dead, dead) == pytest.approx(0, abs=1e-3)


def test_the_classifier_describes_images_by_features_and_probabilities() -> None:
    torch.manual_seed(0)
    classifier = ImageClassifier().eval()
    batch = images(0, batch=5, channels=1, size=32)
    features, probabilities = classifier.describe(batch)
    assert features.shape == (5, FEATURES)
    assert probabilities.shape == (5, 10)
    assert probabilities.sum(axis=1) == pytest.approx(np.ones(5))
    # in evaluation mode the other images of a batch have no influence; only float32 rounding depends on the batch
    np.testing.assert_allclose(classifier.describe(batch[:1])[1], probabilities[:1], rtol=1e-5)


def test_the_shipped_classifier_knows_digits() -> None:
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    large = functional.interpolate(small, size=(32, 32), mode="bicubic", align_corners=False).clamp(-1, 1)
    _, probabilities = ImageClassifier.load(CLASSIFIER).describe(large.numpy())
    assert (probabilities.argmax(axis=1) == digits.target).mean() > 0.95
    # a classifier that is sure to see digits in noise could not tell broken samples from good ones
    noise = np.random.default_rng(0).uniform(-1, 1, (200, 1, 32, 32)).astype(np.float32)
    _, of_noise = ImageClassifier.load(CLASSIFIER).describe(noise)
    assert of_noise.max(axis=1).mean() < probabilities.max(axis=1).mean()

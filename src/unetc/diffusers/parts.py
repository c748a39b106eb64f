"""Prove that samples continue a trajectory in one part of the image, and follow its earlier samples in the other.

Inpainting with an ordinary UNet pastes the noised original into the samples after every step. Inside the mask, the
scheduler makes the samples from earlier samples and predictions. Outside, they are the original and the noise, so
any two earlier samples explain them. The mask is not known here: small blocks of the image show the weights of a
combination, and the weights show where it holds.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from unetc.device import Array

_BLOCKS = 256
"""Most blocks of the image that are looked at."""

_EQUATIONS = 2
"""A block has this many times more elements than vectors to combine, or anything could be explained."""

_ELEMENTS = 4
"""A part has this many times more elements than vectors."""

_SEEN = 0.5
"""Share of a block's pixels from which it belongs to a part that was looked at before."""

_TRIES = 8
"""Most parts of the image that are looked at, each with other weights."""

_NEAR = 1e-3
"""Unexplained energy of a pixel near to the weights of one block, relative to the mean energy of pixels."""

_LEAST = 1e-5
"""Smallest singular value that the weights of one block use, relative; smaller ones would fit its rounding."""

_COARSEST = 1e-5
"""Largest rounding error with which parts can be told; in bfloat16, smooth parts of any image explain each other."""

_MARGIN = 10.0
"""A part counts as unexplained from this multiple of the rounding error."""

_Floats = NDArray[np.float64]


class Proof(enum.Enum):
    """The part of a sample that is explained."""

    NONE = enum.auto()
    PART = enum.auto()
    """A part continues the trajectory; nothing explains the other."""
    WHOLE = enum.auto()
    """A part continues the trajectory, and earlier samples explain the other."""


def prove(sample: Array, samples: Sequence[Array], predictions: Sequence[Array], tolerance: float) -> Proof:
    """Look for a part of a sample that is a combination of earlier samples and predictions.

    Args:
        sample: The sample, [channel, height, width].
        samples: Earlier samples of the trajectory.
        predictions: Their predictions.
        tolerance: Largest unexplained share of the energy that rounding leaves.
    """
    if tolerance > _COARSEST:
        return Proof.NONE
    wanted, vectors = _pixels(sample), [_pixels(one) for one in (*samples, *predictions)]
    own = vectors[: len(samples)]
    best = Proof.NONE
    for inside in _parts(wanted, vectors, sample.shape, tolerance):
        if _unexplained(wanted[inside], [one[inside] for one in vectors]) > tolerance:
            continue
        if _unexplained(wanted[inside], [one[inside] for one in own]) <= _MARGIN * tolerance:
            continue  # no prediction is in it
        best = Proof.PART
        outside = ~inside
        if len(own) < 2 or outside.sum() * wanted.shape[1] < _ELEMENTS * len(own):
            continue
        if _unexplained(wanted[outside], [one[outside] for one in own]) <= tolerance:
            return Proof.WHOLE
    return best


def _pixels(image: Array) -> _Floats:
    """List the channels of every pixel, [pixel, channel]."""
    return image.reshape(len(image), -1).T.astype(np.float64)


def _parts(
    wanted: _Floats, vectors: Sequence[_Floats], shape: tuple[int, ...], tolerance: float
) -> Iterator[NDArray[np.bool_]]:
    """Find sets of pixels that one combination of vectors explains."""
    channels, height, width = shape
    side = int(np.ceil(np.sqrt(_EQUATIONS * len(vectors) / channels)))
    corners = list(itertools.product(range(0, height - side + 1, side), range(0, width - side + 1, side)))
    corners = corners[:: max(1, -(-len(corners) // _BLOCKS))]
    if not corners:
        return
    square = np.add.outer(np.arange(side) * width, np.arange(side)).ravel()
    places = np.array([row * width + column for row, column in corners])[:, None] + square  # [block, pixel]
    matrices = np.stack([one[places].reshape(len(places), -1) for one in vectors], axis=-1)
    targets = wanted[places].reshape(len(places), -1, 1)
    base, _ = np.linalg.qr(matrices)
    rests = targets - base @ (base.transpose(0, 2, 1) @ targets)
    shares = np.square(rests).sum((1, 2)) / np.maximum(np.square(targets).sum((1, 2)), 1e-30)
    energy, seen = float(np.square(wanted).sum(1).mean()), np.zeros(len(wanted), bool)
    tries = 0
    for block in np.flatnonzero(shares <= tolerance):
        if seen[places[block]].mean() > _SEEN:  # a few other pixels may fit by chance
            continue
        inside = np.zeros(len(wanted), bool)
        inside[places[block]] = True
        for near, least in ((_NEAR, _LEAST), (_NEAR, None), (_MARGIN * tolerance, None)):  # of one block: not exact
            inside = _errors(wanted, vectors, inside, least) <= near * energy
            if inside.sum() * channels < _ELEMENTS * len(vectors):
                break
        else:
            yield inside
        seen |= inside
        tries += 1
        if tries == _TRIES:
            return


def _errors(wanted: _Floats, vectors: Sequence[_Floats], fitted: NDArray[np.bool_], least: float | None) -> _Floats:
    """Compute the energy that a combination leaves of every pixel, with the weights that fit some pixels best.

    Args:
        wanted: The sample, [pixel, channel].
        vectors: The vectors to combine.
        fitted: The pixels.
        least: Smallest singular value that is used, relative; None for all.
    """
    matrix = np.stack([one[fitted].ravel() for one in vectors], axis=1)
    weights, *_ = np.linalg.lstsq(matrix, wanted[fitted].ravel(), rcond=least)
    rest = wanted.copy()
    for weight, one in zip(weights, vectors, strict=True):
        rest -= weight * one
    errors: _Floats = np.square(rest).sum(1)
    return errors


def _unexplained(wanted: _Floats, vectors: Sequence[_Floats]) -> float:
    """Compute the share of the energy that no combination of vectors explains."""
    matrix = np.stack([one.ravel() for one in vectors], axis=1)
    weights, *_ = np.linalg.lstsq(matrix, wanted.ravel())
    rest = wanted.ravel() - matrix @ weights
    return float(np.square(rest).sum() / (np.square(wanted).sum() or 1.0))
